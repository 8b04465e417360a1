// The explained images: filters, a row for each image with the maps of all methods, and one image in full. All text that
// comes from data is set as text. The address says what is shown: #label=…&method=… for filters, #image=<id> for an image.
(() => {
  const ROWS = 24; // shown at once, and added by each "more"
  const data = JSON.parse(document.getElementById("explained-data").textContent);
  // The columns of a row of `images`; see pipeline/stages/attribute/page.py.
  const [ID, LABEL, RIGHT, TARGETS, SCORES, BASELINES, RESIDUALS, UNTRAINED] = Array(8).keys();
  const VERDICTS = ["wrong", "right", "unknown"], LAWS = ["kept", "missed", "not measured"];

  const find = (id) => document.getElementById(id);
  const form = find("browser"), list = find("cards"), more = find("more"), dialog = find("unit"), boxes = find("methods");
  const fields = form.elements;

  let shownExperiment = null; // the experiment that the menus are of
  let images = [], facets = {}, text = [];
  let order = []; // numbers of the images that are shown, in order
  let shown = 0; // how many of them have a row

  // Words ------------------------------------------------------------------------------------------------------------

  const label = (row) => (row[LABEL] < 0 ? "no label" : shownExperiment.labels[row[LABEL]]);
  const target = (index) => shownExperiment.targets[index] ?? `class ${index}`;
  const verdict = (row) => (row[RIGHT] < 0 ? 2 : row[RIGHT]);
  const missed = (at, residual) => residual !== null && residual > shownExperiment.methods[shownExperiment.laws[at]].tolerance;
  function law(row) {
    const all = row[RESIDUALS].flatMap((residuals) => residuals.map((residual, at) => [at, residual]));
    const known = all.filter(([, residual]) => residual !== null);
    return !known.length ? 2 : known.some(([at, residual]) => missed(at, residual)) ? 1 : 0;
  }
  const worst = (row) => Math.max(...row[RESIDUALS].flat().map((residual) => residual ?? -1), -1);
  function residualOf(row, rank, method) {
    const at = shownExperiment.laws.indexOf(method), residual = at < 0 ? null : row[RESIDUALS][rank][at];
    return [residual, at >= 0 && missed(at, residual)];
  }
  function link(row) {
    const words = new URLSearchParams({ image: row[ID] });
    if (shownExperiment !== data.experiments[0]) words.set("experiment", shownExperiment.name);
    return `#${words}`;
  }
  function says(row) {
    const said = target(row[TARGETS][0]);
    const kinds = { predicted: "predicted", top: "most probable", label: "explained", class: "explained", contrast: "explained" };
    return `${kinds[shownExperiment.kind]}: ${said}${row[RIGHT] < 0 ? "" : `, ${VERDICTS[row[RIGHT]]}`}`;
  }

  // Pictures -----------------------------------------------------------------------------------------------------------

  // One of several pictures side by side in a file.
  function tile(file, at, count, alt, loading, kind) {
    const made = make("span", { class: `tile ${kind}` }, make("img", { src: file, alt, loading }));
    made.style.setProperty("--at", `${count > 1 ? (100 * at) / (count - 1) : 0}%`);
    return made;
  }
  const numberOf = (row) => String(images.indexOf(row)).padStart(4, "0");
  const fileOf = (row, part = "") => `${shownExperiment.folder}${numberOf(row)}${part}.jpg`;
  const image = (row, loading) =>
    tile(fileOf(row), 0, shownExperiment.methods.length + 1, `Image ${row[ID]}`, loading, "image");

  // The map of a method; its residual stands below it where it misses its law, or `always`.
  function map(row, method, loading, rank = 0, always = false) {
    const { title, layer, note } = shownExperiment.methods[method], count = shownExperiment.methods.length;
    const [residual, misses] = residualOf(row, rank, method);
    const first = rank ? 0 : 1; // the image stands before the maps of its first class
    const made = make("figure", { class: misses ? "map missed" : "map" },
      tile(fileOf(row, rank ? `-${rank}` : ""), method + first, count + first, `Map of ${title}`, loading, "values"));
    const caption = make("figcaption", {}, make("span", {}, title));
    if (always && (layer || note)) caption.append(make("span", { class: "layer" }, [layer, note].filter(Boolean).join(", ")));
    if (misses) caption.append(make("b", {}, `≠ residual ${short(residual)}`));
    else if (always && residual !== null) caption.append(make("span", { class: "layer" }, `residual ${short(residual)}`));
    made.append(caption);
    return made;
  }

  const wanted = () => [...boxes.querySelectorAll("input")].flatMap((box, method) => (box.checked ? [method] : []));

  function row(index) {
    const of = images[index];
    const what = make("div", { class: "what" }, image(of, "lazy"), make("div", {},
      make("h3", {}, make("a", { href: link(of) }, label(of))),
      make("p", { class: of[RIGHT] === 0 ? "place wrong" : "place" }, says(of)),
      make("p", { class: "numbers" }, `${shownExperiment.score} `, make("b", {}, short(of[SCORES][0])))));
    const maps = make("div", { class: "maps" }, ...wanted().map((method) => map(of, method, "lazy")));
    return make("li", { class: "card" }, what, maps);
  }

  // Filters and order ------------------------------------------------------------------------------------------------

  const orders = {
    hash: (a, b) => a - b,
    score: (a, b) => (images[b][SCORES][0] ?? -Infinity) - (images[a][SCORES][0] ?? -Infinity) || a - b,
    residual: (a, b) => worst(images[b]) - worst(images[a]) || a - b,
    id: (a, b) => images[a][ID].localeCompare(images[b][ID], "en", { numeric: true }),
  };

  // Fill menus and boxes with what an experiment has.
  function choose(experiment) {
    if (shownExperiment === experiment) return;
    shownExperiment = experiment;
    images = experiment.images;
    const none = experiment.labels.length, targets = Object.keys(experiment.targets).map(Number);
    facets = {
      label: { of: (of) => (of[LABEL] < 0 ? none : of[LABEL]), names: [...experiment.labels, "no label"] },
      target: { of: (of) => targets.indexOf(of[TARGETS][0]), names: targets.map(target) },
      verdict: { of: verdict, names: VERDICTS },
      law: { of: law, names: LAWS },
    };
    text = images.map((of) => [of[ID], label(of), ...of[TARGETS].map(target)].join("\n").toLowerCase());
    for (const [name, facet] of Object.entries(facets)) {
      for (const option of [...fields[name].options].slice(1)) option.remove();
      fillMenu(fields[name], facet, images, name === "label" || name === "target");
      // A menu with one entry is no choice.
      fields[name].closest("label").hidden = fields[name].options.length < 3;
    }
    boxes.replaceChildren(boxes.firstElementChild, ...experiment.methods.map(({ name, title }) => {
      const box = make("input", { type: "checkbox", name: "method", value: name, checked: "" });
      return make("label", { class: "check" }, box, title);
    }));
    fields.experiment.value = String(data.experiments.indexOf(experiment));
  }

  function update() {
    choose(data.experiments[Number(fields.experiment.value)]);
    const words = searched(fields.q);
    order = matching(images, facets, fields, (of, index) => words.every((word) => text[index].includes(word)));
    order.sort(orders[fields.sort.value]);
    shown = 0;
    list.replaceChildren();
    showMore();
    find("count").textContent = `${thousands(order.length)} of ${counted(images.length, "image")}`;
  }

  function showMore() {
    const next = order.slice(shown, shown + ROWS);
    list.append(...next.map(row));
    shown += next.length;
    more.hidden = shown >= order.length;
    more.textContent = `Show ${Math.min(ROWS, order.length - shown)} more`;
    return list.children[shown - next.length];
  }

  // One image in full --------------------------------------------------------------------------------------------------

  let open = -1;

  function showImage(index) {
    open = index;
    const of = images[index], at = order.indexOf(index);
    const step = (by, name) => press(by < 0 ? "←" : "→", `${name} image`, () => go(at + by), at < 0 || !(at + by in order));
    const fact = (name, value) => make("div", {}, make("dt", {}, name), make("dd", {}, value));
    const facts = make("dl", {}, fact("label", label(of)), fact("explained class", target(of[TARGETS][0])));
    if (of[RIGHT] >= 0) facts.append(fact("prediction", VERDICTS[of[RIGHT]]));
    facts.append(fact(shownExperiment.score, make("b", {}, short(of[SCORES][0]))));
    if (of[BASELINES][0] !== null) facts.append(fact(`${shownExperiment.score} of the baseline`, short(of[BASELINES][0])));
    const every = [...shownExperiment.methods.keys()];
    const maps = (rank) => make("div", { class: "maps" }, ...every.map((method) => map(of, method, "eager", rank, true)));
    const parts = [
      make("header", {},
        make("div", {},
          make("h2", { id: "image-title" }, label(of)),
          make("p", { class: "place" }, make("a", { href: link(of) }, of[ID]),
            data.experiments.length > 1 ? ` · ${shownExperiment.name}` : "")),
        make("nav", { "aria-label": "Images" }, step(-1, "Previous"), step(1, "Next"), press("×", "Close", () => dialog.close()))),
      make("div", { class: "what" }, image(of, "eager"), facts),
      maps(0),
    ];
    of[TARGETS].slice(1).forEach((index, before) => {
      parts.push(make("h3", {}, `${target(index)}, ${shownExperiment.score} ${short(of[SCORES][before + 1])}`), maps(before + 1));
    });
    if (of[UNTRAINED]) {
      const own = every.filter((method) => shownExperiment.methods[method].untrained);
      parts.push(make("h3", {}, "The same network untrained"), make("div", { class: "maps" }, ...own.map((method) => {
        const { title } = shownExperiment.methods[method];
        return make("figure", { class: "map" },
          tile(fileOf(of, "-untrained"), method, every.length, `Map of ${title}, untrained`, "eager", "values"),
          make("figcaption", {}, make("span", {}, title)));
      })));
    }
    if (data.units) parts.push(make("p", { class: "note" }, make("a", { href: data.units }, `Units of ${data.network}`)));
    showDialog(dialog, parts);
  }

  function go(position) {
    history.replaceState(null, "", link(images[order[position]]));
    showImage(order[position]);
    dialog.querySelector("nav button:not(:disabled)").focus();
  }

  // The address --------------------------------------------------------------------------------------------------------

  function filters() {
    const words = new URLSearchParams();
    if (fields.experiment.value !== "0") words.set("experiment", shownExperiment.name);
    if (fields.q.value) words.set("q", fields.q.value);
    saveMenus(words, facets, fields);
    if (fields.sort.value !== "hash") words.set("sort", fields.sort.value);
    const methods = wanted();
    if (methods.length < shownExperiment.methods.length) {
      for (const method of methods) words.append("method", shownExperiment.methods[method].name);
      if (!methods.length) words.set("method", "");
    }
    return `#${words}`;
  }

  function readAddress() {
    const words = new URLSearchParams(location.hash.slice(1)), id = words.get("image");
    const named = data.experiments.filter((each) => each.name === words.get("experiment"));
    if (id !== null) {
      for (const experiment of named.length ? named : data.experiments) {
        const index = experiment.images.findIndex((of) => of[ID] === id);
        if (index < 0) continue;
        if (experiment !== shownExperiment) {
          fields.experiment.value = String(data.experiments.indexOf(experiment));
          update();
        }
        return showImage(index);
      }
    }
    if (dialog.open) dialog.close();
    if (["experiment", "q", "sort", "method", ...Object.keys(facets)].some((name) => words.has(name))) {
      choose(named[0] ?? data.experiments[0]);
      fields.q.value = words.get("q") ?? "";
      readMenus(words, facets, fields);
      fields.sort.value = words.get("sort") in orders ? words.get("sort") : "hash";
      const methods = words.getAll("method");
      for (const box of boxes.querySelectorAll("input")) box.checked = !methods.length || methods.includes(box.value);
      update();
    }
  }

  // Start --------------------------------------------------------------------------------------------------------------

  fields.experiment.append(...data.experiments.map(({ name }, index) => make("option", { value: index }, name)));
  const changed = () => {
    update();
    history.replaceState(null, "", filters());
  };
  listen(form, changed);
  more.addEventListener("click", () => showMore()?.querySelector("a").focus({ preventScroll: true }));
  listenDialog(dialog, () => {
    open = -1;
    if (new URLSearchParams(location.hash.slice(1)).has("image")) history.replaceState(null, "", filters());
  }, (by) => {
    const at = order.indexOf(open);
    if (at >= 0 && at + by in order) go(at + by);
  });
  window.addEventListener("hashchange", readAddress);
  for (const place of [list, dialog]) place.style.setProperty("--ratio", data.width / data.height);
  form.hidden = false;
  update();
  readAddress();
})();
