// A line for each feature: it works, or what went wrong.
export const { CHATTY, NANO } = process.env;
export const PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79";
export const PATH = { type: "object", properties: { path: { type: "string" } }, required: ["path"] };
export const AB = {
  type: "object",
  properties: { a: { type: "integer" } },
  required: ["a"],
  additionalProperties: false,
};
export const TWENTY = Array.from({ length: 20 }, (_, n) => n + 1).join(" ");

export function equal(found, wanted) {
  if (JSON.stringify(found) !== JSON.stringify(wanted)) {
    throw new Error(`${JSON.stringify(found)} is not ${JSON.stringify(wanted)}`);
  }
}

export const solved = (text) => equal(text.replace(/\s/g, "").length, 81);

export async function feature(name, check) {
  let result = "yes";
  try {
    await check();
  } catch (error) {
    result = `${error.name}: ${error.message}`.replace(/\s+/g, " ").slice(0, 300);
  }
  console.log(JSON.stringify({ feature: name, result }));
}

export async function fails(call, status) {
  try {
    await call();
  } catch (error) {
    equal(error.status ?? error.status_code ?? error.statusCode, status);
    return;
  }
  throw new Error("no error");
}
