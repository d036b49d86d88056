// Elements, numbers and the theme. Text is only ever put in as text: nothing from the data becomes markup.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}
const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const known = (x) => x !== null && x !== undefined;
const percent = (x, digits = 1) => (known(x) ? `${(100 * x).toFixed(digits)}\u00a0%` : "undefined");
const decimal = (x, digits = 1) => (known(x) ? x.toFixed(digits) : "undefined");
const whole = (x) => x.toLocaleString("en-US");
const plural = (n, one, many = `${one}s`) => `${whole(n)} ${n === 1 ? one : many}`;
/** Writes [value, low, high] with its interval, each through `style`. */
const interval = ([value, low, high], style = percent) =>
  known(value) ? `${style(value)} [${bare(low, style)}, ${bare(high, style)}]` : "undefined";
const bare = (x, style) => (known(x) ? style(x).replace("\u00a0%", "") : "?");

/** Returns round numbers that span [low, high] with about `count` of them. */
function ticks(low, high, count) {
  const rough = Math.max(high - low, 1e-9) / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) found.push(i * step);
  return found;
}

/** A text whose formulas are drawn, where the page has them; each keeps its source as alternative text. */
function withMaths(text) {
  if (!data.maths) return [text];
  const parts = [];
  let at = 0;
  for (const { 0: written, index } of text.matchAll(new RegExp(data.maths.pattern, "g"))) {
    if (!Object.hasOwn(data.maths.drawn, written)) continue;
    parts.push(text.slice(at, index), formula(data.maths.drawn[written], written));
    at = index + written.length;
  }
  return [...parts, text.slice(at)];
}

function formula([tag, ...content], written) {
  const node = document.createElementNS("http://www.w3.org/1998/Math/MathML", tag === "boxed" ? "mrow" : tag);
  if (tag === "boxed") node.setAttribute("class", "boxed");
  if (written) node.setAttribute("alttext", written);
  if (written?.startsWith("\\[") || written?.startsWith("$$")) node.setAttribute("display", "block");
  node.append(...content.map((part) => (typeof part === "string" ? part : formula(part))));
  return node;
}

const tile = (label, value, note, kind = "") =>
  el("div", { class: "tile" }, el("dt", {}, label), el("dd", { class: kind }, value, el("small", {}, note)));

/** Keeps numbers and their unit on one line. */
const tidy = (text) => text.replaceAll(" %", "\u00a0%");

const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
/** The first of some items whose place is nearest to a value. */
const nearest = (items, place, value) =>
  items.reduce((best, each) => (Math.abs(place(each) - value) < Math.abs(place(best) - value) ? each : best));

/** Draws with the width of a box, now and whenever it changes; returns a function that draws once more. */
function onWidth(box, redraw) {
  let last = 0;
  const now = () => {
    const width = Math.floor(box.clientWidth);
    if (width && width !== last) {
      last = width;
      redraw(width);
    }
  };
  new ResizeObserver(now).observe(box);
  now();
  return () => last && redraw(last);
}

/** A table that becomes one card for each row where the screen is narrow; an interval goes below its value. */
function table(rows, attributes = {}) {
  const [head, ...body] = rows;
  return el("div", { class: "scroll" }, el(
    "table",
    attributes,
    el("thead", {}, el("tr", {}, head.map((cell) => el("th", { scope: "col" }, cell)))),
    el("tbody", {}, body.map((row) => el("tr", {}, row.map((text, i) => cell(text, head[i], i === 0))))),
  ));
}

function cell(text, label, first) {
  if (first) return el("th", { scope: "row" }, text);
  const [, value, rest = ""] = /^([^[]*)(\[[^]*)?$/.exec(text) || [null, text];
  const unbroken = rest.replace(/\[[^\]]*\]/, (inside) => inside.replaceAll(" ", "\u00a0"));
  return el("td", { "data-label": label || "" }, el("span", {}, value.trim()), rest && el("small", {}, unbroken));
}

const THEMES = { auto: "◐ system", light: "☀ light", dark: "☾ dark" };
function startTheme() {
  const button = byId("theme");
  const names = Object.keys(THEMES);
  let now = "auto";
  try {
    now = localStorage.getItem("trim-report-theme") || "auto";
  } catch {
    // Files opened from a disk may have no storage; the choice then lasts as long as the page.
  }
  const apply = () => {
    if (!(now in THEMES)) now = "auto";
    if (now === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = now;
    button.textContent = THEMES[now];
    button.setAttribute("aria-label", `Colours: ${now === "auto" ? "as the system" : now}; press to change`);
  };
  button.addEventListener("click", () => {
    now = names[(names.indexOf(now) + 1) % names.length];
    try {
      localStorage.setItem("trim-report-theme", now);
    } catch {
      // as above
    }
    apply();
  });
  apply();
}
