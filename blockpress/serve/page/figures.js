// What the server counts, read from /metrics every two seconds while the view is open.
import { APIError, call } from "./api.js";
import { make } from "./player.js";

const EVERY = 2000;
const KEPT = 60;

// The sum of each metric over its labels; of a share the mean, as several replicas have one each.
export function parse(text) {
  const sums = {};
  const lines = {};
  for (const line of text.split("\n")) {
    const found = /^([a-zA-Z_:][\w:]*)(?:\{[^}]*\})? (\S+)/.exec(line);
    if (!found || found[1].endsWith("_bucket")) continue;
    sums[found[1]] = (sums[found[1]] ?? 0) + Number(found[2]);
    lines[found[1]] = (lines[found[1]] ?? 0) + 1;
  }
  for (const name of Object.keys(sums)) if (name.endsWith("_perc")) sums[name] /= lines[name];
  return sums;
}

const whole = (value) => (value ?? 0).toLocaleString("en", { maximumFractionDigits: 0 });
const mean = (sums, name) => (sums[`${name}_count`] ? sums[`${name}_sum`] / sums[`${name}_count`] : null);
const seconds = (value) => (value === null ? "–" : value < 1 ? `${Math.round(1000 * value)} ms` : `${value.toFixed(2)} s`);
const ratio = (top, under) => (under ? (top / under).toFixed(1) : "–");

const CARDS = [
  ["Answers finished", (s) => whole(s["vllm:request_success_total"])],
  ["Running now", (s) => whole(s["vllm:num_requests_running"])],
  ["Waiting", (s) => whole(s["vllm:num_requests_waiting"])],
  ["Prompt tokens", (s) => whole(s["vllm:prompt_tokens_total"])],
  ["Tokens written", (s) => whole(s["vllm:generation_tokens_total"])],
  ["Denoising steps", (s) => whole(s["vllm:diffusion_num_denoising_steps_total"])],
  ["Tokens a step", (s) => ratio(s["vllm:generation_tokens_total"], s["vllm:diffusion_num_denoising_steps_total"])],
  ["First text, mean", (s) => seconds(mean(s, "vllm:time_to_first_token_seconds"))],
  ["Whole answer, mean", (s) => seconds(mean(s, "vllm:e2e_request_latency_seconds"))],
  ["KV cache in use", (s) => `${(100 * (s["vllm:kv_cache_usage_perc"] ?? 0)).toFixed(1)} %`],
];

class Figures extends HTMLElement {
  opened(props) {
    this.find = (name) => this.querySelector(`#figures-${name}`);
    Object.assign(this, { timer: 0, rates: [], before: null });
    this.values = CARDS.map(([name]) => {
      const value = make("dd", {}, "–");
      this.find("cards").append(make("div", {}, make("dt", {}, name), value));
      return value;
    });
    const settings = props.default_generation_settings;
    const facts = {
      Model: props.model_alias,
      Context: `${whole(settings.n_ctx)} tokens`,
      Canvas: props.canvas_length === null ? "none" : `${whole(props.canvas_length)} tokens, at most ${settings.steps} steps`,
      Modes: props.modes.join(", "),
      "Requests at once": whole(props.total_slots),
      Version: props.build_info,
    };
    for (const [name, value] of Object.entries(facts)) this.find("facts").append(make("dt", {}, name), make("dd", {}, value));
  }

  entered() {
    if (!this.timer) this.refresh();
  }

  left() {
    clearTimeout(this.timer);
    this.timer = 0;
  }

  async refresh() {
    this.timer = setTimeout(() => this.refresh(), EVERY);
    try {
      const sums = parse(await (await call("/metrics")).text());
      CARDS.forEach(([, read], n) => (this.values[n].textContent = read(sums)));
      const now = { at: performance.now(), tokens: sums["vllm:generation_tokens_total"] ?? 0 };
      if (this.before) this.rates.push((1000 * (now.tokens - this.before.tokens)) / (now.at - this.before.at));
      this.rates = this.rates.slice(-KEPT);
      this.before = now;
      this.line();
      this.find("age").textContent = `at ${new Date().toLocaleTimeString()}`;
    } catch (error) {
      if (!(error instanceof APIError)) throw error;
      this.find("age").textContent = error.message;
    }
  }

  line() {
    const top = Math.max(1, ...this.rates);
    const first = KEPT - this.rates.length;
    const at = (rate, n) => `${((600 * (first + n)) / (KEPT - 1)).toFixed(1)},${(118 - (114 * rate) / top).toFixed(1)}`;
    const path = this.rates.length > 1 ? `M${this.rates.map(at).join("L")}` : "";
    this.querySelector(".trace path").setAttribute("d", path);
    this.find("rate").textContent = `now ${whole(this.rates.at(-1))}, at most ${whole(Math.max(0, ...this.rates))}`;
  }
}

customElements.define("bp-figures", Figures);
