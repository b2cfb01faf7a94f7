"use strict";
// Last of all: draw, answer to the address, and make ready for paper.
(() => {
  document.querySelectorAll("input[data-contour]").forEach((box) => {
    box.addEventListener("change", () => document.body.classList.toggle(`hide-${box.dataset.contour}`, !box.checked));
  });

  function follow() {
    const index = report.chosenByAddress();
    if (index === null) return;
    report.choose(index);
    document.getElementById("viewer")?.scrollIntoView();
  }
  addEventListener("hashchange", follow);

  report.draw();
  let waiting;
  let width = document.querySelector("main").clientWidth;
  addEventListener("resize", () => {
    if (document.querySelector("main").clientWidth === width) return;
    width = document.querySelector("main").clientWidth;
    clearTimeout(waiting);
    waiting = setTimeout(report.draw, 150);
  });

  // On paper everything is open.
  const opened = [];
  addEventListener("beforeprint", () => {
    const closed = [...document.querySelectorAll("details:not([open])")];
    closed.forEach((item) => { item.open = true; });
    opened.push(...closed);
  });
  addEventListener("afterprint", () => opened.splice(0).forEach((item) => { item.open = false; }));

  follow();
})();
