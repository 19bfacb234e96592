// Questions about a context, and how likely each of their answers is.
import { APIError, call } from "./api.js";
import { make } from "./player.js";

const KINDS = { predicate: "Yes or no", choice: "Choice", score: "Score" };
const FIRST = [
  { type: "predicate", text: "Is the customer content with the product?" },
  { type: "choice", text: "Which team should answer?", options: "delivery\nproduct\nbilling" },
  { type: "score", text: "How upset is the customer?", options: "calm\nannoyed\nangry" },
];

class Decisions extends HTMLElement {
  opened(props) {
    this.find = (name) => this.querySelector(`#decisions-${name}`);
    Object.assign(this, { model: props.model_alias, work: null });
    FIRST.forEach((question) => this.add(question));
    this.find("add").addEventListener("click", () => this.add({ type: "predicate", text: "" }, true));
    this.find("decide").addEventListener("click", () => (this.work ? this.work.abort() : this.decide()));
  }

  say(text, bad = false) {
    const status = this.find("status");
    status.textContent = text;
    status.classList.toggle("bad", bad);
  }

  add({ type, text, options = "" }, focus = false) {
    const kind = make("select", {}, ...Object.entries(KINDS).map(([value, name]) => make("option", { value }, name)));
    kind.value = type;
    const words = make("input", { type: "text", value: text, autocomplete: "off" });
    const list = make("textarea", { rows: 3, value: options });
    const drop = make("button", { type: "button", className: "quiet" }, "Remove");
    const label = make("label", {}, make("span"), list);
    const line = make("div", { className: "line" }, make("label", {}, "Kind", kind), make("label", {}, "Question", words), drop);
    const box = make("fieldset", { className: "question" }, make("legend"), line, label);
    const face = () => {
      label.hidden = kind.value === "predicate";
      label.firstChild.textContent = kind.value === "score" ? "Levels, lowest first, one a line" : "Answers, one a line";
    };
    kind.addEventListener("change", face);
    drop.addEventListener("click", () => {
      box.remove();
      this.number();
      this.find("add").focus();
    });
    face();
    box.read = () => ({ type: kind.value, text: words.value.trim(), options: list.value.split("\n").map((o) => o.trim()).filter(Boolean) });
    this.find("questions").append(box);
    this.number();
    if (focus) words.focus();
  }

  number() {
    this.querySelectorAll(".question").forEach((box, n) => {
      box.querySelector("legend").textContent = `Question ${n + 1}`;
      box.querySelector("button").setAttribute("aria-label", `Remove question ${n + 1}`);
    });
  }

  async decide() {
    const asked = [...this.querySelectorAll(".question")].map((box) => box.read());
    const faulty = asked.findIndex(({ type, text, options }) => !text || (type !== "predicate" && options.length < 2));
    if (!asked.length) return this.say("Add a question first.", true);
    if (faulty >= 0) return this.say(`Question ${faulty + 1} needs a text${asked[faulty].text ? "'s answers, at least two" : ""}.`, true);
    const questions = asked.map(({ type, text, options }, n) => ({
      type,
      name: `q${n + 1}`,
      instructions: text,
      ...(type === "choice" && { choices: options.map((value) => ({ value })) }),
      ...(type === "score" && { levels: options.map((label) => ({ label })) }),
    }));
    this.work = new AbortController();
    this.find("decide").textContent = "Stop";
    this.say("Deciding …");
    try {
      const body = { model: this.model, input: this.find("context").value, questions };
      const answer = await (await call("/v1/decisions", { body, signal: this.work.signal })).json();
      this.find("answers").replaceChildren(...answer.answers.map((each, n) => this.bars(asked[n].text, each)));
      this.say("");
    } catch (error) {
      if (error.name === "AbortError") this.say("Stopped.");
      else if (error instanceof APIError) this.say(error.message, true);
      else throw error;
    } finally {
      this.work = null;
      this.find("decide").textContent = "Decide";
    }
  }

  bars(text, answer) {
    const box = make("div", { className: "answer" }, make("h3", {}, text));
    if (answer.type === "refusal") box.append(make("p", { className: "meta" }, "The model gave no answer."));
    const parts =
      answer.type === "predicate"
        ? [["yes", answer.probability], ["no", 1 - answer.probability]]
        : (answer.probabilities ?? []).map((each) => [String(each.label ?? each.value), each.probability]);
    const best = Math.max(...parts.map(([, probability]) => probability));
    const list = make("dl", { className: "bars" });
    for (const [name, probability] of parts) {
      const share = make("span");
      share.style.setProperty("--share", probability);
      const track = make("dd", { className: "track", "aria-hidden": "true" }, share);
      const figure = make("dd", {}, `${(100 * probability).toFixed(1)} %`);
      list.append(make("div", { className: probability === best ? "bar best" : "bar" }, make("dt", {}, name), track, figure));
    }
    box.append(list);
    if (answer.type === "score") box.append(make("p", { className: "meta" }, `score ${answer.score.toFixed(2)}`));
    return box;
  }
}

customElements.define("bp-decisions", Decisions);
