// Ollama's library for Node.
import { Ollama } from "ollama";
import { AB, CHATTY, NANO, PATH, PUZZLE, TWENTY, equal, fails, feature, solved } from "./report.mjs";

const client = new Ollama({ host: CHATTY });
const tools = [{ type: "function", function: { name: "ls", description: "Lists.", parameters: PATH } }];
const user = (content) => ({ role: "user", content });
const ask = (text, more = {}) =>
  client.chat({ model: "chatty", messages: Array.isArray(text) ? text : [user(text)], ...more });

await feature("chat", async () => {
  equal((await ask("say 4")).message.content, "4");
  equal((await client.generate({ model: "chatty", prompt: "say 4" })).response, "4");
});
await feature("turns", async () => {
  const turns = [{ role: "system", content: "Be." }, user("a"), { role: "assistant", content: "b" }, user("recall")];
  equal((await ask(turns)).message.content, "[system] Be. [user] a [model] b [user] recall");
});
await feature("stream", async () => {
  let said = "";
  for await (const chunk of await ask("count 20", { stream: true })) said += chunk.message.content;
  equal(said, TWENTY);
});
await feature("tools", async () => {
  const first = (await ask('call ls {"path": "a"}', { tools })).message;
  equal(first.tool_calls[0].function.arguments, { path: "a" });
  const result = { role: "tool", tool_name: "ls", content: "none" };
  equal((await ask([user('call ls {"path": "a"}'), first, result], { tools })).message.content, "ls said none");
});
await feature("thinking", async () => equal((await ask("say 4", { think: true })).message.thinking.trim(), "I think."));
await feature("schema", async () => equal(JSON.parse((await ask('say {"a": 7}', { format: AB })).message.content), { a: 7 }));
await feature("stop", async () => equal((await ask("say one two", { options: { stop: ["two"] } })).message.content, "one "));
await feature("usage", async () => equal((await ask("say 4")).eval_count, 2));
await feature("error", () => fails(() => ask("a", { model: "llama3" }), 404));
await feature("cancel", async () => {
  const stream = await ask("count 900", { stream: true });
  for await (const _ of stream) break;
});
await feature("sudoku-nano", async () => {
  const nano = new Ollama({ host: NANO });
  solved((await nano.chat({ model: "sudoku-nano", messages: [user(PUZZLE)] })).message.content);
});
