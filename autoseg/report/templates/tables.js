"use strict";
// Tables: sorting by a click on a head, and the filter and downloads of the table of cases.
(() => {
  function key(cell) {
    const text = (cell.dataset.value ?? cell.textContent).trim();
    const value = Number.parseFloat(text);
    if (text === "–" || text === "") return Number.POSITIVE_INFINITY;
    return cell.classList.contains("num") ? value : text;
  }

  function compare(a, b) {
    return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
  }

  function sortBy(table, column) {
    const heads = [...table.tHead.rows[0].cells];
    const up = heads[column].getAttribute("aria-sort") !== "ascending";
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows].map((row) => [key(row.cells[column]), row]);
    // What is not defined stays at the end both ways.
    const known = rows.filter((pair) => pair[0] !== Number.POSITIVE_INFINITY);
    known.sort((a, b) => (up ? compare(a[0], b[0]) : compare(b[0], a[0])));
    const unknown = rows.filter((pair) => pair[0] === Number.POSITIVE_INFINITY);
    table.tBodies[0].append(...[...known, ...unknown].map((pair) => pair[1]));
  }

  function makeSortable(table) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = report.element("button", { type: "button", className: "sort" }, ...head.childNodes);
      button.addEventListener("click", () => sortBy(table, column));
      head.append(button);
    });
  }

  document.querySelectorAll("table.sortable").forEach(makeSortable);

  const table = document.getElementById("case-table");
  if (!table) return;
  const rows = [...table.tBodies[0].rows];
  const [find, configuration, flagged, below] = ["find", "configuration", "flagged", "below"].map((id) => document.getElementById(id));
  const count = document.getElementById("count");

  function isWanted(row) {
    const item = report.rows[row.dataset.row];
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    const text = `${item.case} ${item.shown} fold ${item.fold}`.toLowerCase();
    const limit = below.value === "" ? Infinity : Number(below.value);
    return (
      words.every((word) => text.includes(word)) &&
      (configuration.value === "" || configuration.value === item.configuration) &&
      (!flagged.checked || item.classes.some((one) => one.presence === "missed" || one.presence === "spurious")) &&
      (limit === Infinity || (item.mean !== null && item.mean < limit))
    );
  }

  function filter() {
    rows.forEach((row) => { row.hidden = !isWanted(row); });
    const shown = rows.filter((row) => !row.hidden).length;
    count.textContent = shown === rows.length ? `${rows.length} rows` : `${shown} of ${rows.length} rows`;
  }

  // As the table stands: its order, and without the rows that are filtered away.
  function visible() {
    return [...table.tBodies[0].rows].filter((row) => !row.hidden).map((row) => report.rows[row.dataset.row]);
  }

  function csv() {
    const columns = ["presence", "reference", "prediction", ...report.data.metrics];
    const head = ["case", "configuration", "fold", "mean_dice", "class", "presence", "reference_mm3", "prediction_mm3", ...report.data.metrics];
    const lines = visible().flatMap((row) =>
      row.classes.map((item) => [row.case, row.configuration, row.fold, row.mean, item.name, ...columns.map((name) => item[name])]),
    );
    const cell = (value) => {
      const text = value === null || value === undefined ? "" : String(value);
      return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    return [head, ...lines].map((line) => line.map(cell).join(",")).join("\n") + "\n";
  }

  // Once one was chosen, its cases are what pictures and findings speak of; the others are a choice away.
  const chosen = configuration.querySelector("[data-chosen]");
  if (chosen) {
    configuration.value = chosen.value;
    filter();
  }

  [find, below].forEach((input) => input.addEventListener("input", filter));
  [configuration, flagged].forEach((input) => input.addEventListener("change", filter));
  document.getElementById("download-csv").addEventListener("click", () => report.download("cases.csv", "text/csv", csv()));
  document.getElementById("download-json").addEventListener("click", () =>
    report.download("cases.json", "application/json", JSON.stringify(visible().map(({ index, shown, ...row }) => row), null, 1)),
  );
})();
