"use strict";
// One case in figures and in the viewer (NiiVue), which is unpacked when it is first asked for.
(() => {
  const section = document.getElementById("viewer");
  if (!section) return;
  const { data, element, number, digits } = report;
  const [choice, figures, stage, note, layers, modes, opacity] =
    ["case-choice", "case-figures", "stage", "viewer-note", "layers", "modes", "opacity"].map((id) => document.getElementById(id));
  const CLASS_COLOURS = ["#35c4ff", "#ff8f1f", "#6fe06f", "#ff6fae", "#ffe14d", "#b48cff", "#3fe0cf", "#ff6b5e", "#c3d94a", "#e6a8ff"];
  const ERRORS = [["missed", "#e60026"], ["added", "#ff00ff"], ["another class", "#ffffff"]];
  const LAYERS = ["reference", "prediction", "error", "uncertainty"];
  const wanted = { prediction: true, reference: false, error: true, uncertainty: false, image: null, mode: "MULTIPLANAR" };
  const arrived = new Map();
  let current = null;
  let shown = null;
  let viewer = null;
  let turn = 0;

  // Side files call this.
  globalThis.autosegVolumes = (key, volumes) => arrived.set(key, volumes);

  function say(text) {
    note.textContent = text;
  }

  async function unpack(base64) {
    const response = await new Response(Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0)).buffer).blob();
    return new Response(response.stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
  }

  async function library() {
    if (globalThis.niivue) return globalThis.niivue;
    const packed = document.getElementById("viewer-library").textContent.trim();
    const script = element("script");
    script.textContent = new TextDecoder().decode(await unpack(packed));
    document.head.append(script);
    return globalThis.niivue;
  }

  function volumesOf(key) {
    if (arrived.has(key)) return Promise.resolve(arrived.get(key));
    const embedded = document.getElementById(`volumes-${key}`);
    if (embedded) {
      arrived.set(key, JSON.parse(embedded.textContent));
      return Promise.resolve(arrived.get(key));
    }
    return new Promise((resolve, reject) => {
      const script = element("script", { src: `volumes/${key}.js` });
      script.addEventListener("load", () => resolve(arrived.get(key)));
      script.addEventListener("error", () => reject(new Error(`volumes/${key}.js is not beside this page`)));
      document.head.append(script);
    });
  }

  function lut(colours, labels) {
    const parts = (from) => [0, ...colours.map((colour) => Number.parseInt(colour.slice(from, from + 2), 16))];
    return { R: parts(1), G: parts(3), B: parts(5), A: [0, ...colours.map(() => 255)], I: [0, ...colours.map((_, place) => place + 1)], labels: ["", ...labels] };
  }

  const classColour = (place) => CLASS_COLOURS[place % CLASS_COLOURS.length];

  async function volume(module, name, base64, kind) {
    const image = await module.NVImage.loadFromUrl({ url: await unpack(base64), name: `${name}.nii`, colormap: kind === "uncertainty" ? "inferno" : "gray" });
    if (kind === "classes") image.setColormapLabel(lut(data.classes.map((_, place) => classColour(place)), data.classes));
    if (kind === "error") image.setColormapLabel(lut(ERRORS.map((item) => item[1]), ERRORS.map((item) => item[0])));
    return image;
  }

  async function makeViewer(module) {
    const canvas = element("canvas", { id: "canvas", tabIndex: 0 });
    canvas.setAttribute("aria-label", "Viewer of the volumes of one case. Arrow keys and page keys move the cross-hair.");
    stage.replaceChildren(canvas);
    const made = new module.Niivue({
      backColor: [0, 0, 0, 1], crosshairColor: [0.45, 0.72, 1, 0.8], crosshairWidth: 0.2, show3Dcrosshair: false, dragAndDropEnabled: false,
      isRadiologicalConvention: true, sagittalNoseLeft: true, logLevel: "error", loadingText: "", showLegend: false, multiplanarShowRender: module.SHOW_RENDER.NEVER,
    });
    await made.attachToCanvas(canvas);
    return made;
  }

  // Overlays are the volumes after the first; where each lies is kept by name.
  async function load(row) {
    const key = data.volumes[row.case];
    const own = ++turn;
    if (!key) {
      stage.replaceChildren(element("p", { className: "note" }, "No volumes of this case: its files are gone, or the viewer holds the worst cases only."));
      viewer = shown = null;
      return;
    }
    say("loading …");
    const [module, volumes] = await Promise.all([library(), volumesOf(key)]);
    viewer ??= await makeViewer(module);
    const predicted = volumes.predictions[row.configuration] ?? {};
    const images = Object.keys(volumes.images);
    if (!images.includes(wanted.image)) wanted.image = images[0];
    const sources = { reference: volumes.reference, ...predicted };
    const names = LAYERS.filter((name) => sources[name]);
    const made = await Promise.all([
      volume(module, wanted.image, volumes.images[wanted.image], "image"),
      ...names.map((name) => volume(module, name, sources[name], name === "error" || name === "uncertainty" ? name : "classes")),
    ]);
    if (own !== turn) return;
    viewer.volumes.slice().reverse().forEach((old) => viewer.removeVolume(old));
    made.forEach((item) => viewer.addVolume(item));
    viewer.setRadiologicalConvention(!volumes.flat);
    viewer.opts.isOrientationTextVisible = !volumes.flat;
    if (volumes.focus[row.configuration]) viewer.scene.crosshairPos = volumes.focus[row.configuration];
    shown = { names, images, flat: volumes.flat };
    offer();
    apply();
    say(`${row.case}, ${row.shown}${volumes.reduced ? "; voxels are joined, to keep this file small" : ""}; cut to the neighbourhood of the labels.`);
  }

  function offer() {
    const box = (name) => {
      const input = element("input", { type: "checkbox", checked: wanted[name] });
      input.dataset.layer = name;
      input.addEventListener("change", () => { wanted[name] = input.checked; apply(); });
      return element("label", {}, input, ` ${name}`);
    };
    const items = shown.names.map(box);
    if (shown.images.length > 1) {
      const select = element("select", { id: "image-choice" }, ...shown.images.map((name) => element("option", { value: name, selected: name === wanted.image }, name)));
      select.addEventListener("change", () => { wanted.image = select.value; load(current); });
      items.push(element("label", {}, "image ", select));
    }
    layers.replaceChildren(...items);
    modes.hidden = Boolean(shown.flat);
  }

  function apply() {
    if (!viewer || !shown) return;
    const mode = shown.flat ? "AXIAL" : wanted.mode;
    viewer.setSliceType(viewer[`sliceType${mode[0]}${mode.slice(1).toLowerCase()}`]);
    // In 3D the image would hide what lies inside it.
    viewer.setOpacity(0, mode === "RENDER" ? 0.02 : 1);
    // Errors cover what lies below, so that their colours stay what the legend says.
    const strength = Number(opacity.value);
    shown.names.forEach((name, place) => viewer.setOpacity(place + 1, !wanted[name] ? 0 : name === "error" ? Math.min(1, 2 * strength) : strength));
    viewer.drawScene();
  }

  function tell(row) {
    const defined = data.metrics.filter((metric) => row.classes.some((item) => item[metric] !== null && item[metric] !== undefined));
    const head = element("tr", {}, element("th", { scope: "col" }, "Class"), element("th", { scope: "col" }, "In"),
      ...defined.map((metric) => element("th", { scope: "col", className: "num" }, data.titles[metric])),
      element("th", { scope: "col", className: "num" }, "Reference (ml)"), element("th", { scope: "col", className: "num" }, "Prediction (ml)"));
    const lines = row.classes.map((item, place) => {
      const swatch = element("span", { className: "swatch" });
      swatch.style.background = classColour(place);
      const alert = item.presence === "missed" || item.presence === "spurious" ? "alert" : "";
      return element("tr", {}, element("th", { scope: "row" }, swatch, item.name), element("td", { className: alert }, { both: "both", missed: "reference only", spurious: "prediction only", absent: "neither", unannotated: "not annotated" }[item.presence]),
        ...defined.map((metric) => element("td", { className: "num" }, number(item[metric], digits(metric)))),
        element("td", { className: "num" }, (item.reference / 1000).toPrecision(3)), element("td", { className: "num" }, (item.prediction / 1000).toPrecision(3)));
    });
    figures.replaceChildren(
      element("h3", { id: "case-title" }, `${row.case} `, element("span", { className: "rank" }, `${row.shown}, fold ${row.fold}, mean Dice ${number(row.mean)}`)),
      element("div", { className: "scroll" }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...lines))),
    );
  }

  function show(row) {
    current = row;
    choice.value = String(row.index);
    tell(row);
    section.classList.add("open");
    load(row).catch((problem) => {
      viewer = shown = null;
      stage.replaceChildren(element("p", { className: "note" }, `The viewer cannot draw here (${problem.message}). It needs WebGL 2 and a browser of 2023 or later.`));
      say("");
    });
  }

  choice.append(...report.rows.map((row) => element("option", { value: String(row.index) }, `${row.case}, ${row.shown}, Dice ${number(row.mean)}`)));
  const go = (index) => { location.hash = `#row-${index}`; };
  choice.addEventListener("change", () => go(choice.value));
  // From case to case: the rows of other configurations lie between.
  const step = (by) => {
    const row = report.rows[Number(choice.value)];
    const same = report.rows.filter((other) => other.configuration === row.configuration);
    go(same[Math.min(same.length - 1, Math.max(0, same.indexOf(row) + by))].index);
  };
  document.getElementById("previous-case").addEventListener("click", () => step(-1));
  document.getElementById("next-case").addEventListener("click", () => step(1));
  opacity.addEventListener("input", apply);
  modes.querySelectorAll("input").forEach((input) => input.addEventListener("change", () => { wanted.mode = input.value; apply(); }));
  report.listeners.push(show);
  // Before anything is chosen: the worst case of what was chosen.
  const first = report.rows.find((row) => row.configuration === report.data.best) ?? report.rows[0];
  if (first) {
    choice.value = String(first.index);
    tell(first);
  }
})();
