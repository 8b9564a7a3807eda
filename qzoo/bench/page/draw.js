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
  const values = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-9; v += step) values.push(+v.toPrecision(10));
  return values;
}

// Axes for accuracies against times, these logarithmic: the picture, and the places of values in it.
function axes(width, height, times, accuracies, caption) {
  const left = 44, right = 16, top = 10, bottom = 36;
  const [x0, x1] = [Math.log10(Math.min(...times)) - 0.08, Math.log10(Math.max(...times)) + 0.08];
  const [y0, y1] = [Math.min(...accuracies), Math.max(...accuracies)];
  const px = (v) => left + ((Math.log10(v) - x0) / (x1 - x0)) * (width - left - right);
  const py = (v) => height - bottom - ((v - y0) / (y1 - y0)) * (height - top - bottom);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img" });
  for (const v of ticks(y0, y1, 5)) {
    picture.append(line(left, py(v), width - right, py(v)), text(left - 4, py(v) + 4, +v.toFixed(2), { "text-anchor": "end", class: "soft" }));
  }
  for (let e = Math.floor(x0); e <= x1; e++)
    for (const m of [1, 2, 5]) {
      const v = m * 10 ** e;
      if (Math.log10(v) < x0 || Math.log10(v) > x1) continue;
      picture.append(line(px(v), top, px(v), height - bottom), text(px(v), height - 20, +v.toPrecision(3), { "text-anchor": "middle", class: "soft" }));
    }
  picture.append(text(width - right, height - 5, caption, { "text-anchor": "end", class: "soft" }));
  return { picture, px, py };
}

// What nothing else beats in both, the fastest first.
function front(items, time, accuracy) {
  const order = [...items].sort((a, b) => time(a) - time(b) || accuracy(b) - accuracy(a));
  return order.filter((item, i) => order.slice(0, i).every((other) => accuracy(other) < accuracy(item)));
}
const frontLine = (places, stroke) => svg("polyline", { class: "pareto", points: places.join(" "), fill: "none", stroke, "stroke-dasharray": "4 3" });

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
