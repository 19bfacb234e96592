// A recording of a canvas and the element that plays it. It imports nothing, so that an exported file can hold it whole.
//
//   frames --apply--> snapshots, one for each step; a snapshot is a cell for each position
//   cell   {token, piece, accepted, entropy (nats), changed}
//
// Invariant: what is shown is a function of the recording and of the step that the slider stands at.

const STEP = 420; // milliseconds of a step, at most
const WHOLE = 9000; // and of a whole recording, where its steps can be seen at all
const LEAST = 60;

export const reduced = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

export function make(name, properties = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in element && key !== "role") element[key] = value;
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

export class Recording {
  // `kind` is "text" or "sudoku"; `about` has model, seed, prompt and, of a sudoku, the puzzle.
  constructor(kind, about = {}) {
    Object.assign(this, { kind, about, frames: [], commits: [], snapshots: [], whole: false, text: "" });
  }

  start(event) {
    Object.assign(this.about, { model: event.model, seed: event.seed, most: event.steps });
  }

  add(frame) {
    const last = this.snapshots.at(-1);
    const before = last && last.frame.canvas === frame.canvas ? last.cells : [];
    const cells = before.map((cell) => (cell.changed ? { ...cell, changed: false } : cell));
    for (const [place, token, piece, accepted, entropy] of frame.cells) {
      const changed = frame.step > 1 && before[place] !== undefined && before[place].token !== token;
      cells[place] = { token, piece, accepted: accepted === 1, entropy: entropy / 1000, changed };
    }
    this.frames.push(frame);
    this.text += frame.text ?? "";
    this.snapshots.push({ frame, cells });
  }

  commit(event) {
    this.commits.push({ canvas: event.canvas, tokens: event.tokens.length, text: event.text ?? "" });
    this.text += event.text ?? "";
  }

  // How many positions of a canvas the answer has; all of them while it is not committed.
  kept(canvas) {
    return this.commits.find((commit) => commit.canvas === canvas)?.tokens ?? Infinity;
  }

  toJSON() {
    const { kind, about, frames, commits, text } = this;
    return { kind, about, frames, commits, text };
  }

  static from(saved) {
    const recording = new Recording(saved.kind, saved.about);
    saved.frames.forEach((frame) => recording.add(frame));
    return Object.assign(recording, { commits: saved.commits, text: saved.text, whole: true });
  }
}

export function stateOf(cell, frame) {
  if (frame.settled) return "settled";
  if (!cell.accepted) return "noise";
  return cell.changed ? "changed" : "accepted";
}

export const heatOf = (entropy) => Math.min(1, Math.sqrt(entropy / 2)).toFixed(3);

// How likely the tokens are, by the entropies of their distributions: 1 where there is no doubt at all.
export function sureness(cells) {
  const nats = cells.reduce((sum, cell) => sum + cell.entropy, 0) / Math.max(1, cells.length);
  return { nats, sure: Math.exp(-nats) };
}

// A token in a cell: line ends and spaces are shown as signs.
export function sign(piece) {
  const text = piece.replaceAll("\n", "↵").replaceAll("\t", "⇥");
  return text.trim() === "" ? "␣" : text.trim();
}

// A sudoku's 81 inputs, row by row, in a grid of three by three boxes.
export function buildBoard(readOnly) {
  const board = make("div", { className: "board", role: "grid", "aria-label": "Sudoku" });
  const inputs = [];
  for (let row = 0; row < 9; row++) {
    const line = make("div", { className: "row", role: "row" });
    for (let column = 0; column < 9; column++) {
      const label = `Row ${row + 1}, column ${column + 1}`;
      const input = make("input", { type: "text", inputMode: "numeric", maxLength: 1, "aria-label": label, readOnly });
      Object.assign(input, { autocomplete: "off", tabIndex: inputs.length ? -1 : 0 });
      inputs.push(input);
      line.append(make("div", { className: "cell", role: "gridcell" }, input));
    }
    board.append(line);
  }
  return { board, inputs };
}

