// OpenAI's library for Node.
import OpenAI from "openai";
import { AB, CHATTY, NANO, PATH, PUZZLE, TWENTY, equal, fails, feature, solved } from "./report.mjs";

const client = new OpenAI({ baseURL: `${CHATTY}/v1`, apiKey: "none", maxRetries: 0 });
const tools = [{ type: "function", function: { name: "ls", parameters: PATH } }];
const user = (content) => ({ role: "user", content });
const ask = (text, more = {}) =>
  client.chat.completions.create({ model: "chatty", messages: Array.isArray(text) ? text : [user(text)], ...more });

await feature("chat", async () => equal((await ask("say 4")).choices[0].message.content, "4"));
await feature("turns", async () => {
  const turns = [{ role: "system", content: "Be." }, user("a"), { role: "assistant", content: "b" }, user("recall")];
  equal((await ask(turns)).choices[0].message.content, "[system] Be. [user] a [model] b [user] recall");
});
await feature("stream", async () => {
  const stream = client.chat.completions.stream({ model: "chatty", messages: [user("count 20")] });
  equal(await stream.finalContent(), TWENTY);
});
await feature("tools", async () => {
  const first = (await ask('call ls {"path": "a"}', { tools })).choices[0].message;
  const [call] = first.tool_calls;
  equal(JSON.parse(call.function.arguments), { path: "a" });
  const result = { role: "tool", tool_call_id: call.id, content: "none" };
  const answer = await ask([user('call ls {"path": "a"}'), first, result], { tools });
  equal(answer.choices[0].message.content, "ls said none");
});
await feature("thinking", async () => {
  const answer = await ask("say 4", { reasoning_effort: "low" });
  equal(answer.choices[0].message.reasoning_content.trim(), "I think.");
});
await feature("schema", async () => {
  const response_format = { type: "json_schema", json_schema: { name: "ab", schema: AB, strict: true } };
  const answer = await client.chat.completions.parse({
    model: "chatty",
    messages: [user('say {"a": 7}')],
    response_format,
  });
  equal(JSON.parse(answer.choices[0].message.content), { a: 7 });
});
await feature("stop", async () => equal((await ask("say one two", { stop: "two" })).choices[0].message.content, "one "));
await feature("usage", async () => equal((await ask("say 4")).usage.completion_tokens, 2));
await feature("responses", async () => {
  const stream = client.responses.stream({ model: "chatty", input: "say 4", reasoning: { effort: "low" } });
  equal((await stream.finalResponse()).output_text, "4");
});
await feature("error", () => fails(() => ask("a", { model: "gpt" }), 404));
await feature("cancel", async () => {
  const stream = await ask("count 900", { stream: true });
  for await (const _ of stream) break;
});
await feature("sudoku-nano", async () => {
  const nano = new OpenAI({ baseURL: `${NANO}/v1`, apiKey: "none" });
  const answer = await nano.chat.completions.create({ model: "sudoku-nano", messages: [user(PUZZLE)], seed: 1 });
  solved(answer.choices[0].message.content);
});
