"use strict";
// What the browsers of pages share: words, elements, menus that filter, and a dialog. All text is set as text.

const number = (value, digits = 3) => (value === null ? "–" : value.toFixed(digits));
const short = (value) => (value === null ? "–" : String(Number(value.toPrecision(3))));
const thousands = (count) => count.toLocaleString("en").replaceAll(",", "\u202f");
const counted = (count, noun) => `${thousands(count)} ${noun}${count === 1 ? "" : "s"}`;

function fill(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
const make = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
const draw = (name, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);

function press(text, label, pressed, disabled = false) {
  const button = make("button", { type: "button", "aria-label": label }, text);
  button.disabled = disabled;
  button.addEventListener("click", pressed);
  return button;
}

// A facet is a menu: `of` gives the number of a row, `names` the text of each number.

// Fill a menu with the numbers that occur.
function fillMenu(field, facet, rows, byName) {
  const present = new Set(rows.map(facet.of));
  const numbers = [...facet.names.keys()].filter((index) => present.has(index));
  if (byName) numbers.sort((a, b) => facet.names[a].localeCompare(facet.names[b]));
  field.append(...numbers.map((index) => make("option", { value: index }, facet.names[index])));
}

// Return the numbers of the rows that `keeps` and all menus take.
function matching(rows, facets, fields, keeps) {
  const wanted = Object.entries(facets).map(([name, facet]) => [facet.of, fields[name].value]);
  const found = [];
  // What would match if this facet alone were open: the numbers in its menu.
  const counts = wanted.map(() => new Map());
  rows.forEach((row, index) => {
    if (!keeps(row, index)) return;
    const missed = wanted.filter(([of, value]) => value !== "" && of(row) !== Number(value));
    wanted.forEach(([of], facet) => {
      if (missed.length === 0 || (missed.length === 1 && missed[0][0] === of)) {
        counts[facet].set(of(row), (counts[facet].get(of(row)) ?? 0) + 1);
      }
    });
    if (!missed.length) found.push(index);
  });
  Object.keys(facets).forEach((name, facet) => {
    for (const option of fields[name].options) {
      if (option.value === "") continue;
      const count = counts[facet].get(Number(option.value)) ?? 0;
      option.textContent = `${facets[name].names[option.value]} (${count})`;
      option.hidden = !count && !option.selected;
    }
  });
  return found;
}

const searched = (field) => field.value.toLowerCase().split(/\s+/).filter(Boolean);

// The menus in the words of an address, and back.
function saveMenus(words, facets, fields) {
  for (const name of Object.keys(facets)) {
    if (fields[name].value !== "") words.set(name, facets[name].names[fields[name].value]);
  }
}
function readMenus(words, facets, fields) {
  for (const [name, facet] of Object.entries(facets)) {
    const index = facet.names.indexOf(words.get(name));
    fields[name].value = index < 0 ? "" : String(index);
  }
}

// What a form of filters does when it is used; the text of a search counts with every letter.
function listen(form, changed) {
  const search = form.elements.q;
  form.addEventListener("input", (event) => event.target === search && changed());
  form.addEventListener("change", (event) => event.target !== search && changed());
  form.addEventListener("reset", () => setTimeout(changed));
  form.addEventListener("submit", (event) => event.preventDefault());
}

// One item in full: a click on the ground around it closes it, arrow keys step to its neighbours.
function listenDialog(dialog, closed, stepped) {
  dialog.addEventListener("close", closed);
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  dialog.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) stepped(by);
  });
}
function showDialog(dialog, parts) {
  dialog.replaceChildren(...parts);
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

window.addEventListener("beforeprint", () => {
  for (const picture of document.querySelectorAll("img[loading=lazy]")) picture.loading = "eager";
});
