// A sudoku to fill in by hand, and to watch being solved.
import { APIError, call, exportFile, record } from "./api.js";
import { buildBoard, conflicts, Recording, reduced, sureness } from "./player.js";

const MOVES = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
const LOOK = 900; // milliseconds in which a new puzzle can be seen before it is solved

class Sudoku extends HTMLElement {
  opened() {
    this.find = (name) => this.querySelector(`#sudoku-${name}`);
    this.player = this.querySelector("bp-player");
    const { board, inputs } = buildBoard(false);
    Object.assign(this, { board, inputs, puzzle: Array(81).fill(""), shown: false, work: null });
    this.querySelector(".boardplace").append(board);
    this.player.useBoard(inputs);
    this.player.addEventListener("frame", (event) => this.follow(event.detail));
    this.player.addEventListener("end", () => this.ended());
    this.player.addEventListener("export", () => exportFile(this.player.recording));
    this.player.heat.addEventListener("change", () => board.classList.toggle("cold", !this.player.heat.checked));
    board.addEventListener("keydown", (event) => this.key(event));
    board.addEventListener("input", (event) => this.typed(event));
    board.addEventListener("focusin", (event) => this.focused(event.target));
    board.addEventListener("paste", (event) => this.pasted(event));
    this.find("solve").addEventListener("click", () => (this.work ? this.stop() : this.solve()));
    this.find("new").addEventListener("click", () => this.draw());
    this.find("clear").addEventListener("click", () => this.load(Array(81).fill("")));
    this.load(this.puzzle);
  }

  // The first time it is seen, a puzzle comes and is solved, unless somebody has begun to do something else.
  async entered() {
    if (this.seen) return;
    this.seen = true;
    if (!(await this.draw())) return;
    const before = this.puzzle.join();
    if (!reduced()) await new Promise((resolve) => setTimeout(resolve, LOOK));
    if (!this.work && !this.hidden && this.puzzle.join() === before) this.solve();
  }

  say(text, bad = false) {
    const status = this.find("status");
    status.textContent = text;
    status.classList.toggle("bad", bad);
  }

  async draw() {
    this.stop();
    try {
      const puzzle = await (await call(`/v1/sudoku?givens=${this.find("givens-choice").value}`)).json();
      this.load([...puzzle.puzzle].map((digit) => (digit === "0" ? "" : digit)));
      return true;
    } catch (error) {
      this.fail(error);
      return false;
    }
  }

  load(digits) {
    this.stop();
    this.puzzle = [...digits];
    this.reset();
  }

  // The puzzle as it was given, without what the model wrote.
  reset() {
    this.player.stop();
    this.shown = false;
    const wrong = conflicts(this.puzzle);
    this.inputs.forEach((input, n) => {
      input.value = this.puzzle[n];
      input.parentElement.classList.toggle("given", this.puzzle[n] !== "");
      input.parentElement.style.setProperty("--heat", 0);
      input.parentElement.dataset.state = wrong.cells.has(n) ? "conflict" : "";
      input.setAttribute("aria-invalid", wrong.cells.has(n));
    });
    const givens = this.puzzle.filter(Boolean).length;
    this.find("givens").textContent = `${givens} given${givens === 1 ? "" : "s"}`;
    this.find("sure").textContent = "–";
    this.find("nats").textContent = "";
    this.line([]);
    this.say(wrong.where, wrong.cells.size > 0);
    return wrong;
  }

  put(n, digit) {
    if (this.work) this.stop();
    this.puzzle[n] = digit;
    this.seen = true;
    this.reset();
  }

  focused(input) {
    this.inputs.forEach((each) => (each.tabIndex = each === input ? 0 : -1));
    input.select();
  }

