// A conversation, and beside it the canvas that its answers are written on.
import { APIError, exportFile, record } from "./api.js";
import { make, Recording } from "./player.js";

class Chat extends HTMLElement {
  opened(props) {
    this.find = (name) => this.querySelector(`#chat-${name}`);
    this.player = this.querySelector("bp-player");
    this.turns = this.querySelector(".turns");
    Object.assign(this, { messages: [], work: null });
    this.player.blank(props.canvas_length);
    this.find("think").parentElement.hidden = !props.chat_template;
    if (props.sudoku) this.find("hint").textContent = "This model reads puzzles: 81 digits, 0 for a blank.";
    this.querySelector("form").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.work) this.work.abort();
      else this.send();
    });
    this.find("text").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!this.work) this.send();
    });
    this.find("clear").addEventListener("click", () => this.clear());
    this.player.addEventListener("export", () => exportFile(this.player.recording));
  }

  clear() {
    this.work?.abort();
    this.player.stop();
    this.messages = [];
    this.turns.replaceChildren(this.find("hint") ?? this.hint);
    this.say("");
    this.find("text").focus();
  }

  say(text, bad = false) {
    const status = this.find("status");
    status.textContent = text;
    status.classList.toggle("bad", bad);
  }

  body() {
    const number = (name) => {
      const value = this.find(name).value;
      return value === "" ? undefined : Number(value);
    };
    const thinking = this.find("think").checked || undefined;
    const seed = number("seed") ?? crypto.getRandomValues(new Uint32Array(1))[0]; // shown, so it must fit a double
    const body = { messages: this.messages, seed, max_tokens: number("most"), thinking };
    return { ...body, temperature: number("temperature") };
  }

  async send() {
    const text = this.find("text").value;
    if (!text.trim()) return;
    this.hint ??= this.find("hint");
    this.hint.remove();
    this.find("text").value = "";
    this.messages.push({ role: "user", content: text });
    this.turns.append(make("div", { className: "turn user" }, make("p", { className: "words" }, text)));
    const turn = this.answer(text);
    this.follow();
    const work = (this.work = new AbortController());
    this.find("send").textContent = "Stop";
    this.say("Writing …");
    const messages = this.messages;
    const on = {
      start: () => this.meta(turn.recording),
      frame: (event) => turn.add(event, false),
      commit: (event) => turn.add(event, true),
      done: (event) => turn.end(event),
    };
    try {
      await record(this.body(), turn.recording, this.player, on, work.signal);
      this.say("");
    } catch (error) {
      turn.broke(error);
      if (error.name === "AbortError") this.say("Stopped.");
      else if (error instanceof APIError) this.say(error.message, true);
      else throw error;
    } finally {
      const said = turn.recording.text;
      if (this.messages === messages) {
        if (said) messages.push({ role: "assistant", content: said });
        else if (this.messages.pop()?.content === text && turn.failed) this.find("text").value ||= text;
      }
      if (this.work === work) {
        this.work = null;
        this.find("send").textContent = "Send";
      }
      this.follow();
    }
  }

  // The newest words stay in sight: in their column, or on a phone, where the page itself scrolls, above the composer.
  follow() {
    this.turns.scrollTop = this.turns.scrollHeight;
    if (getComputedStyle(this.turns).overflowY === "visible") this.turns.lastElementChild?.scrollIntoView({ block: "nearest" });
  }

  // An answer that grows. What is final before its block ends is seen at once, and spoken with the block.
  answer(prompt) {
    const words = make("p", { className: "words", "aria-live": "polite" });
    const waiting = make("span", { className: "waiting" }, "…");
    words.append(waiting);
    const thought = make("div", { className: "thought words" });
    const thoughts = make("details", { hidden: true }, make("summary", {}, "Thoughts"), thought);
    const look = make("button", { type: "button", className: "quiet", "aria-pressed": "false", hidden: true }, "Show canvas");
    const note = make("span", { className: "meta" });
    const turn = make("div", { className: "turn" }, thoughts, words, make("div", { className: "under" }, look, note));
    this.turns.append(turn);
    const recording = new Recording("text", { prompt });
    look.addEventListener("click", () => {
      this.player.open(recording);
      this.meta(recording);
    });
    recording.look = look;
    const ready = () => {
      words.setAttribute("aria-busy", false);
      waiting.remove();
      look.hidden = recording.frames.length === 0;
    };
    return {
      recording,
      add: (event, ends) => {
        if (!event.text && !event.reasoning && !ends) return;
        words.setAttribute("aria-busy", !ends);
        if (event.reasoning) (thoughts.hidden = false), thought.append(event.reasoning);
        if (event.text) waiting.remove(), words.append(make("span", {}, event.text));
        this.follow();
      },
      end: ({ text, finish_reason: reason, usage }) => {
        ready();
        if (!text) words.append(make("span", { className: "waiting" }, "An empty answer."));
        const { steps, canvases, tokens_per_forward: rate } = usage.diffusion;
        const ends = reason === "length" ? "cut at the most tokens; " : "";
        const many = (n, word) => `${n} ${word}${n === 1 ? "" : word.endsWith("s") ? "es" : "s"}`;
        note.textContent =
          `${ends}${many(usage.completion_tokens, "token")}, ${many(canvases, "canvas")}, ${many(steps, "step")}, ` +
          `${rate.toFixed(1)} tokens a forward`;
      },
      broke() {
        ready();
        this.failed = true;
        if (!recording.text) words.append(make("span", { className: "waiting" }, "No answer."));
        note.textContent = "ended early";
      },
    };
  }

  meta(recording) {
    for (const each of this.querySelectorAll("[aria-pressed]")) each.setAttribute("aria-pressed", each === recording.look);
    const { most, seed } = recording.about;
    this.find("meta").textContent = seed === undefined ? "" : `seed ${seed}, at most ${most} steps a canvas`;
  }
}

customElements.define("bp-chat", Chat);
