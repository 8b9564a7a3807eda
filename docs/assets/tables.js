// Tables inside <div class="filterable"> get a field that filters rows by words and figures, and headings that sort.
"use strict";

function keyOf(row, column) {
  const text = row.cells[column].textContent.trim();
  const value = parseFloat(text.replace(/,/g, ""));
  return /^[-+]?[\d.]/.test(text) && !Number.isNaN(value) ? value : text.toLowerCase();
}

function compare(a, b) {
  if (typeof a === typeof b) return a < b ? -1 : a > b ? 1 : 0;
  return typeof a === "number" ? -1 : 1; // figures before words and empty cells
}

// A word of the text, or a limit such as size<5 on the column whose heading begins so.
function fits(row, heads, word) {
  const limit = /^([a-z][a-z-]*)([<>])(-?[\d.]+)$/.exec(word);
  const column = limit ? heads.findIndex((head) => head.textContent.trim().toLowerCase().startsWith(limit[1])) : -1;
  if (column < 0) return row.textContent.toLowerCase().includes(word);
  const value = keyOf(row, column);
  return typeof value === "number" && (limit[2] === "<" ? value < limit[3] : value > limit[3]);
}

function enhance(box) {
  const table = box.querySelector("table");
  if (!table || box.querySelector("input")) return;
  const rows = () => Array.from(table.tBodies[0].rows);
  const heads = Array.from(table.tHead.rows[0].cells);
  const input = document.createElement("input");
  input.type = "search";
  input.placeholder = "filter: resnet w8a8 apache size<5 drop<0.5";
  input.setAttribute("aria-label", "Filter the table");
  input.style.cssText = "width:100%;padding:.5em;margin:.5em 0;border:1px solid;border-radius:.2em;font:inherit";
  const count = document.createElement("p");
  count.setAttribute("role", "status");
  const filter = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows()) {
      row.hidden = !words.every((word) => fits(row, heads, word));
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = `${shown} of ${rows().length}`;
  };
  input.addEventListener("input", filter);
  heads.forEach((head, column) => {
    head.tabIndex = 0;
    head.style.cursor = "pointer";
    head.title = "sort";
    const sort = () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const ordered = rows().sort((a, b) => compare(keyOf(a, column), keyOf(b, column)));
      table.tBodies[0].append(...(down ? ordered.reverse() : ordered));
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  });
  const asked = new URLSearchParams(location.search).get("filter");
  if (asked) input.value = asked;
  box.prepend(input, count);
  filter();
}

document.querySelectorAll(".filterable").forEach(enhance);
