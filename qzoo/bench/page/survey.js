// Draws the survey that the page carries, with draw.js.
const models = report.models.filter((m) => m.int8 !== null).sort((a, b) => a.int8.wall_ms - b.int8.wall_ms);
const failed = report.models.filter((m) => m.error);
const colours = { float32: "var(--float)", int8: "var(--int8)" };

const best = (list, precision) => front(list, (m) => m[precision].wall_ms, (m) => m.top1);

function draw(list, width) {
  const height = Math.max(300, Math.min(620, width * 0.62));
  const xs = list.flatMap((m) => [m.float32.wall_ms, m.int8.wall_ms]), ys = list.flatMap((m) => [m.top1 - 0.5, m.top1 + 0.5]);
  const { picture, px, py } = axes(width, height, xs, ys, "ms a call, batch 1 (logarithmic)");
  for (const m of list) {
    picture.append(line(px(m.float32.wall_ms), py(m.top1), px(m.int8.wall_ms), py(m.top1), { class: "joined", opacity: 0.8 }));
  }
  for (const precision of ["float32", "int8"]) {
    const top = best(list, precision);
    picture.append(frontLine(top.map((m) => `${px(m[precision].wall_ms)},${py(m.top1)}`), colours[precision]));
    for (const m of list) {
      const dot = svg("circle", { class: "point", cx: px(m[precision].wall_ms), cy: py(m.top1), r: 4, fill: colours[precision] });
      dot.append(tip(`${m.model}: ${precision === "int8" ? "int8" : "float"} ${digits(m[precision].wall_ms)} ms, float ${m.top1.toFixed(2)} %, ${m.speedup[0].toFixed(2)} × as fast in int8`));
      picture.append(dot);
    }
    if (precision === "int8") {
      for (const m of top) picture.append(text(px(m.int8.wall_ms) - 6, py(m.top1) - 5, m.model, { "text-anchor": px(m.int8.wall_ms) < 120 ? "start" : "end" }));
    }
  }
  return picture;
}

function modelsTable() {
  const marked = new Set(best(models.filter((m) => m.top1 !== null), "int8").map((m) => m.model));
  const head = ["architecture", "float top-1 %", "image", "parameters, M", "float ms", "int8 ms", "× float [95 %]", "float MB", "int8 MB", "peak MB, int8"];
  const mega = (v) => (v === null ? "" : digits(v / 1e6));
  return table(head, models.map((m) => [
    m.model + (marked.has(m.model) ? " *" : ""), m.top1 === null ? "" : m.top1.toFixed(2), String(m.size[1]), (m.parameters / 1e6).toFixed(1),
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
  const card = chart("Accuracy against latency", "Top-1 of the float weights, as published: that of int8 is not measured here. Grey: float; blue: int8, joined to its float by a line; dashed: the Pareto fronts.", (width) => draw(chosen(), width));
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
