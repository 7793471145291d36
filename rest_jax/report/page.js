"use strict";
(function () {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const settings = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false };
  const narrow = window.matchMedia("(max-width: 40rem)");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  // Colours are written as the names of custom properties ("$blue"), so that charts follow light and dark.
  function coloured(value, key, style) {
    if (Array.isArray(value)) return value.map((inner) => coloured(inner, key, style));
    if (value !== null && typeof value === "object") {
      const entries = Object.entries(value).map(([name, inner]) => [name, coloured(inner, name, style)]);
      return Object.fromEntries(entries);
    }
    const isColour = typeof value === "string" && value[0] === "$" && /color$/.test(key);
    return isColour ? style.getPropertyValue("--" + value.slice(1)).trim() : value;
  }

  function draw() {
    const style = getComputedStyle(document.documentElement);
    for (const [id, figure] of Object.entries(figures)) {
      const { data, layout } = coloured(figure, "", style);
      const place = document.getElementById(id);
      layout.height = place.clientHeight;
      if (narrow.matches) {
        layout.font.size = 12;
        layout.margin = { ...layout.margin, l: 44, r: 8 };
      }
      Plotly.react(place, data, layout, settings);
    }
  }

  draw();
  dark.addEventListener("change", draw);
  narrow.addEventListener("change", draw);
})();
