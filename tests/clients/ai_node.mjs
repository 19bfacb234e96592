// Vercel's AI SDK, by its OpenAI-compatible provider and by Anthropic's.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";
import { AB, CHATTY, NANO, PATH, PUZZLE, TWENTY, equal, fails, feature, solved } from "./report.mjs";

const provider = (url) =>
  createOpenAICompatible({ name: "blockpress", baseURL: `${url}/v1`, supportsStructuredOutputs: true, includeUsage: true });
const openai = provider(CHATTY)("chatty");
const anthropic = createAnthropic({ baseURL: `${CHATTY}/v1`, apiKey: "none" })("chatty");
const both = [openai, anthropic];
const tools = { ls: tool({ description: "Lists.", inputSchema: jsonSchema(PATH), execute: () => "none" }) };
const ask = (model, more) => generateText({ model, maxRetries: 0, maxOutputTokens: 2000, ...more });

await feature("chat", async () => {
  for (const model of both) equal((await ask(model, { prompt: "say 4" })).text, "4");
});
await feature("turns", async () => {
  const messages = [
    { role: "user", content: "a" },
    { role: "assistant", content: "b" },
    { role: "user", content: "recall" },
  ];
  const told = "[system] Be. [user] a [model] b [user] recall";
  for (const model of both) equal((await ask(model, { system: "Be.", messages })).text, told);
});
await feature("stream", async () => {
  for (const model of both) {
    const stream = streamText({ model, prompt: "count 20", maxOutputTokens: 999 });
    let said = "";
    for await (const text of stream.textStream) said += text;
    equal(said, TWENTY);
  }
});
await feature("tools", async () => {
  for (const model of both) {
    const answer = await ask(model, { prompt: 'call ls {"path": "a"}', tools, stopWhen: stepCountIs(3) });
    equal(answer.steps[0].toolCalls[0].input, { path: "a" });
    equal(answer.text, "ls said none");
  }
});
await feature("thinking", async () => {
  const low = await ask(openai, { prompt: "say 4", providerOptions: { blockpress: { reasoningEffort: "low" } } });
  equal(low.reasoningText.trim(), "I think.");
  const thinking = { type: "enabled", budgetTokens: 1024 };
  const answer = await ask(anthropic, { prompt: "say 4", providerOptions: { anthropic: { thinking } } });
  equal(answer.reasoningText.trim(), "I think.");
});
await feature("schema", async () => {
  const output = Output.object({ schema: jsonSchema(AB) });
  equal((await ask(openai, { prompt: 'say {"a": 7}', output })).output, { a: 7 });
});
await feature("stop", async () => {
  for (const model of both) equal((await ask(model, { prompt: "say one two", stopSequences: ["two"] })).text, "one ");
});
await feature("usage", async () => {
  for (const model of both) equal((await ask(model, { prompt: "say 4" })).usage.outputTokens, 2);
});
await feature("error", () => fails(() => ask(provider(CHATTY)("gpt"), { prompt: "a" }), 404));
await feature("cancel", async () => {
  const stopping = new AbortController();
  const stream = streamText({ model: openai, prompt: "count 900", abortSignal: stopping.signal, onError: () => {} });
  for await (const _ of stream.textStream) stopping.abort();
});
await feature("sudoku-nano", async () => {
  solved((await ask(provider(NANO)("sudoku-nano"), { prompt: PUZZLE, maxOutputTokens: 100 })).text);
});
