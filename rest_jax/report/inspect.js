(function () {
  // Each source is a tbody of its own, so that its samples stay with it however the table is sorted.
  function find(input) {
    const wanted = input.value.trim().toLowerCase();
    const bodies = [...document.getElementById(input.dataset.table).tBodies];
    let shown = 0;
    for (const body of bodies) {
      const matches = body.textContent.toLowerCase().includes(wanted);
      body.hidden = !matches;
      shown += matches ? 1 : 0;
      const samples = body.querySelector("details");
      samples.open = wanted !== "" && matches && samples.textContent.toLowerCase().includes(wanted);
    }
    const output = input.parentElement.querySelector("output");
    output.value = wanted === "" ? "" : shown + " of " + bodies.length + " sources";
  }

  // What has no value stays at the end in both directions.
  function compare(left, right, sign) {
    if (left === "" || right === "") return (left === "" ? 1 : 0) - (right === "" ? 1 : 0);
    const difference = Number(left) - Number(right);
    return sign * (Number.isNaN(difference) ? left.localeCompare(right) : difference);
  }

  function sort(heading) {
    const table = heading.closest("table");
    const column = heading.cellIndex;
    const sign = heading.getAttribute("aria-sort") === "descending" ? 1 : -1;
    for (const other of heading.parentElement.cells) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const value = (body) => body.rows[0].cells[column].dataset.value;
    const bodies = [...table.tBodies].sort((left, right) => compare(value(left), value(right), sign));
    table.append(...bodies);
  }

  for (const input of document.querySelectorAll(".finder input")) {
    input.addEventListener("input", () => find(input));
  }
  for (const button of document.querySelectorAll(".sources thead button")) {
    button.addEventListener("click", () => sort(button.parentElement));
  }
})();
