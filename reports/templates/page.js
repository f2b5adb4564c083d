"use strict";
// Draws the charts, in the colours of the scheme that is on; draws them again when it changes.
(() => {
  const { config, figures } = JSON.parse(document.getElementById("plots").textContent);
  const coarse = matchMedia("(pointer: coarse)");
  const narrow = matchMedia("(max-width: 40rem)");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const drawn = new Set();

  // Figures name colours as CSS variables, which SVG attributes do not understand.
  const coloured = (value, style) => {
    if (typeof value === "string") {
      const name = /^var\((--[a-z]+)\)$/.exec(value);
      return name ? style.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((item) => coloured(item, style));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, coloured(v, style)]));
  };

  const draw = (place) => {
    const style = getComputedStyle(document.documentElement);
    const { data, layout } = coloured(figures[place.dataset.chart], style);
    layout.font.family = getComputedStyle(document.body).fontFamily;
    layout.hoverlabel.font.family = layout.font.family;
    layout.dragmode = coarse.matches ? false : "zoom"; // on touch screens a drag scrolls the page
    if (narrow.matches) Object.assign(layout.legend, { entrywidthmode: "fraction", entrywidth: 0.5 });
    Plotly.react(place, data, layout, config);
    drawn.add(place);
  };

  const again = () => drawn.forEach(draw);
  document.querySelectorAll("[data-chart]").forEach(draw);
  dark.addEventListener("change", again);
  narrow.addEventListener("change", again);
  const printed = (on) => {
    document.documentElement.classList.toggle("printed", on); // paper is light in either scheme
    again();
  };
  addEventListener("beforeprint", () => printed(true));
  addEventListener("afterprint", () => printed(false));
})();
