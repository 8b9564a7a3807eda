"use strict";
// What the pages draw with. No library: elements, SVG, and a scale or two.
const statusLine = document.getElementById("status");
window.addEventListener("error", (event) => {
  statusLine.dataset.state = "error";
  statusLine.textContent = "Script error: " + event.message;
});
const report = JSON.parse(document.getElementById("data").textContent);
const drawings = []; // functions that draw for a width: called again when it changes

function make(space, tag, attributes, children) {
  const node = space ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
const el = (tag, attributes, ...children) => make(null, tag, attributes, children);
const svg = (tag, attributes, ...children) => make("http://www.w3.org/2000/svg", tag, attributes, children);
const text = (x, y, value, attributes) => svg("text", { x, y, ...attributes }, String(value));
const line = (x1, y1, x2, y2, attributes) => svg("line", { x1, y1, x2, y2, stroke: "var(--line)", ...attributes });
const digits = (v) => (v === null ? "" : v >= 100 ? v.toFixed(0) : v >= 10 ? v.toFixed(1) : v.toFixed(2));
const tip = (value) => svg("title", {}, value);

function chart(title, note, draw, options) {
  const box = el("div", { class: options && options.scroll ? "scroll" : "" });
  drawings.push(() => box.replaceChildren(draw(Math.max(box.clientWidth, 200))));
  return el("section", { class: "card chart" }, el("h3", {}, title), el("p", { class: "soft" }, note), box);
}

function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-9; v += step) found.push(+v.toPrecision(10));
  return found;
}

function table(head, lines, attributes) {
  const rowOf = (cells, tag) => el("tr", {}, ...cells.map((cell) => el(tag, {}, cell)));
  return el("div", { class: "wide" }, el("table", attributes, el("thead", {}, rowOf(head, "th")), el("tbody", {}, ...lines.map((cells) => rowOf(cells, "td")))));
}

function redraw() {
  for (const draw of drawings) draw();
}

// Draws for the first time and whenever the width changes; `words` say what there is.
function show(words) {
  redraw();
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth !== width) redraw();
    width = window.innerWidth;
  });
  statusLine.dataset.state = "ready";
  statusLine.textContent = words;
}
