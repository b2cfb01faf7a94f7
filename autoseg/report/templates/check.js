"use strict";
// Filters the table of findings and the cases by severity, kind and words. Without this script everything is shown.
(() => {
  const boxes = [...document.querySelectorAll("input[name=severity]")];
  const kind = document.getElementById("kind");
  const words = document.getElementById("find");
  const rows = [...document.querySelectorAll("#findings-table tbody tr")];
  const cards = [...document.querySelectorAll(".card")];
  const outlines = document.getElementById("outlines");

  function update() {
    const wanted = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    const text = words.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const fits = wanted.has(row.dataset.severity) && (!kind.value || row.dataset.kind === kind.value)
        && (!text || row.textContent.toLowerCase().includes(text));
      row.hidden = !fits;
      shown += fits;
    }
    document.getElementById("count").textContent = `${shown} of ${rows.length} findings`;
    let cases = 0;
    for (const card of cards) {
      const marks = card.dataset.marks ? card.dataset.marks.split(" ").map((mark) => mark.split(":")) : [];
      // Cases that nothing was found in are there as long as nothing is chosen.
      const fits = (marks.some(([severity, code]) => wanted.has(severity) && (!kind.value || code === kind.value))
        || (!marks.length && !kind.value && wanted.size === boxes.length))
        && (!text || card.textContent.toLowerCase().includes(text));
      card.hidden = !fits;
      cases += fits;
    }
    document.getElementById("case-count").textContent = `${cases} of ${cards.length} cases`;
  }

  for (const control of [...boxes, kind, words]) control.addEventListener("input", update);
  for (const button of document.querySelectorAll("button[data-kind]")) {
    button.hidden = false;
    button.addEventListener("click", () => {
      kind.value = kind.value === button.dataset.kind ? "" : button.dataset.kind;
      update();
    });
  }
  if (outlines) outlines.addEventListener("input", () => document.body.classList.toggle("hide-outlines", !outlines.checked));
  for (const tools of document.querySelectorAll(".tools")) tools.hidden = false;
  update();
})();
