"use strict";
// Charts, drawn by Observable Plot. Each has its place in the page, and is left out where the place is.
(() => {
  const { data, points, number, several, element } = report;
  const longest = Math.max(4, ...data.classes.map((name) => name.length));
  let width = 600;

  // One picture for screen readers, which find the figures in the tables. Dots are links to cases; the table of cases
  // has the same links for the keyboard.
  function asPicture(chart) {
    [chart, ...chart.querySelectorAll("svg")].filter((item) => item.ariaLabel).forEach((item) => item.setAttribute("role", "img"));
    chart.querySelectorAll("a").forEach((item) => item.setAttribute("tabindex", "-1"));
    return chart;
  }

  function put(id, options) {
    const place = document.getElementById(id);
    if (!place) return null;
    const label = place.dataset.label;
    const chart = Plot.plot({ width, marginBottom: 42, style: { fontSize: "12px", background: "transparent" }, ariaLabel: label, ...options });
    place.replaceChildren(asPicture(chart));
    return chart;
  }

  const link = (point) => `#row-${point.row}`;

  function metricChart() {
    const choice = document.getElementById("metric");
    if (!choice) return;
    const metric = choice.value;
    const shown = points.filter((point) => point[metric] !== null && point[metric] !== undefined);
    const facets = several(points, "configuration") && width > 600 ? { fx: "configuration", fy: "class" } : { fy: "class" };
    const taken = facets.fx || !several(points, "configuration") ? shown : shown.filter((point) => point.configuration === data.best);
    const values = taken.map((point) => point[metric]);
    const isPart = !metric.includes("_mm") && metric !== "relative_volume_error";
    const domain = isPart ? [Math.min(0.9, ...values), 1] : [Math.min(0, ...values), Math.max(...values, 0)];
    const many = taken.length / Math.max(1, data.classes.length) > 60;
    put("chart-metric", {
      height: 60 + Math.max(1, data.classes.length) * (data.classes.length > 12 ? 48 : 84),
      y: { domain: [0, 1], axis: null },
      marginLeft: Math.min(width > 600 ? 190 : 110, 24 + 7 * longest),
      marginRight: 20,
      x: { label: data.titles[metric], grid: true, domain, nice: true, inset: 5, ticks: facets.fx ? 3 : width > 600 ? undefined : 4 },
      fx: { label: null, tickFormat: (name) => data.shown[name], ...(facets.fx ? { domain: data.configurations } : {}) },
      fy: { label: null, domain: data.classes, axis: "left" },
      marks: [
        Plot.frame({ strokeOpacity: 0.15 }),
        Plot.boxX(taken, { ...facets, x: metric, fillOpacity: 0.15, r: 0 }),
        // Beside each other by a fixed pattern, so that equal cases can be told apart and each stays where it is.
        Plot.dot(taken, {
          ...facets, x: metric, y: (point, place) => 0.2 + 0.6 * ((place * 0.618034) % 1), r: many ? 2.2 : 3.2,
          fill: "var(--accent)", fillOpacity: many ? 0.55 : 0.75, href: link, tip: true,
          title: (point) => `${point.case}\n${point.class}: ${data.titles[metric]} ${number(point[metric], report.digits(metric))}\n${point.shown}, fold ${point.fold}`,
        }),
      ],
    });
  }

  function unitOf(volumes) {
    return Math.max(...volumes) > 1e4 ? ["ml", 1000] : ["mm³", 1];
  }

  const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toPrecision(3)}`;

  // Bland and Altman: difference against mean, with bias and limits of agreement.
  function agreementChart() {
    const shown = points.filter((point) => point.configuration === data.best);
    const known = new Map(data.agreement.map((item) => [item.class, item]));
    const columns = width > 900 ? 3 : width > 600 ? 2 : 1;
    const place = document.getElementById("chart-agreement");
    if (!place) return;
    place.replaceChildren(...data.classes.filter((name) => known.has(name)).map((name) => {
      const own = shown.filter((point) => point.class === name);
      const [unit, size] = unitOf(own.flatMap((point) => [point.reference, point.prediction]));
      const { bias, low, high } = known.get(name);
      const mean = (point) => (point.reference + point.prediction) / 2 / size;
      const difference = (point) => (point.prediction - point.reference) / size;
      const rule = (value, label, dashed) => [
        Plot.ruleY([value / size], { stroke: "currentColor", strokeOpacity: 0.7, strokeDasharray: dashed ? "4 3" : null }),
        Plot.text([value / size], { y: (item) => item, frameAnchor: "right", dy: -7, text: () => `${label}: ${signed(value / size)}`, textAnchor: "end", dx: -4, fill: "currentColor", stroke: "var(--back)", strokeWidth: 4 }),
      ];
      const chart = Plot.plot({
        width: Math.floor(width / columns) - 12, height: 260, marginLeft: 58, marginBottom: 42, marginTop: 24,
        style: { fontSize: "12px", background: "transparent" },
        ariaLabel: `${name}: predicted minus reference volume against their mean; bias ${(bias / size).toPrecision(3)} ${unit}`,
        x: { label: `mean of both (${unit})`, grid: true, nice: true, ticks: 5 },
        y: { label: `predicted − reference (${unit})`, grid: true, nice: true },
        marks: [
          ...rule(bias, "bias", false), ...rule(low, "−1.96 SD", true), ...rule(high, "+1.96 SD", true),
          Plot.dot(own, {
            x: mean, y: difference, r: 3, fill: "var(--accent)", fillOpacity: 0.7, href: link, tip: true,
            title: (point) => `${point.case}\nreference ${(point.reference / size).toPrecision(4)} ${unit}\nprediction ${(point.prediction / size).toPrecision(4)} ${unit}`,
          }),
        ],
      });
      return element("figure", { className: "small" }, element("figcaption", {}, name), asPicture(chart));
    }));
  }

  function confusionChart() {
    if (!data.confusions.length) return;
    const names = ["background", ...data.classes];
    const totals = new Map();
    data.confusions.forEach((one) => totals.set(one.reference, (totals.get(one.reference) ?? 0) + one.voxels));
    // Background taken for background is not counted, so its row has no parts that mean anything.
    const cells = data.confusions
      .filter((one) => one.reference !== "background")
      .map((one) => ({ ...one, part: one.voxels / totals.get(one.reference) }));
    const small = names.length > 14 || width < 600;
    const size = Math.min(64, Math.max(18, (width - 150) / names.length));
    const isTurned = names.length > 4 || small;
    const below = isTurned ? Math.min(120, 30 + 5 * longest) : 44;
    put("chart-confusion", {
      width: Math.min(width, 170 + size * names.length), height: 20 + below + size * 0.75 * data.classes.length,
      marginLeft: Math.min(small ? 110 : 170, 24 + 7 * longest), marginTop: 20, marginBottom: below, padding: 0.04,
      x: { domain: names, label: "predicted as", tickRotate: isTurned ? -40 : 0 },
      y: { domain: data.classes, label: "reference" },
      opacity: { type: "sqrt", domain: [0, 1], range: [0, 1] },
      marks: [
        Plot.cell(cells, {
          x: "prediction", y: "reference", fill: "var(--accent)", fillOpacity: "part",
          title: (cell) => `${cell.reference} predicted as ${cell.prediction}: ${(100 * cell.part).toFixed(2)} % (${cell.voxels.toLocaleString("en")} voxels)`, tip: true,
        }),
        small ? null : Plot.text(cells, {
          x: "prediction", y: "reference", text: (cell) => (cell.part < 0.0005 ? "" : `${(100 * cell.part).toFixed(1)} %`),
          fill: (cell) => (cell.part > 0.3 ? "var(--on-accent)" : "var(--ink)"),
        }),
      ],
    });
  }

  function calibrationChart() {
    if (!data.calibration.length) return;
    const facets = several(data.calibration, "configuration") ? { [width > 600 ? "fx" : "fy"]: "configuration" } : {};
    put("chart-calibration", {
      height: 340, marginLeft: 52, marginRight: width > 600 ? 20 : 90,
      color: { legend: true, domain: data.classes }, symbol: { legend: true, domain: ["before", "after"] },
      x: { domain: [0, 1], label: "mean probability", grid: true }, y: { domain: [0, 1], label: "part that is the class", grid: true },
      fx: { label: null }, fy: { label: null },
      marks: [
        Plot.line([[0, 0], [1, 1]], { strokeOpacity: 0.5 }),
        Plot.line(data.calibration, {
          ...facets, x: "confidence", y: "frequency", stroke: "class", z: (point) => point.class + point.when,
          strokeOpacity: (point) => (point.when === "after" ? 1 : 0.35),
        }),
        Plot.dot(data.calibration, {
          ...facets, x: "confidence", y: "frequency", stroke: "class", symbol: "when", r: 3, tip: true,
          title: (point) => `${point.class}, ${point.when}\nprobability ${number(point.confidence)}, right in ${number(point.frequency)}\n${point.voxels.toLocaleString("en")} voxels`,
        }),
      ],
    });
  }

  function uncertaintyChart() {
    const rows = new Map(report.rows.filter((row) => row.configuration === data.best).map((row) => [row.case, row]));
    const shown = data.confidences.filter((item) => item.entropy !== null && rows.get(item.case)?.mean != null)
      .map((item) => ({ ...item, row: rows.get(item.case).index, mean: rows.get(item.case).mean }));
    if (!shown.length) return;
    put("chart-uncertainty", {
      height: 320, marginLeft: 52, marginRight: 20,
      x: { label: "uncertainty (mean entropy of the predicted foreground)", grid: true, nice: true }, y: { label: "mean Dice", grid: true, nice: true },
      marks: [Plot.dot(shown, {
        x: "entropy", y: "mean", r: 3, fill: "var(--accent)", fillOpacity: 0.7, href: link, tip: true,
        title: (item) => `${item.case}\nDice ${number(item.mean)}, expected ${number(item.expected)}\nuncertainty ${number(item.entropy)}\nsure errors ${number(item.sure)}`,
      })],
    });
  }

  function curveChart(id, label, keys) {
    const known = data.epochs.filter((epoch) => keys.some((key) => epoch[key] !== null));
    const facet = several(data.epochs, "configuration") ? { [width > 600 ? "fx" : "fy"]: "configuration" } : {};
    if (!known.length) return;
    put(id, {
      height: facet.fy ? 420 : 280, marginLeft: 56, marginRight: facet.fy ? 90 : 20,
      color: { type: "categorical", legend: several(data.epochs, "fold"), tickFormat: (fold) => `fold ${fold}` },
      x: { label: "training time (min)", grid: true }, y: { label, grid: true, nice: true }, fx: { label: null }, fy: { label: null },
      marks: keys.flatMap((key, place) => {
        const own = known.filter((epoch) => epoch[key] !== null);
        return [
          Plot.lineY(own, { ...facet, x: "minutes", y: key, z: "fold", stroke: "fold", strokeDasharray: place ? "4 3" : null }),
          Plot.dot(own, {
            ...facet, x: "minutes", y: key, fill: "fold", r: 1.5, tip: true,
            title: (epoch) => `${epoch.configuration}, fold ${epoch.fold}, epoch ${epoch.epoch}\n${key} ${number(epoch[key], 4)}`,
          }),
        ];
      }),
    });
  }

  report.draw = () => {
    width = Math.max(260, Math.min(1120, document.querySelector("main").clientWidth - 40));
    metricChart();
    agreementChart();
    confusionChart();
    calibrationChart();
    uncertaintyChart();
    curveChart("chart-dice", "Dice on patches", ["dice"]);
    curveChart("chart-loss", "loss", ["training", "validation"]);
    curveChart("chart-seconds", "seconds an epoch", ["seconds"]);
    curveChart("chart-memory", "memory so far (GB)", ["gigabytes"]);
  };
  document.getElementById("metric")?.addEventListener("change", metricChart);
})();
