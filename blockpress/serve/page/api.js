// Calls of the server. The key, where one is needed, is asked for once and kept for this tab alone.

const KEY = "blockpress.key";

export class APIError extends Error {}

let askKey = async () => null;
export const onKeyNeeded = (ask) => (askKey = ask);

// A response that is not an error. Raises APIError with the server's own words.
export async function call(path, { body, signal } = {}) {
  let wrong = false;
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...(body && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) };
    const method = body ? "POST" : "GET";
    let response;
    try {
      response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body), cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new APIError("The server does not answer.");
    }
    if (response.ok) return response;
    if (response.status === 401) {
      const given = await askKey(wrong);
      if (given) {
        sessionStorage.setItem(KEY, given);
        wrong = true;
        continue;
      }
    }
    throw new APIError(await messageOf(response));
  }
}

async function messageOf(response) {
  try {
    const { error } = await response.json();
    return typeof error === "string" ? error : error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

// The server-sent events of a response, each as [name, data].
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += value.replaceAll("\r", "");
      for (let end; (end = rest.indexOf("\n\n")) >= 0; rest = rest.slice(end + 2)) {
        const lines = rest.slice(0, end).split("\n");
        const field = (name) => lines.filter((line) => line.startsWith(name)).map((line) => line.slice(name.length).trim());
        const data = field("data:").join("\n");
        if (data && data !== "[DONE]") yield [field("event:")[0] ?? "message", JSON.parse(data)];
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// Runs a canvas and records it. `on` has functions for start, frame, commit and done.
export async function record(body, recording, player, on = {}, signal) {
  const response = await call("/v1/canvas", { body, signal });
  player.open(recording);
  let done = false;
  try {
    for await (const [name, event] of events(response)) {
      const kind = name.replace("canvas.", "");
      if (event.error) throw new APIError(event.error.message);
      if (kind === "start") recording.start(event);
      if (kind === "frame") recording.add(event);
      if (kind === "commit") recording.commit(event);
      done ||= kind === "done";
      if (player.recording === recording) player.update();
      on[kind]?.(event);
    }
  } finally {
    recording.whole = true;
    if (player.recording === recording) player.update();
  }
  if (!done) throw new APIError("The stream ended early.");
}

// A file with the recording, the player and its style; it needs nothing else.
export async function exportFile(recording) {
  const [script, style] = await Promise.all(["player.js", "player.css"].map(async (n) => (await fetch(`/page/${n}`)).text()));
  const data = JSON.stringify(recording).replaceAll("<", "\\u003c");
  const text = (value) => String(value).replaceAll("&", "&amp;").replaceAll("<", "&lt;");
  const { model, seed, prompt } = recording.about;
  const turns = `<div class="turns"><pre class="asked">${text(prompt)}</pre><pre>${text(recording.text)}</pre></div>\n`;
  const policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'";
  const html = `<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="${policy}">
<title>${text(model)}: a canvas</title><style>${style}</style></head>
<body class="exported"><main><h1>${text(model)}</h1><p class="meta">seed ${text(seed)}, ${recording.frames.length} steps</p>
${recording.kind === "text" ? turns : ""}<bp-player></bp-player></main>
<script type="application/json" data-recording>${data}</script>
<script type="module">${script.replaceAll("</script", "<\\/script")}</script></body></html>`;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([html], { type: "text/html" }));
  link.download = `${recording.about.model ?? "canvas"}-${seed}.html`.replace(/[^\w.-]+/g, "-");
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
