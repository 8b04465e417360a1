"use strict";
// The table of all numbers: a heading sorts it, numbers by size and text by alphabet, and again the other way round.

const keyOf = (cell) => {
  const value = "value" in cell.dataset ? Number(cell.dataset.value) : NaN;
  return "value" in cell.dataset ? value : cell.textContent;
};

// What is not known comes last, whichever way the others stand.
function compare(a, b, down) {
  if (typeof a === "string") return down ? b.localeCompare(a) : a.localeCompare(b);
  if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
  return down ? b - a : a - b;
}

for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  headings.forEach((heading, at) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].map((row, place) => [keyOf(row.cells[at]), place, row]);
      rows.sort((a, b) => compare(a[0], b[0], down) || a[1] - b[1]);
      body.append(...rows.map(([, , row]) => row));
    });
  });
}
