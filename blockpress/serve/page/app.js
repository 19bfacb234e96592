// The page: which views there are for the served model, which of them is shown, the theme, and the key.
import { APIError, call, onKeyNeeded } from "./api.js";
import "./sudoku.js";
import "./chat.js";
import "./infill.js";
import "./decisions.js";
import "./figures.js";

const VIEWS = ["sudoku", "chat", "infill", "decisions", "figures"];
const $ = (id) => document.getElementById(id);

// What the model can do, by what the server says of it.
function offered(props) {
  const has = (path) => props.routes.includes(path);
  const canvas = props.canvas_length !== null;
  const text = canvas && !props.sudoku;
  return VIEWS.filter(
    (name) =>
      ({
        sudoku: props.sudoku,
        chat: canvas && has("/v1/canvas"),
        infill: text && has("/v1/fim/completions"),
        decisions: text && has("/v1/decisions"),
        figures: true,
      })[name],
  );
}

function show(views) {
  const asked = location.hash.slice(1);
  const name = views.includes(asked) ? asked : views[0];
  for (const each of VIEWS) {
    const view = $(`view-${each}`);
    if (view.hidden !== (each !== name)) view.hidden = each !== name;
    if (each !== name) view.left?.();
    const link = document.querySelector(`nav a[href="#${each}"]`);
    link.hidden = !views.includes(each);
    if (each === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${name[0].toUpperCase()}${name.slice(1)} · blockpress`;
  $(`view-${name}`).entered?.();
}

function themes() {
  const button = $("theme");
  const names = { "": "Auto", light: "Light", dark: "Dark" };
  const face = () => {
    const theme = document.documentElement.dataset.theme ?? "";
    button.textContent = names[theme];
    button.setAttribute("aria-label", `Theme: ${theme ? names[theme] : "Auto"}`);
  };
  button.addEventListener("click", () => {
    const order = Object.keys(names);
    const next = order[(order.indexOf(document.documentElement.dataset.theme ?? "") + 1) % order.length];
    if (next) document.documentElement.dataset.theme = next;
    else delete document.documentElement.dataset.theme;
    if (next) localStorage.setItem("blockpress.theme", next);
    else localStorage.removeItem("blockpress.theme");
    face();
  });
  face();
}

// Asks for the key; several calls that need it wait for one answer.
let asking = null;
function askKey(wrong) {
  const dialog = $("key");
  asking ??= new Promise((resolve) => {
    $("key-why").textContent = wrong
      ? "That key is not the server's. Try another one."
      : "This server asks for a key. It is kept in this tab until you close it.";
    $("key-value").value = "";
    dialog.returnValue = "";
    $("key-cancel").onclick = () => dialog.close("");
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "ok" ? $("key-value").value : null), { once: true });
    dialog.showModal();
  }).finally(() => (asking = null));
  return asking;
}

async function start() {
  themes();
  onKeyNeeded(askKey);
  try {
    const props = await (await call("/props")).json();
    const views = offered(props);
    $("model").textContent = $("model").title = props.model_alias;
    for (const name of views) $(`view-${name}`).opened?.(props);
    $("view-wait").hidden = true;
    addEventListener("hashchange", () => show(views));
    show(views);
  } catch (error) {
    if (!(error instanceof APIError)) throw error;
    $("wait").textContent = `${error.message} Reload the page to try again.`;
  }
}

start();
