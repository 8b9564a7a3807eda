"use strict";
// Draws the report that the page carries, with draw.js.
const label = (row) => row.runtime + " " + (row.source === "qzoo" ? row.precision : row.source);
const fixed = (v) => (v === null ? "" : v.toFixed(2)); // of an ONNX file some figures may not have been measured
const times = (s) => (s === null ? "" : `${s.ratio.toFixed(2)} [${s.low.toFixed(2)}, ${s.high.toFixed(2)}]`);
const speedup = (row, batch) => batch["speedup_" + row.clock];
const by = (rows) => {
  const clocks = new Set(rows.map((row) => row.clock));
  return clocks.size > 1 ? "by CPU time, on GPUs by wall time" : clocks.has("wall") ? "by wall time" : "by CPU time";
};
function colour(row) {
  if (row.source !== "qzoo") return "var(--peer)";
  return { float32: "var(--float)", int8: "var(--int8)" }[row.precision] || "var(--fake)";
}

// A chart with a choice: `items` have a `label`; the chosen one is drawn.
function chosen(title, note, items, draw, scroll) {
  const select = el("select", { "aria-label": title }, ...items.map((item, i) => el("option", { value: i }, item.label)));
  const card = chart(title, note, (width) => draw(items[select.value || 0], width), { scroll });
  select.addEventListener("change", redraw);
  card.insertBefore(select, card.lastChild);
  return card;
}

// Accuracy against latency, both with their uncertainty; the Pareto line joins what nothing beats in both.
function scatter(rows, batch, width) {
  const points = rows.map((row, i) => ({ row, i, x: row.batches.find((b) => b.batch === batch), y: row.top1 }));
  const xs = points.flatMap((p) => [p.x.wall_ms, p.x.wall_p90_ms]);
  const ys = points.flatMap((p) => p.row.top1_interval);
  const { picture, px, py } = axes(width, 280, xs, [...ys, Math.max(...ys) + 0.01], "ms a call (logarithmic)");
  const best = front(points, (p) => p.x.wall_ms, (p) => p.y);
  picture.append(frontLine(best.map((p) => `${px(p.x.wall_ms)},${py(p.y)}`), "var(--mark)"));
  for (const { row, i, x, y } of points) {
    const ink = { stroke: colour(row) };
    picture.append(line(px(x.wall_ms), py(row.top1_interval[0]), px(x.wall_ms), py(row.top1_interval[1]), { ...ink, opacity: 0.35 }));
    picture.append(line(px(x.wall_ms), py(y), px(x.wall_p90_ms), py(y), ink));
    const dot = svg("circle", { class: "point", cx: px(x.wall_ms), cy: py(y), r: 8, fill: colour(row) });
    dot.append(tip(`${label(row)}: ${digits(x.wall_ms)} ms, ${y.toFixed(2)} %`));
    picture.append(dot, text(px(x.wall_ms), py(y) + 4, i + 1, { "text-anchor": "middle", style: "fill:var(--paper);font-weight:bold" }));
  }
  return picture;
}

// Horizontal bars, one a line: {name, value, shown, note, fill}.
function bars(items, width) {
  const row = 26, height = items.length * row + 6, most = Math.max(...items.map((item) => item.value), 1e-9);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img" });
  const fits = Math.floor((width - 14 - 6.5 * Math.max(...items.map((item) => item.shown.length))) / 6.2);
  items.forEach((item, i) => {
    const y = i * row, name = item.name.length > fits ? "…" + item.name.slice(1 - fits) : item.name;
    const bar = svg("rect", { class: "bar", x: 0, y: y + 15, height: 8, width: Math.max(1, (item.value / most) * width), fill: item.fill });
    bar.append(tip(`${item.name}: ${item.note}`));
    picture.append(text(0, y + 12, name), text(width, y + 12, item.shown, { "text-anchor": "end", class: "soft" }), bar);
  });
  return picture;
}

