"use strict";
// What the parts of the page share: the data, with names instead of places, and small tools.
const report = (() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);

  const rows = data.rows.map((row, index) => ({
    index,
    case: row.case,
    configuration: data.configurations[row.configuration],
    shown: data.shown[data.configurations[row.configuration]],
    fold: row.fold,
    mean: row.mean,
    classes: row.classes.map(([presence, reference, prediction, ...values], place) => ({
      name: data.classes[place],
      presence: data.presences[presence],
      reference,
      prediction,
      ...Object.fromEntries(data.metrics.map((metric, number) => [metric, values[number]])),
    })),
  }));

  // One entry a case and class whose reference contains the class, as the charts draw them.
  const points = rows.flatMap((row) =>
    row.classes
      .filter((item) => item.reference > 0 && item.presence !== "unannotated")
      .map((item) => ({ ...item, class: item.name, row: row.index, case: row.case, configuration: row.configuration, shown: row.shown, fold: row.fold })),
  );

  function element(name, properties = {}, ...children) {
    const made = Object.assign(document.createElement(name), properties);
    made.append(...children);
    return made;
  }

  function number(value, digits = 3) {
    return value === null || value === undefined ? "–" : value.toFixed(digits);
  }

  function digits(metric) {
    return metric.endsWith("_mm3") ? 0 : metric.endsWith("_mm") ? 2 : 3;
  }

  function several(values, key) {
    return new Set(values.map((value) => value[key])).size > 1;
  }

  function download(name, type, text) {
    const link = element("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  return { data, rows, points, element, number, digits, several, download, listeners: [] };
})();

// A case is chosen by the address (#row-12), so that it can be linked to and the back button works.
report.choose = (index) => {
  document.querySelectorAll("tr.chosen").forEach((other) => other.classList.remove("chosen"));
  document.getElementById(`row-${index}`)?.classList.add("chosen");
  report.listeners.forEach((listener) => listener(report.rows[index]));
};

report.chosenByAddress = () => {
  const found = /^#row-(\d+)$/.exec(location.hash);
  return found && report.rows[Number(found[1])] ? Number(found[1]) : null;
};