export const UNITS = [
  ...Array.from({ length: 9 }, (_, r) => [`Row ${r + 1}`, Array.from({ length: 9 }, (_, k) => 9 * r + k)]),
  ...Array.from({ length: 9 }, (_, c) => [`Column ${c + 1}`, Array.from({ length: 9 }, (_, k) => 9 * k + c)]),
  ...Array.from({ length: 9 }, (_, b) => [
    `Box ${b + 1}`,
    Array.from({ length: 9 }, (_, k) => 27 * Math.floor(b / 3) + 3 * (b % 3) + 9 * Math.floor(k / 3) + (k % 3)),
  ]),
];

// Cells whose digit stands twice in a row, column or box, and the first such place in words.
export function conflicts(digits) {
  const cells = new Set();
  let where = "";
  for (const [name, unit] of UNITS) {
    for (const cell of unit) {
      if (digits[cell] !== "" && unit.some((other) => other !== cell && digits[other] === digits[cell])) {
        cells.add(cell);
        where ||= `${name} has the digit ${digits[cell]} twice.`;
      }
    }
  }
  return { cells, where };
}

// Shows a snapshot on a board. A cell of the canvas is every position but the line ends.
export function paintBoard(inputs, puzzle, snapshot, last) {
  const digits = inputs.map((_, n) => {
    const piece = snapshot.cells[n + Math.floor(n / 9)]?.piece ?? "";
    return /^[1-9]$/.test(piece) ? piece : "";
  });
  const wrong = last ? conflicts(digits).cells : new Set();
  inputs.forEach((input, n) => {
    const cell = snapshot.cells[n + Math.floor(n / 9)];
    const state = cell ? stateOf(cell, snapshot.frame) : "noise";
    const broken = last && (wrong.has(n) || digits[n] === "" || (puzzle[n] !== "0" && puzzle[n] !== digits[n]));
    input.value = digits[n] || "·";
    input.parentElement.dataset.state = broken ? "conflict" : state;
    input.parentElement.classList.toggle("given", puzzle[n] !== "0");
    input.parentElement.style.setProperty("--heat", cell ? heatOf(cell.entropy) : 1);
  });
  return { solved: last && ![...inputs].some((input) => input.parentElement.dataset.state === "conflict") };
}

export class Player extends HTMLElement {
  #timer = 0;
  #cells = [];

  connectedCallback() {
    if (this.childElementCount) return;
    this.screen = make("div", { className: "screen", tabIndex: 0, role: "img", "aria-label": "Canvas, empty" });
    this.play = make("button", { type: "button", className: "icon", "aria-label": "Play", disabled: true });
    this.slider = make("input", { type: "range", min: 0, max: 0, value: 0, disabled: true, "aria-label": "Step" });
    this.label = make("output", { className: "step" }, "no steps yet");
    this.heat = make("input", { type: "checkbox", checked: true });
    const heat = make("label", { className: "check" }, this.heat, "Heat");
    this.save = make("button", { type: "button", className: "quiet", disabled: true }, "Export");
    const names = ["noise", "accepted", "changed", "settled"];
    const sample = (name) => make("span", { className: "key", "data-state": name }, name);
    this.legend = make("p", { className: "legend", "aria-label": "Legend" }, ...names.map(sample));
    const bar = make("div", { className: "controls" }, this.play, this.slider, this.label);
    this.append(this.screen, bar, make("div", { className: "foot" }, this.legend, heat, this.save));
    this.play.append(make("span", { className: "glyph" }));
    this.play.addEventListener("click", () => (this.playing ? this.stop() : this.begin()));
    this.slider.addEventListener("input", () => (this.stop(), this.show(Number(this.slider.value))));
    this.heat.addEventListener("change", () => this.toggleAttribute("cold", !this.heat.checked));
    this.save.addEventListener("click", () => this.dispatchEvent(new CustomEvent("export")));
    this.recording = null;
    this.at = -1;
  }

  // A sudoku is shown on a board of its own; the text's canvas is drawn here.
  useBoard(inputs) {
    this.inputs = inputs;
    this.screen.hidden = true;
  }

  // A canvas of that many tokens, of which none is written.
  blank(length) {
    this.#draw(Array.from({ length }));
  }

  open(recording) {
    this.stop();
    this.recording = recording;
    this.at = -1;
    this.update();
    if (recording.whole) this.show(recording.snapshots.length - 1);
    else if (!this.inputs) this.#draw([]);
    if (!recording.whole) this.begin();
  }

