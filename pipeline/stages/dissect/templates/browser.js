// The browser of units: search, filters, sorting, a map of all units, cards, and one unit in full. All text that comes
// from data is set as text. The address says what is shown: #layer=…&concept=… for filters, #unit=<layer>/<unit> for a unit.
(() => {
  const CARDS = 24; // shown at once, and added by each "more"
  const data = JSON.parse(document.getElementById("units-data").textContent);
  const units = data.units;
  // The columns of a row of `units`; see pipeline/stages/dissect/browser.py.
  const [LAYER, UNIT, CONCEPT, IOU, CEILING, HELD, LOW, HIGH, THRESHOLD, RATE, IMAGES, BEST, HISTOGRAM, FROM, TO,
    RELEVANT] = Array(16).keys();

  const find = (id) => document.getElementById(id);
  const form = find("browser"), list = find("cards"), more = find("more"), dialog = find("unit"), map = find("map");
  const fields = form.elements;

  // Words ------------------------------------------------------------------------------------------------------------

  const concept = (index) => (index < 0 ? "no label" : data.concepts[index][0]);
  const category = (index) => (index < 0 ? -1 : data.concepts[index][1]);
  const place = (row) => `${data.layers[row[LAYER]]}, unit ${row[UNIT]}`;
  const ofCeiling = (row) => (row[CEILING] ? row[IOU] / row[CEILING] : null);
  const interval = (row) => (row[LOW] === null ? "–" : `${number(row[LOW])} to ${number(row[HIGH])}`);
  const link = (row) => `#unit=${encodeURIComponent(data.layers[row[LAYER]])}/${row[UNIT]}`;
  // A category is named with a concept in addresses and menus: two categories may share a name of a concept.
  const named = (index) => `${data.categories[category(index)]}: ${concept(index)}`;

  const text = units.map((row) =>
    [concept(row[CONCEPT]), category(row[CONCEPT]) < 0 ? "" : data.categories[category(row[CONCEPT])],
      data.layers[row[LAYER]]].join("\n").toLowerCase());
  const address = units.map((row) => `${data.layers[row[LAYER]]}/${row[UNIT]}`.toLowerCase());
  // A number is that of a unit, or part of a name; with a slash it is the end of layer/unit.
  const says = (index, word) => text[index].includes(word) || String(units[index][UNIT]) === word
    || (word.includes("/") && address[index].endsWith(word));

  // Elements ---------------------------------------------------------------------------------------------------------

  function dot(index) {
    const of = category(index);
    return make("span", { class: `dot ${of < 0 || of >= data.coloured ? "none" : `c${of % 8}`}`, "aria-hidden": "true" });
  }

  function pictures(row, loading) {
    if (row.length <= IMAGES || !row[IMAGES].length) return make("p", { class: "empty" }, "No pictures of this unit.");
    return framed(row, IMAGES, "", `responds most`, loading);
  }

  function framed(row, column, ending, does, loading) {
    const classes = row[column].map((image) => data.classes[data.images[image][1]]).filter(Boolean);
    const what = `${counted(row[column].length, "image")} on which unit ${row[UNIT]} of ${data.layers[row[LAYER]]} ${does}`;
    const file = `${data.folder}/${String(row[LAYER]).padStart(2, "0")}-${String(row[UNIT]).padStart(4, "0")}${ending}.jpg`;
    const frame = make("span", { class: "pictures" },
      make("img", { src: file, alt: classes.length ? `${what}: ${classes.join(", ")}` : what, loading }));
    frame.style.setProperty("--images", row[column].length);
    return frame;
  }

  function captions(row, column) {
    const names = row[column].map((image) => {
      const [id, label, explained] = data.images[image];
      const said = [data.classes[label] ? make("b", {}, data.classes[label]) : "", make("span", {}, id)];
      if (!explained) return make("li", {}, ...said);
      return make("li", {}, make("a", { href: `${data.explained}#${new URLSearchParams({ image: id })}`,
        title: "Which pixels make the network say so" }, ...said));
    });
    const made = make("ol", { class: "captions" }, ...names);
    made.style.setProperty("--images", row[column].length);
    return made;
  }

  function bar(row) {
    const of = (value) => 200 * Math.min(Math.max(value ?? 0, 0), 1);
    const part = (kind, from, to, y, height) =>
      draw("rect", { class: kind, x: of(from), y, width: Math.max(of(to) - of(from), 0), height });
    const made = draw("svg", { class: "bar", viewBox: "0 0 200 12", preserveAspectRatio: "none", role: "img",
      "aria-label": `IoU ${number(row[IOU])}, ceiling ${number(row[CEILING])}` },
    part("track", 0, 1, 4, 4), part("ceiling", 0, row[CEILING], 4, 4), part("iou", 0, row[IOU], 4, 4));
    if (row[LOW] !== null) made.append(part("interval", row[LOW], row[HIGH], 1, 10));
    return made;
  }

  // Heights are logarithmic: a unit that is silent nearly everywhere would show one bar only.
  function histogram(row, height) {
    if (row.length <= IMAGES || !row[HISTOGRAM].length) return "";
    const counts = row[HISTOGRAM], most = Math.log1p(Math.max(...counts)), range = row[TO] - row[FROM] || 1;
    const at = Math.min(Math.max((row[THRESHOLD] - row[FROM]) / range, 0), 1) * 320, step = 320 / counts.length;
    const made = draw("svg", { class: "histogram", viewBox: `0 0 320 ${height}`, preserveAspectRatio: "none", role: "img",
      "aria-label": `Histogram of the activation from ${short(row[FROM])} to ${short(row[TO])}, threshold ${short(row[THRESHOLD])}` });
    const bars = ["", ""];
    counts.forEach((count, index) => {
      const tall = count ? Math.max(Math.log1p(count) / most * (height - 2), 1) : 0;
      bars[(index + 0.5) * step > at ? 1 : 0] += `M${index * step} ${height}v${-tall.toFixed(1)}h${step - 1}v${tall.toFixed(1)}z`;
    });
    made.append(draw("path", { class: "below", d: bars[0] }), draw("path", { class: "above", d: bars[1] }));
    made.append(draw("line", { x1: at, x2: at, y1: 0, y2: height }));
    return made;
  }

  function runnersUp(row) {
    if (row.length <= IMAGES) return [];
    return row[BEST].filter(([index], rank) => index !== row[CONCEPT] || (row[CONCEPT] < 0 && rank >= 0));
  }

  function card(index) {
    const row = units[index];
    const others = runnersUp(row).slice(0, 3).map(([other, iou]) => `${concept(other)} ${number(iou, 2)}`);
    const about = make("div", { class: "about" },
      make("h3", {}, dot(row[CONCEPT]), make("a", { href: link(row) }, concept(row[CONCEPT]))),
      make("p", { class: "place" }, place(row)),
      bar(row),
      make("p", { class: "numbers" }, make("b", {}, number(row[IOU])), ` (${interval(row)}), ceiling ${number(row[CEILING], 2)}`));
    if (others.length) about.append(make("p", { class: "others" }, `${row[CONCEPT] < 0 ? "best: " : "then "}${others.join(", ")}`));
    about.append(histogram(row, 26));
    return make("li", { class: "card" }, pictures(row, "lazy"), about);
  }

  // Filters and order ------------------------------------------------------------------------------------------------

  const byNumber = (key) => (a, b) => (key(units[b]) ?? -Infinity) - (key(units[a]) ?? -Infinity) || a - b;
  const byIou = byNumber((row) => row[IOU]);
  const orders = {
    iou: byIou,
    ceiling: byNumber(ofCeiling),
    held: byNumber((row) => row[HELD]),
    rate: byNumber((row) => row[RATE]),
    concept: (a, b) => (units[a][CONCEPT] < 0) - (units[b][CONCEPT] < 0)
      || concept(units[a][CONCEPT]).localeCompare(concept(units[b][CONCEPT])) || byIou(a, b),
    layer: (a, b) => a - b,
  };
  const facets = {
    layer: { of: (row) => row[LAYER], names: data.layers },
    category: { of: (row) => category(row[CONCEPT]), names: data.categories },
    concept: { of: (row) => row[CONCEPT], names: data.concepts.map((_, index) => named(index)) },
  };
  let order = []; // numbers of the units that are shown, in order
  let shown = 0; // how many of them have a card

  function matches() {
    const words = searched(fields.q);
    return matching(units, facets, fields, (row, index) =>
      (row[CONCEPT] >= 0 || fields.all.checked) && words.every((word) => says(index, word)));
  }

  function update() {
    order = matches().sort(orders[fields.sort.value]);
    shown = 0;
    list.replaceChildren();
    showMore();
    const all = fields.all.checked ? units.length : units.filter((row) => row[CONCEPT] >= 0).length;
    find("count").textContent = `${thousands(order.length)} of ${
      fields.all.checked ? counted(all, "unit") : counted(all, "unit") + " with a label"}`;
    drawMap();
  }

  function showMore() {
    const next = order.slice(shown, shown + CARDS);
    list.append(...next.map(card));
    shown += next.length;
    more.hidden = shown >= order.length;
    more.textContent = `Show ${Math.min(CARDS, order.length - shown)} more`;
    return list.children[shown - next.length];
  }

  // The map: every unit as a square, a row or more a layer, in the colour of its category, stronger for a higher IoU ---

  let squares = []; // left, top of each unit
  let side = 12;

  function drawMap() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const width = map.parentElement.clientWidth, scale = window.devicePixelRatio || 1;
    side = units.length > 4000 ? 6 : units.length > 1500 ? 8 : 12;
    const gap = side > 6 ? 2 : 1, label = 14, perRow = Math.max(1, Math.floor((width + gap) / (side + gap)));
    let top = 0, before = -1, column = 0;
    const labels = [];
    squares = units.map((row) => {
      if (row[LAYER] !== before) {
        top += before < 0 ? label : side + label + 8;
        labels.push([data.layers[row[LAYER]], top - 4]);
        [before, column] = [row[LAYER], 0];
      } else if (++column === perRow) {
        [top, column] = [top + side + gap, 0];
      }
      return [column * (side + gap), top];
    });
    const height = top + side + 2;
    [map.width, map.height] = [Math.round(width * scale), Math.round(height * scale)];
    map.style.height = `${height}px`;
    const paint = map.getContext("2d");
    paint.scale(scale, scale);
    paint.font = `11px ${getComputedStyle(document.body).fontFamily}`;
    paint.fillStyle = colour("--muted");
    for (const [name, y] of labels) paint.fillText(name, 0, y, width);
    const wanted = new Set(order), best = Math.max(...units.map((row) => row[IOU] ?? 0)) || 1;
    const colours = Array.from({ length: 8 }, (_, index) => colour(`--c${index}`)), track = colour("--track");
    units.forEach((row, index) => {
      const of = category(row[CONCEPT]), inside = wanted.has(index);
      paint.globalAlpha = inside && of >= 0 ? 0.3 + 0.7 * (row[IOU] / best) : 1;
      paint.fillStyle = inside && of >= 0 ? colours[of % 8] : track;
      if (inside || of < 0) paint.fillRect(...squares[index], side, side);
      else paint.fillRect(squares[index][0] + side / 3, squares[index][1] + side / 3, side / 3, side / 3);
    });
    paint.globalAlpha = 1;
  }

  function unitAt(event) {
    return squares.findIndex(([x, y]) => event.offsetX >= x && event.offsetX < x + side + 1
      && event.offsetY >= y && event.offsetY < y + side + 1);
  }

  // One unit in full ---------------------------------------------------------------------------------------------------

  let open = -1;

  function showUnit(index) {
    open = index;
    const row = units[index], at = order.indexOf(index);
    const step = (by, label) => press(by < 0 ? "←" : "→", `${label} unit`, () => go(at + by), at < 0 || !(at + by in order));
    const close = press("×", "Close", () => dialog.close());
    const fact = (name, value) => make("div", {}, make("dt", {}, name), make("dd", {}, value));
    const parts = [
      make("header", {},
        make("div", {},
          make("h2", { id: "unit-title" }, dot(row[CONCEPT]), concept(row[CONCEPT])),
          make("p", { class: "place" }, row[CONCEPT] < 0 ? "" : `${data.categories[category(row[CONCEPT])]} · `,
            make("a", { href: link(row) }, place(row)))),
        make("nav", { "aria-label": "Units" }, step(-1, "Previous"), step(1, "Next"), close)),
      pictures(row, "eager"),
    ];
    if (row.length > IMAGES && row[IMAGES].length) {
      parts.push(captions(row, IMAGES));
    }
    parts.push(bar(row), make("dl", {}, fact("IoU", make("b", {}, number(row[IOU]))), fact("95 % interval", interval(row)),
      fact("held-out IoU", number(row[HELD])), fact("ceiling", number(row[CEILING])),
      fact("IoU / ceiling", number(ofCeiling(row), 2)),
      fact("activation rate", row[RATE] === null ? "–" : `${(100 * row[RATE]).toFixed(2)} %`)));
    if (data.coarse?.includes(index)) {
      parts.push(make("p", { class: "note" }, "Of this unit, fewer than 8 bits are stored: its values and its threshold are coarse."));
    }
    if (row.length > IMAGES && row[BEST].length) {
      const most = Math.max(row[BEST][0][1], data.minIou);
      parts.push(make("h3", {}, "Best concepts"), make("ol", { class: "best" }, ...row[BEST].map(([index, iou]) => {
        const length = make("span", { class: "length", "aria-hidden": "true" });
        length.style.width = `${100 * iou / most}%`;
        return make("li", {}, make("span", {}, dot(index), concept(index)), make("span", { class: "n" }, number(iou)), length);
      })));
    }
    if (row.length > IMAGES && row[HISTOGRAM].length) {
      parts.push(make("h3", {}, "Activation"), histogram(row, 90),
        make("p", { class: "ends" }, make("span", {}, short(row[FROM])), make("span", {}, `threshold ${short(row[THRESHOLD])}`),
          make("span", {}, short(row[TO]))),
        make("p", { class: "note" }, `Positions of the map with this activation, over ${
          counted(data.sample, "image")} chosen at random; heights are logarithmic.`));
    }
    if (row.length > IMAGES && row[RELEVANT].length) {
      parts.push(make("h3", {}, "Relevance"), framed(row, RELEVANT, "-relevance", "speaks most for what the network says", "eager"),
        captions(row, RELEVANT), make("p", { class: "note" },
          `The images on which the relevance of this unit by ${data.relevance[row[LAYER]]} is highest.`));
    }
    const wanted = data.wanted[row[LAYER]]?.[row[UNIT]];
    if (wanted) {
      const [file, count, said] = wanted;
      parts.push(make("h3", {}, "What it wants to see"), make("div", { class: "drawn" },
        make("img", { src: file, loading: "lazy", alt: `${counted(count, "picture")} that excite this unit` })),
        make("p", { class: "note" }, said.join("; ")));
    }
    showDialog(dialog, parts);
  }

  function go(position) {
    history.replaceState(null, "", link(units[order[position]]));
    showUnit(order[position]);
    dialog.querySelector("nav button:not(:disabled)").focus();
  }

  // The address --------------------------------------------------------------------------------------------------------

  function filters() {
    const words = new URLSearchParams();
    if (fields.q.value) words.set("q", fields.q.value);
    saveMenus(words, facets, fields);
    if (fields.sort.value !== "iou") words.set("sort", fields.sort.value);
    if (fields.all.checked) words.set("all", "1");
    return `#${words}`;
  }

  function readAddress() {
    const words = new URLSearchParams(location.hash.slice(1)), wanted = words.get("unit");
    if (wanted !== null) {
      const [layer, unit] = [wanted.slice(0, wanted.lastIndexOf("/")), wanted.slice(wanted.lastIndexOf("/") + 1)];
      const index = units.findIndex((row) => data.layers[row[LAYER]] === layer && String(row[UNIT]) === unit);
      if (index >= 0) return showUnit(index);
    }
    if (dialog.open) dialog.close();
    if (["q", "sort", "all", ...Object.keys(facets)].some((name) => words.has(name))) {
      fields.q.value = words.get("q") ?? "";
      readMenus(words, facets, fields);
      fields.sort.value = words.get("sort") in orders ? words.get("sort") : "iou";
      fields.all.checked = words.has("all");
      update();
    }
  }

  // Start --------------------------------------------------------------------------------------------------------------

  for (const [name, facet] of Object.entries(facets)) fillMenu(fields[name], facet, units, name !== "layer");
  // A network without detectors still has units to look at.
  fields.all.checked = fields.all.defaultChecked = units.every((row) => row[CONCEPT] < 0);
  const changed = () => {
    history.replaceState(null, "", filters());
    update();
  };
  listen(form, changed);
  more.addEventListener("click", () => showMore()?.querySelector("a").focus({ preventScroll: true }));
  map.addEventListener("click", (event) => {
    const index = unitAt(event);
    if (index >= 0) location.hash = link(units[index]);
  });
  map.addEventListener("mousemove", (event) => {
    const index = unitAt(event);
    map.title = index < 0 ? "" : `${place(units[index])}: ${concept(units[index][CONCEPT])}, IoU ${number(units[index][IOU])}`;
    map.classList.toggle("on", index >= 0);
  });
  listenDialog(dialog, () => {
    open = -1;
    if (location.hash.startsWith("#unit=")) history.replaceState(null, "", filters());
  }, (by) => {
    const at = order.indexOf(open);
    if (at >= 0 && at + by in order) go(at + by);
  });
  window.addEventListener("hashchange", readAddress);
  window.addEventListener("resize", drawMap);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMap);
  form.hidden = map.hidden = false;
  update();
  readAddress();
})();
