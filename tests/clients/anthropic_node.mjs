// Anthropic's library for Node.
import Anthropic from "@anthropic-ai/sdk";
import { AB, CHATTY, NANO, PATH, PUZZLE, TWENTY, equal, fails, feature, solved } from "./report.mjs";

const client = new Anthropic({ baseURL: CHATTY, apiKey: "none", maxRetries: 0 });
const tools = [{ name: "ls", input_schema: PATH }];
const user = (content) => ({ role: "user", content });
const body = (text, more = {}) => ({
  model: "chatty",
  max_tokens: 2000,
  messages: Array.isArray(text) ? text : [user(text)],
  ...more,
});
const ask = (text, more) => client.messages.create(body(text, more));

await feature("chat", async () => equal((await ask("say 4")).content[0].text, "4"));
await feature("turns", async () => {
  const turns = [user("a"), { role: "assistant", content: "b" }, user("recall")];
  equal((await ask(turns, { system: "Be." })).content[0].text, "[system] Be. [user] a [model] b [user] recall");
});
await feature("stream", async () => equal(await client.messages.stream(body("count 20")).finalText(), TWENTY));
await feature("tools", async () => {
  const first = await client.messages.stream(body('call ls {"path": "a"}', { tools })).finalMessage();
  const [call] = first.content;
  equal(call.input, { path: "a" });
  const result = { type: "tool_result", tool_use_id: call.id, content: "none" };
  const turns = [user('call ls {"path": "a"}'), { role: "assistant", content: first.content }, user([result])];
  equal((await ask(turns, { tools })).content[0].text, "ls said none");
});
await feature("thinking", async () => {
  const answer = await ask("say 4", { thinking: { type: "enabled", budget_tokens: 1024 } });
  equal(answer.content[0].thinking.trim(), "I think.");
});
await feature("schema", async () => {
  const answer = await ask('say {"a": 7}', { output_config: { format: { type: "json_schema", schema: AB } } });
  equal(JSON.parse(answer.content[0].text), { a: 7 });
});
await feature("stop", async () => equal((await ask("say one two", { stop_sequences: ["two"] })).stop_sequence, "two"));
await feature("usage", async () => {
  const counted = await client.messages.countTokens({ model: "chatty", messages: [user("say 4")] });
  equal((await ask("say 4")).usage.input_tokens, counted.input_tokens);
});
await feature("error", () => fails(() => ask("a", { model: "claude" }), 404));
await feature("cancel", async () => {
  const stream = await ask("count 900", { stream: true });
  for await (const _ of stream) break;
});
await feature("sudoku-nano", async () => {
  const nano = new Anthropic({ baseURL: NANO, apiKey: "none" });
  const answer = await nano.messages.create({ model: "sudoku-nano", max_tokens: 100, messages: [user(PUZZLE)] });
  solved(answer.content[0].text);
});
