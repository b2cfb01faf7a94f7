"use strict";
(() => {
  const data = JSON.parse(document.getElementById("chart-data").textContent);
  const width = Math.min(1100, document.querySelector("main").clientWidth - 32);
  const wide = width > 600;
  const longest = Math.max(4, ...data.classes.map((name) => name.length));
  const base = { width, style: { fontSize: "12px", background: "transparent" }, marginLeft: Math.min(180, 24 + 7 * longest), marginBottom: 42 };
  const several = (values, key) => new Set(values.map((value) => value[key])).size > 1;

  function put(id, chart) {
    const place = document.getElementById(id);
    if (place) place.append(chart);
  }

  function choose(row) {
    const line = document.getElementById(`row-${row}`);
    document.querySelectorAll("tr.chosen").forEach((other) => other.classList.remove("chosen"));
    line.hidden = false;
    line.classList.add("chosen");
    line.scrollIntoView({ block: "center" });
    line.focus({ preventScroll: true });
  }

  function diceChart() {
    const facets = several(data.points, "configuration") ? { fx: "configuration", fy: "class" } : { fy: "class" };
    const lowest = Math.min(0.9, ...data.points.map((point) => point.dice));
    const chart = Plot.plot({
      ...base,
      height: 60 + Math.max(1, data.classes.length) * 90,
      marginRight: 20,
      x: { label: "Dice", grid: true, domain: [lowest, 1], nice: true },
      fx: { label: null },
      fy: { label: null, domain: data.classes, axis: "left" },
      marks: [
        Plot.frame({ strokeOpacity: 0.15 }),
        Plot.boxX(data.points, { ...facets, x: "dice", fillOpacity: 0.15, r: 0 }),
        Plot.dot(data.points, Plot.dodgeY("middle", {
          ...facets, x: "dice", r: 3, fill: "var(--accent)", fillOpacity: 0.7, tip: true,
          title: (point) => `${point.case}\n${point.class}: Dice ${point.dice.toFixed(3)}\nfold ${point.fold}`,
        })),
      ],
    });
    chart.style.cursor = "pointer";
    chart.addEventListener("click", () => chart.value && choose(chart.value.row));
    put("chart-dice", chart);
  }

  function volumeChart() {
    const points = data.points.filter((point) => point.reference > 0);
    const most = Math.max(...points.flatMap((point) => [point.reference, point.prediction]));
    const [unit, size] = most > 1e5 ? ["ml", 1000] : ["mm³", 1];
    const chart = Plot.plot({
      ...base, width: Math.min(width, 620), height: 420, marginLeft: 64, marginRight: 16,
      color: { legend: data.classes.length > 1, domain: data.classes },
      x: { label: `reference (${unit})`, grid: true, domain: [0, most / size], nice: true },
      y: { label: `prediction (${unit})`, grid: true, domain: [0, most / size], nice: true },
      marks: [
        Plot.line([[0, 0], [most / size, most / size]], { strokeOpacity: 0.5 }),
        Plot.dot(points, {
          x: (point) => point.reference / size, y: (point) => point.prediction / size, stroke: "class", r: 3, tip: true,
          title: (point) => `${point.case}, ${point.class}\nreference ${(point.reference / size).toPrecision(4)} ${unit}\n` +
            `prediction ${(point.prediction / size).toPrecision(4)} ${unit}`,
        }),
      ],
    });
    put("chart-volume", chart);
  }

  function curveChart(id, label, marks) {
    const facet = several(data.epochs, "configuration");
    put(id, Plot.plot({
      ...base, height: facet && !wide ? 460 : 300, marginLeft: 52, marginRight: facet && !wide ? 90 : 20,
      color: { type: "categorical", legend: several(data.epochs, "fold"), tickFormat: (fold) => `fold ${fold}` },
      x: { label: "training time (min)", grid: true }, y: { label, grid: true }, fx: { label: null }, fy: { label: null },
      marks: marks(facet ? { [wide ? "fx" : "fy"]: "configuration" } : {}),
    }));
  }

  function curves() {
    const known = (key) => data.epochs.filter((epoch) => epoch[key] !== null);
    const line = (key, options) => [
      Plot.lineY(known(key), { x: "minutes", y: key, z: "fold", stroke: "fold", ...options }),
      Plot.dot(known(key), {
        x: "minutes", y: key, fill: "fold", r: 1.5, ...options, strokeDasharray: undefined, tip: true,
        title: (epoch) => `${epoch.configuration}, fold ${epoch.fold}, epoch ${epoch.epoch}\n${key} ${epoch[key].toFixed(4)}`,
      }),
    ];
    curveChart("chart-pseudo-dice", "Dice on patches", (facet) => line("dice", facet));
    curveChart("chart-loss", "loss", (facet) => [
      ...line("training", facet), ...line("validation", { ...facet, strokeDasharray: "4 3" }),
    ]);
  }

  function key(cell) {
    const text = cell.textContent.trim();
    const number = Number.parseFloat(text);
    if (text === "–") return Number.POSITIVE_INFINITY;
    return cell.classList.contains("num") ? number : text;
  }

  function compare(a, b) {
    return typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
  }

  function sortBy(table, column) {
    const heads = [...table.tHead.rows[0].cells];
    const up = heads[column].getAttribute("aria-sort") !== "ascending";
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows].map((row) => [key(row.cells[column]), row]);
    rows.sort((a, b) => (up ? compare(a[0], b[0]) : compare(b[0], a[0])));
    table.tBodies[0].append(...rows.map((pair) => pair[1]));
  }

  function tables() {
    document.querySelectorAll("table.sortable").forEach((table) => {
      [...table.tHead.rows[0].cells].forEach((head, column) => {
        const button = document.createElement("button");
        button.type = "button";
        button.append(...head.childNodes);
        button.addEventListener("click", () => sortBy(table, column));
        head.append(button);
      });
    });
    const find = document.getElementById("find");
    if (!find) return;
    const rows = [...document.getElementById("case-table").tBodies[0].rows];
    find.addEventListener("input", () => {
      const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
      rows.forEach((row) => {
        const text = [0, 1, 2].map((index) => row.cells[index].textContent.toLowerCase()).join(" ");
        row.hidden = !words.every((word) => text.includes(word));
      });
      document.getElementById("count").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
    });
  }

  document.querySelectorAll("input[data-contour]").forEach((box) => {
    box.addEventListener("change", () => document.body.classList.toggle(`hide-${box.dataset.contour}`, !box.checked));
  });
  tables();
  if (data.points.length) {
    diceChart();
    volumeChart();
  }
  if (data.epochs.length) curves();
})();
