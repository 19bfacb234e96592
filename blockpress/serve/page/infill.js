// A text with a hole, which is filled in place; the change is shown between what stands before and after it.
import { APIError, call } from "./api.js";
import { make } from "./player.js";

const HOLE = "<hole>";
const EXAMPLE = `def area(width, height):\n    """${HOLE}"""\n    return width * height\n`;
const AROUND = 600; // characters of context that are shown

class Infill extends HTMLElement {
  opened(props) {
    this.find = (name) => this.querySelector(`#infill-${name}`);
    this.text = this.find("text");
    this.text.value = EXAMPLE;
    Object.assign(this, { model: props.model_alias, before: null, work: null });
    this.find("fill").addEventListener("click", () => (this.work ? this.work.abort() : this.fill()));
    this.find("mark").addEventListener("click", () => {
      this.text.focus();
      this.text.setRangeText(HOLE, this.text.selectionStart, this.text.selectionEnd, "end");
    });
    this.find("undo").addEventListener("click", () => this.undo());
    this.text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.fill();
    });
  }

  say(text, bad = false) {
    const status = this.find("status");
    status.textContent = text;
    status.classList.toggle("bad", bad);
  }

  // Where the hole is: the selection, or else the first mark.
  hole() {
    const { selectionStart: start, selectionEnd: end, value } = this.text;
    if (start < end) return [start, end];
    const mark = value.indexOf(HOLE);
    return mark < 0 ? null : [mark, mark + HOLE.length];
  }

  async fill() {
    if (this.work) return;
    const hole = this.hole();
    if (!hole) return this.say(`Select something, or put ${HOLE} where text is missing.`, true);
    const whole = this.text.value;
    const [prompt, old, suffix] = [whole.slice(0, hole[0]), whole.slice(...hole), whole.slice(hole[1])];
    const number = (name) => (this.find(name).value === "" ? undefined : Number(this.find(name).value));
    const body = { model: this.model, prompt, suffix, max_tokens: number("most"), seed: number("seed") };
    this.work = new AbortController();
    this.text.readOnly = true;
    this.find("fill").textContent = "Stop";
    this.say("Writing …");
    try {
      const answer = await (await call("/v1/fim/completions", { body, signal: this.work.signal })).json();
      const choice = answer.choices[0];
      this.insert(whole, hole, old, choice.message?.content ?? choice.text ?? "");
      this.say(choice.finish_reason === "length" ? "Filled up to the most tokens." : "Filled.");
    } catch (error) {
      if (error.name === "AbortError") this.say("Stopped.");
      else if (error instanceof APIError) this.say(error.message, true);
      else throw error;
    } finally {
      this.work = null;
      this.text.readOnly = false;
      this.find("fill").textContent = "Fill";
    }
  }

  insert(whole, [start, end], old, written) {
    this.before = { whole, start, end };
    this.text.value = whole.slice(0, start) + written + whole.slice(end);
    this.text.focus();
    this.text.setSelectionRange(start, start + written.length);
    this.find("undo").disabled = false;
    const shown = old === HOLE ? [] : [make("del", {}, old)];
    const left = whole.slice(Math.max(0, start - AROUND), start);
    const right = whole.slice(end, end + AROUND);
    this.find("preview").replaceChildren(left, ...shown, make("ins", {}, written || "(nothing)"), right);
  }

  undo() {
    const { whole, start, end } = this.before;
    this.text.value = whole;
    this.text.focus();
    this.text.setSelectionRange(start, end);
    this.find("undo").disabled = true;
    this.say("Undone.");
  }
}

customElements.define("bp-infill", Infill);
