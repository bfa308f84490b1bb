// Formulas within a line do not break. One that is wider than its line gets a line of its own, which scrolls;
// boxes that scroll can be reached with the keyboard.
(() => {
  const boxes = ".bd-article :is(div.math, .table-scroll, .pst-scrollable-table-container, mjx-container.wide)";

  function fit() {
    for (const formula of document.querySelectorAll('.bd-article mjx-container:not([display="true"])')) {
      formula.classList.remove("wide");
      const line = formula.parentElement.closest("p, li, dd, dt, figcaption, div, h1, h2, h3, td, th");
      if (line && !line.matches("td, th") && formula.scrollWidth > line.clientWidth) formula.classList.add("wide");
    }
    for (const box of document.querySelectorAll(boxes)) {
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    }
  }

  window.addEventListener("load", () => {
    const ready = window.MathJax && window.MathJax.startup && window.MathJax.startup.promise;
    Promise.resolve(ready).then(fit);
    let waiting;
    window.addEventListener("resize", () => {
      clearTimeout(waiting);
      waiting = setTimeout(fit, 200);
    });
  });
})();