  get playing() {
    return this.#timer !== 0;
  }

  begin() {
    const count = this.recording.snapshots.length;
    if (this.recording.whole && this.at >= count - 1) this.at = -1;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#next(), this.at < 0 ? 0 : this.#pause());
    this.#face();
  }

  stop() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    this.#face();
  }

  #pause() {
    const left = this.recording.snapshots.length;
    return Math.max(LEAST, Math.min(STEP, WHOLE / Math.max(1, left)));
  }

  #next() {
    const { snapshots, whole } = this.recording;
    const next = reduced() ? this.#finished() : this.at + 1;
    const ahead = next > this.at && next < snapshots.length;
    if (ahead) this.show(next);
    if (whole && this.at >= snapshots.length - 1) {
      this.stop();
      this.show(this.at); // as the last one, which it may not have been known to be
      this.dispatchEvent(new CustomEvent("end"));
      return;
    }
    this.#timer = setTimeout(() => this.#next(), ahead ? this.#pause() : 30);
  }

  // The last step of the last finished canvas: all that is shown by itself where motion is reduced.
  #finished() {
    const { snapshots, whole } = this.recording;
    if (whole) return snapshots.length - 1;
    return snapshots.findLastIndex(({ frame }) => this.recording.kept(frame.canvas) < Infinity);
  }

  #face() {
    this.play.classList.toggle("pause", this.playing);
    this.play.setAttribute("aria-label", this.playing ? "Pause" : "Play");
  }

  // After the recording has grown.
  update() {
    const { snapshots, whole } = this.recording;
    this.slider.max = Math.max(0, snapshots.length - 1);
    this.slider.disabled = this.play.disabled = snapshots.length === 0;
    this.save.disabled = !whole || snapshots.length === 0;
    if (this.at < 0) this.label.textContent = snapshots.length ? `${snapshots.length} steps` : "no steps yet";
  }

  show(number) {
    const snapshot = this.recording.snapshots[number];
    if (!snapshot) return;
    this.at = number;
    this.slider.value = number;
    const { frame, cells } = snapshot;
    const again = frame.retry || frame.verifications ? ", again" : "";
    const canvas = this.inputs ? "" : `canvas ${frame.canvas + 1}, `;
    this.label.textContent = `${canvas}step ${frame.step}${again}`;
    this.slider.setAttribute("aria-valuetext", this.label.textContent);
    const last = this.recording.whole && number === this.recording.snapshots.length - 1;
    if (this.inputs) this.solved = paintBoard(this.inputs, this.recording.about.puzzle, snapshot, last).solved;
    else this.#draw(cells, frame);
    this.dispatchEvent(new CustomEvent("frame", { detail: { ...snapshot, last } }));
  }

  #draw(cells, frame) {
    while (this.#cells.length < cells.length) {
      this.#cells.push(this.screen.appendChild(make("span", { className: "token" })));
    }
    const kept = frame ? this.recording.kept(frame.canvas) : Infinity;
    this.#cells.forEach((span, place) => {
      const cell = cells[place];
      span.textContent = cell ? sign(cell.piece) : "";
      span.dataset.state = cell ? stateOf(cell, frame) : "empty";
      span.classList.toggle("past", place >= kept);
      span.style.setProperty("--heat", cell ? heatOf(cell.entropy) : 0);
    });
    const accepted = frame?.settled ? cells.length : cells.filter((cell) => cell?.accepted).length;
    const label = frame ? `${this.label.textContent}: ${accepted} of ${cells.length} tokens accepted` : "empty";
    this.screen.setAttribute("aria-label", `Canvas, ${label}`);
  }
}

if (!customElements.get("bp-player")) customElements.define("bp-player", Player);

// In an exported file: the recording stands in the file, and plays.
const saved = document.querySelector("script[type='application/json'][data-recording]");
if (saved) {
  const recording = Recording.from(JSON.parse(saved.textContent));
  const player = document.querySelector("bp-player");
  if (recording.kind === "sudoku") {
    const { board, inputs } = buildBoard(true);
    player.before(board);
    player.useBoard(inputs);
  }
  player.open(recording);
  if (!reduced()) player.begin();
}