const kinds = { int8: "var(--int8)", float32: "var(--float)" };
function profileChart(details) {
  const items = details.profiles.map((p) => ({ ...p, label: label(p) }));
  const ours = items.findIndex((p) => p.precision === "int8");
  if (ours > 0) items.unshift(...items.splice(ours, 1));
  const draw = (item, width) => {
    const total = item.nodes.reduce((sum, n) => sum + n.micros, 0) || 1;
    const share = {};
    for (const n of item.nodes) share[n.precision] = (share[n.precision] || 0) + n.micros / total;
    const words = Object.entries(share).sort((a, b) => b[1] - a[1]).map(([k, v]) => `${k || "?"} ${(100 * v).toFixed(1)} %`);
    const list = item.nodes.map((n) => ({
      name: `${n.name} (${n.op})`, value: n.micros, shown: `${digits(n.micros)} µs`, fill: kinds[n.precision] || "var(--fake)",
      note: `${n.precision}, ${(100 * n.micros / total).toFixed(1)} % of the time`,
    }));
    return el("div", {}, el("p", { class: "soft" }, `${(total / 1000).toFixed(2)} ms: ${words.join(", ")}`), bars(list, width));
  };
  return chosen("Time and precision of every node", "Batch 1, in the order of execution; blue: int8, grey: float32, yellow: conversions and others.", items, draw, true);
}

function sensitivityChart(details) {
  const found = details.sensitivity, top = 70;
  const exact = (db, agree) => db === null && agree === 100;  // logits that are not finite have no SQNR either
  const level = (db, agree) => (db !== null ? db : exact(db, agree) ? 1e9 : -1e9);
  const words = (db, agree, places) => (db !== null ? db.toFixed(places) + " dB" : exact(db, agree) ? "exact" : "not finite");
  const views = [
    { label: "only this layer quantized", pick: (l) => l.sqnr_db, agree: (l) => l.agreement },
    { label: "every layer but this one", pick: (l) => l.sqnr_without_db, agree: (l) => l.agreement_without },
  ];
  const draw = (view, width) => {
    const list = found.layers.map((l) => ({ l, db: view.pick(l) }));
    list.sort((a, b) => (view === views[0] ? 1 : -1) * (level(a.db, view.agree(a.l)) - level(b.db, view.agree(b.l))));
    return bars(
      list.map(({ l, db }) => ({
        name: l.name, value: Math.min(top, Math.max(0, top - level(db, view.agree(l)))),
        shown: `${words(db, view.agree(l), 1)}, ${view.agree(l).toFixed(0)} % agree`, fill: "var(--int8)", note: l.quantizers.join(", "),
      })), width);
  };
  const all = words(found.sqnr_db, found.agreement, 2);
  return chosen("What each layer costs", `SQNR of the logits on ${found.images} images; all quantized: ${all}. A bar is the distance to ${top} dB.`, views, draw, true);
}

function histogramChart(details) {
  const items = details.histograms.map((hist) => ({ ...hist, label: hist.name }));
  const draw = (item, width) => {
    const height = 220, bottom = 30, most = Math.log10(1 + Math.max(...item.counts));
    const [start, limit] = item.limits || [item.low < 0 ? -item.amax[1] : 0, item.amax[1]];
    const low = Math.min(item.low, start), high = Math.max(item.high, limit);
    const px = (v) => ((v - low) / (high - low)) * width, step = (item.high - item.low) / item.counts.length;
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img" });
    item.counts.forEach((count, i) => {
      const size = (Math.log10(1 + count) / most) * (height - bottom - 14), x = item.low + i * step;
      const bar = svg("rect", { class: "bin", x: px(x), width: Math.max(0.5, px(x + step) - px(x) - 0.5), y: height - bottom - size, height: size, fill: item.role === "weight" ? "var(--peer)" : "var(--int8)" });
      bar.append(tip(`${x.toPrecision(3)} to ${(x + step).toPrecision(3)}: ${count}`));
      picture.append(bar);
    });
    const inner = item.limits || item.amax[0] === limit ? [] : [item.amax[0]];
    const ends = item.limits || [limit, ...inner].flatMap((a) => (item.low < 0 ? [a, -a] : [a]));
    for (const v of ends) {
      const edge = Math.min(Math.max(px(v), 1), width - 1);
      picture.append(line(edge, 0, edge, height - bottom, { class: "amax", stroke: "var(--mark)", "stroke-width": 2, "stroke-dasharray": inner.includes(Math.abs(v)) ? "2 4" : "none" }));
    }
    for (const v of ticks(low, high, 5)) picture.append(text(px(v), height - 14, v, { "text-anchor": px(v) < 20 ? "start" : px(v) > width - 20 ? "end" : "middle", class: "soft" }));
    picture.append(text(width, height - 2, `range ${item.limits ? item.limits.join(" to ") : inner.length ? item.amax.join(" to ") : limit}`, { "text-anchor": "end" }));
    return picture;
  };
  return chosen("What is quantized, and the range chosen for it", `Counts (logarithmic) on ${details.images} images; orange: the range, of weights the largest and (dotted) the smallest of all channels.`, items, draw);
}