  key(event) {
    const n = this.inputs.indexOf(event.target);
    const row = Math.floor(n / 9);
    const column = n % 9;
    const to = (r, c) => this.inputs[9 * ((r + 9) % 9) + ((c + 9) % 9)].focus();
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (MOVES[event.key]) to(row + MOVES[event.key][0], column + MOVES[event.key][1]);
    else if (event.key === "Home") to(row, 0);
    else if (event.key === "End") to(row, 8);
    else if (["Delete", "Backspace", "0", " ", "."].includes(event.key)) this.put(n, "");
    else if (/^[1-9]$/.test(event.key)) this.put(n, event.key);
    else if (event.key === "Enter") this.solve();
    else if (event.key.length > 1) return;
    event.preventDefault();
  }

  // What comes without a key, as from a phone's keyboard.
  typed(event) {
    const n = this.inputs.indexOf(event.target);
    const digit = event.target.value.replace(/[^1-9]/g, "").slice(-1);
    this.put(n, digit);
    event.target.select();
  }

  pasted(event) {
    const digits = event.clipboardData.getData("text").replace(/[^\d.]/g, "");
    event.preventDefault();
    if (digits.length === 81) this.load([...digits].map((digit) => (/[1-9]/.test(digit) ? digit : "")));
    else if (/^[1-9]$/.test(digits)) this.put(this.inputs.indexOf(event.target), digits);
    else this.say("A puzzle has 81 cells; 0 or . is a blank.", true);
  }

  stop() {
    this.work?.abort();
    this.work = null;
    this.player.stop();
    this.find("solve").textContent = "Solve";
  }

  async solve() {
    this.stop();
    const wrong = this.reset();
    if (wrong.cells.size) return;
    const work = (this.work = new AbortController());
    this.find("solve").textContent = "Stop";
    this.say("Solving …");
    const puzzle = this.puzzle.map((digit) => digit || "0").join("");
    const prompt = puzzle.match(/.{9}/g).join("\n");
    const recording = new Recording("sudoku", { puzzle, prompt });
    this.trace = [];
    const body = { prompt, diffusion: { release: 0 }, seed: Math.max(0, Math.trunc(Number(this.find("seed").value) || 0)) };
    try {
      await record(body, recording, this.player, {}, work.signal);
    } catch (error) {
      if (this.work === work) this.fail(error);
    }
  }

  // A step is shown, by playing or by the slider.
  follow({ frame, cells, last }) {
    this.shown = true;
    const { nats, sure } = sureness(cells);
    this.find("sure").textContent = `${(100 * sure).toFixed(1)} %`;
    this.find("nats").textContent = `${nats.toFixed(4)} nats a token`;
    this.line(this.player.recording.snapshots.slice(0, this.player.at + 1).map((each) => sureness(each.cells).sure));
    if (last) this.say(this.outcome(frame), !this.player.solved);
    else if (!this.player.playing) this.say(`Step ${frame.step}`);
  }

  outcome(frame) {
    const steps = `${frame.step} step${frame.step === 1 ? "" : "s"}`;
    if (this.player.solved) return `Solved in ${steps}.`;
    const wrong = this.inputs.filter((input) => input.parentElement.dataset.state === "conflict").length;
    return `Not solved in ${steps}: ${wrong} cell${wrong === 1 ? " is" : "s are"} wrong.`;
  }

  ended() {
    this.work = null;
    this.find("solve").textContent = "Solve";
  }

  // How sure after each step so far, from the least of them to 1.
  line(values) {
    const least = Math.min(...values, 0.99);
    const height = (value) => 54 - (52 * (value - least)) / (1 - least);
    const at = (value, n) => `${((300 * n) / Math.max(1, values.length - 1)).toFixed(1)},${height(value).toFixed(1)}`;
    const path = values.length > 1 ? `M${values.map(at).join("L")}` : "";
    this.querySelector(".trace path").setAttribute("d", path);
  }

  fail(error) {
    this.stop();
    if (error.name === "AbortError") this.say("Stopped.");
    else if (error instanceof APIError) this.say(error.message, true);
    else throw error;
  }
}

customElements.define("bp-sudoku", Sudoku);
