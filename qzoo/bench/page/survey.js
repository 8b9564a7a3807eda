// Draws the survey that the page carries, with draw.js.
const models = report.models.filter((m) => m.int8 !== null).sort((a, b) => a.int8.wall_ms - b.int8.wall_ms);
const failed = report.models.filter((m) => m.error);
const colours = { float32: "var(--float)", int8: "var(--int8)" };

// The models that no other one beats in both, the fastest first.
function front(list, precision) {
  const order = [...list].sort((a, b) => a[precision].wall_ms - b[precision].wall_ms || b.top1 - a.top1);
  return order.filter((m, i) => order.slice(0, i).every((other) => other.top1 < m.top1));
}

function picture(list, width) {
  const height = Math.max(300, Math.min(620, width * 0.62)), left = 44, right = 16, top = 12, bottom = 40;
  const xs = list.flatMap((m) => [m.float32.wall_ms, m.int8.wall_ms]), ys = list.map((m) => m.top1);
  const [x0, x1] = [Math.log10(Math.min(...xs)) - 0.08, Math.log10(Math.max(...xs)) + 0.08];
  const [y0, y1] = [Math.min(...ys) - 0.5, Math.max(...ys) + 0.5];
  const px = (v) => left + ((Math.log10(v) - x0) / (x1 - x0)) * (width - left - right);
  const py = (v) => height - bottom - ((v - y0) / (y1 - y0)) * (height - top - bottom);
  const drawn = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img" });
  for (const v of ticks(y0, y1, 6)) {
    drawn.append(line(left, py(v), width - right, py(v)), text(left - 4, py(v) + 4, +v.toFixed(2), { "text-anchor": "end", class: "soft" }));
  }
  for (let e = Math.floor(x0); e <= x1; e++)
    for (const m of [1, 2, 5]) {
      const v = m * 10 ** e;
      if (Math.log10(v) < x0 || Math.log10(v) > x1) continue;
      drawn.append(line(px(v), top, px(v), height - bottom), text(px(v), height - 22, +v.toPrecision(3), { "text-anchor": "middle", class: "soft" }));
    }
  drawn.append(text(width - right, height - 5, "ms a call, batch 1 (logarithmic)", { "text-anchor": "end", class: "soft" }));
  for (const m of list) {
    drawn.append(line(px(m.float32.wall_ms), py(m.top1), px(m.int8.wall_ms), py(m.top1), { class: "joined", opacity: 0.8 }));
  }
  for (const precision of ["float32", "int8"]) {
    const best = front(list, precision);
    const path = best.map((m) => `${px(m[precision].wall_ms)},${py(m.top1)}`).join(" ");
    drawn.append(svg("polyline", { class: "pareto", points: path, fill: "none", stroke: colours[precision], "stroke-dasharray": "4 3" }));
    for (const m of list) {
      const dot = svg("circle", { class: "point", cx: px(m[precision].wall_ms), cy: py(m.top1), r: 4, fill: colours[precision] });
      dot.append(tip(`${m.model}: ${precision === "int8" ? "int8" : "float"} ${digits(m[precision].wall_ms)} ms, float ${m.top1.toFixed(2)} %, ${m.speedup[0].toFixed(2)} × as fast in int8`));
      drawn.append(dot);
    }
    if (precision === "int8") {
      for (const m of best) drawn.append(text(px(m.int8.wall_ms) - 6, py(m.top1) - 5, m.model, { "text-anchor": px(m.int8.wall_ms) < 120 ? "start" : "end" }));
    }
  }
  return drawn;
}

function modelsTable() {
  const best = new Set(front(models.filter((m) => m.top1 !== null), "int8").map((m) => m.model));
  const head = ["architecture", "float top-1 %", "image", "parameters, M", "float ms", "int8 ms", "× float [95 %]", "float MB", "int8 MB", "peak MB, int8"];
  const mega = (v) => (v === null ? "" : digits(v / 1e6));
  return table(head, models.map((m) => [
    m.model + (best.has(m.model) ? " *" : ""), m.top1 === null ? "" : m.top1.toFixed(2), String(m.size[1]), (m.parameters / 1e6).toFixed(1),
    digits(m.float32.wall_ms), digits(m.int8.wall_ms), `${m.speedup[0].toFixed(2)} [${m.speedup[1].toFixed(2)}, ${m.speedup[2].toFixed(2)}]`,
    mega(m.float32.file_bytes), mega(m.int8.file_bytes), mega(m.int8.peak_rss_bytes),
  ]), { class: "rows" });
}

function start() {
  const machine = report.machine, options = report.options;
  const known = models.filter((m) => m.top1 !== null);
  const families = [...new Set(known.map((m) => m.family))].sort();
  const select = el("select", { "aria-label": "family" }, el("option", { value: "" }, `all ${known.length} architectures`), ...families.map((f) => el("option", { value: f }, f)));
  const chosen = () => (select.value ? known.filter((m) => m.family === select.value) : known);
  const card = chart("Accuracy against latency", "Top-1 of the float weights, as published: that of int8 is not measured here. Grey: float; blue: int8, joined to its float by a line; dashed: the Pareto fronts.", (width) => picture(chosen(), width));
  select.addEventListener("change", redraw);
  card.insertBefore(select, card.lastChild);
  document.getElementById("main").append(
    el("h1", {}, "Survey"),
    el("p", {}, `${machine.processor}, ${options.runtime}, ${options.threads === 1 ? "1 thread" : options.threads + " threads"}, ${report.date}`),
    ...report.notes.map((n) => el("p", { class: "soft" }, n)),
    ...(known.length ? [card] : []),
    modelsTable(),
    el("h2", {}, "Machine and versions"),
    table(["what", "value"], Object.entries(machine), { class: "machine" }),
  );
  show(`${models.length} architectures, ${failed.length} failed`);
}
start();
