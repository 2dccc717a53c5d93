"use strict";
// Draws the pictures and keeps their text in the theme's colours: the page's, and the light ones on paper.
(async () => {
  const specifications = JSON.parse(document.getElementById("specifications").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const views = (window.pictures = {});
  const names = ["ink", "muted", "rule"];

  const light = Object.values(specifications)[0]?.params ?? [];
  const ofPaper = () => Object.fromEntries(light.map(({ name, value }) => [name, value]));
  const ofPage = () => {
    const style = getComputedStyle(document.documentElement);
    return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
  };
  const paint = (colours) => {
    for (const view of Object.values(views)) {
      for (const name of names) view.signal(name, colours[name]);
      view.run();
    }
  };

  for (const [name, specification] of Object.entries(specifications)) {
    const holder = document.getElementById(`${name}-drawing`);
    try {
      // The heat map has tens of thousands of cells: too many for SVG, which prints sharper.
      const renderer = name === "channels" ? "canvas" : "svg";
      // ast: expressions are interpreted, so the page needs no eval and its security policy can forbid it.
      const options = { mode: "vega-lite", actions: false, ast: true, renderer };
      const result = await vegaEmbed(holder, specification, options);
      views[name] = result.view;
    } catch (error) {
      holder.textContent = `This picture could not be drawn: ${error.message}`;
      console.error(error);
    }
  }
  paint(ofPage());
  dark.addEventListener("change", () => paint(ofPage()));
  window.addEventListener("beforeprint", () => paint(ofPaper()));
  window.addEventListener("afterprint", () => paint(ofPage()));
  document.documentElement.dataset.drawn = Object.keys(views).join(" ");
})();