function rowsTable(rows, batches) {
  const head = ["#, runtime, precision", "top-1 %", "95 %", "agree %", "SQNR dB", ...batches.flatMap((b) => [`ms, batch ${b}`, "p90", "CPU ms", "× float [95 %]"]), "images/s", "file MB", "peak MB", "load s", "first ms"];
  const mega = (v) => (v === null ? "" : digits(v / 1e6));
  return table(head, rows.map((row, i) => [
    `${i + 1}. ${label(row)}`, fixed(row.top1), (row.top1_interval || []).map((v) => v.toFixed(1)).join(" to "), fixed(row.agreement),
    row.sqnr_db !== null ? row.sqnr_db.toFixed(2) : row.agreement === null ? "" : row.agreement === 100 ? "exact" : "not finite",
    ...row.batches.flatMap((b) => [digits(b.wall_ms), digits(b.wall_p90_ms), digits(b.cpu_ms), times(speedup(row, b))]),
    row.images_per_second.toFixed(0), mega(row.file_bytes), mega(row.peak_rss_bytes), row.load_seconds.toFixed(2), digits(row.first_ms),
  ]), { class: "rows" });
}

function rangesTable(details) {
  const cell = (v, places) => (v === null ? "" : v.toFixed(places));
  const span = (q) => (q.limits ? q.limits.map((v) => v.toPrecision(4)).join(" to ") : q.amax_low === null ? "none" : q.ranges === 1 ? q.amax_high.toPrecision(4) : `${q.amax_low.toPrecision(4)} to ${q.amax_high.toPrecision(4)}`);
  const lines = details.inspection.map((q) => [q.name, q.on ? q.format : "off", q.ranges, span(q), q.largest === null ? "" : q.largest.toPrecision(4), cell(q.saturated, 3), cell(q.dead, 1)].map(String));
  return el("details", { class: "card" }, el("summary", {}, `All ${lines.length} quantizers`), table(["quantizer", "format", "ranges", "range", "largest", "saturated %", "dead levels %"], lines, { class: "ranges" }));
}

function modelSection(name) {
  const rows = report.rows.filter((row) => row.model === name), batches = report.settings.batches;
  const details = report.details.find((d) => d.model === name);
  const key = el("ol", { class: "key" }, ...rows.map((row, i) => el("li", {}, el("b", { style: `color:${colour(row)}` }, String(i + 1)), " " + label(row))));
  const plots = (rows.some((row) => row.top1 === null) ? [] : batches).map((b) => {
    const card = chart(`Accuracy against latency, batch ${b}`, "Top-1 in percent with its 95 % interval; the tail is the 90th percentile; dashed: the Pareto line.", (width) => scatter(rows, b, width));
    card.append(key.cloneNode(true));
    return card;
  });
  const against = rows.flatMap((row) => row.against.map((a) => el("p", {}, `${label(row)}: ${a.ratio.toFixed(2)} [${a.low.toFixed(2)}, ${a.high.toFixed(2)}] times as fast as ${a.peer} in ${a.runtime}, batch ${a.batch}, ${by([row])}`)));
  const deep = details ? [...(details.profiles.length ? [profileChart(details)] : []), sensitivityChart(details), histogramChart(details)] : [];
  return el("section", {}, el("h2", {}, name), el("p", { class: "soft" }, `${rows[0].images} images`), rowsTable(rows, batches), ...against, el("div", { class: "grid" }, ...plots, ...deep), ...(details ? [rangesTable(details)] : []));
}

function start() {
  const models = [...new Set(report.rows.map((row) => row.model))], machine = report.machine;
  const threads = report.settings.threads;
  document.getElementById("main").append(
    el("h1", {}, "Benchmark"),
    el("p", {}, `${machine.processor}, ${threads === 1 ? "1 thread" : threads + " threads"}, ${report.date}`),
    ...report.warnings.map((w) => el("p", { class: "warn" }, w)),
    ...report.notes.map((n) => el("p", { class: "soft" }, n)),
    ...models.map(modelSection),
    el("h2", {}, "Machine and versions"),
    table(["what", "value"], Object.entries(machine).map(([k, v]) => [k, v]), { class: "machine" }),
    el("p", { class: "soft" }, `Times are wall time a call, all models in turns; × is the speed-up over float32 in the same runtime, ${by(report.rows)}, with its 95 % bootstrap interval; peak MB is the memory of a process that runs this model alone.`),
  );
  show(`${document.querySelectorAll(".chart").length} charts of ${models.length} models, ${report.rows.length} rows`);
}
start();
