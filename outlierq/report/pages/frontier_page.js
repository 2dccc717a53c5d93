"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const size = (point) => point.bytes + data.other_bytes;
const bytes = (n) => (n >= 2 ** 30 ? (n / 2 ** 30).toFixed(2) + " GiB" : (n / 2 ** 20).toFixed(2) + " MiB");
const loss = (value) => (value < 1e-12 ? "0" : value.toPrecision(3));
const chosenAt = (index) => {
  const chosen = data.layers.map((layer) => layer.start);
  for (const point of data.points.slice(1, index + 1)) chosen[point.layer] = point.choice;
  return chosen;
};
const onCard = (point, context) => point.bytes + data.loaded_bytes + data.cache_bytes_per_token * context;

function drawCurve() {
  const known = data.points.filter((point) => point.loss > 0);
  const xs = known.map((point) => Math.log(size(point)));
  const ys = known.map((point) => Math.log(point.loss));
  const scale = (value, values, low, high) => {
    const span = Math.max(...values) - Math.min(...values) || 1;
    return low + ((value - Math.min(...values)) / span) * (high - low);
  };
  const place = (point) => [
    scale(Math.log(size(point)), xs, 10, 990),
    scale(Math.log(Math.max(point.loss, Math.exp(Math.min(...ys)))), ys, 210, 10),
  ];
  const make = (name) => document.createElementNS("http://www.w3.org/2000/svg", name);
  const path = make("path");
  path.setAttribute("d", known.map((point, n) => (n ? "L" : "M") + place(point).join(" ")).join(""));
  path.setAttribute("vector-effect", "non-scaling-stroke");
  const mark = make("path"); // a round end of no line: a circle would be stretched with the picture
  mark.setAttribute("class", "mark");
  mark.setAttribute("vector-effect", "non-scaling-stroke");
  at("curve").append(path, mark);
  const ends = [known[0], known[known.length - 1]].sort((one, other) => size(one) - size(other));
  ["least", "most"].forEach((id, n) => (at(id).textContent = `${bytes(size(ends[n]))}, loss ${loss(ends[n].loss)}`));
  return (point) => mark.setAttribute("d", `M${place(point).join(" ")}h0`);
}

function drawTable(chosen) {
  const kinds = [...new Set(data.layers.map((layer) => kindOf(layer)))];
  const blocks = [...new Set(data.layers.map((layer) => layer.block))];
  const found = new Map(data.layers.map((layer, n) => [layer.block + " " + kindOf(layer), n]));
  const cell = (tag, text, css) => {
    const made = document.createElement(tag);
    made.textContent = text;
    if (css) made.className = css;
    return made;
  };
  const row = (parts) => {
    const made = document.createElement("tr");
    made.append(...parts);
    return made;
  };
  const rows = blocks.map((block) =>
    row([
      cell("th", block === null ? "whole model" : "block " + block),
      ...kinds.map((kind) => {
        const n = found.get(block + " " + kind);
        if (n === undefined) return cell("td", "", "cell");
        const choice = data.layers[n].choices[chosen[n]];
        const made = cell("td", choice.scheme, "cell");
        const bits = Math.min((8 * choice.bytes) / data.layers[n].weights, 12);
        made.style.background = `color-mix(in srgb, var(--accent) ${Math.round(bits * 5)}%, var(--paper))`;
        made.title = "adds " + loss(choice.loss);
        return made;
      }),
    ]),
  );
  at("table").replaceChildren(row([cell("th", ""), ...kinds.map((kind) => cell("th", kind))]), ...rows);
}

function kindOf(layer) {
  return [...new Set(layer.modules.map((name) => name.split(".").pop()))].join(" ");
}

function recipeOf(chosen) {
  const quoted = (value) => (typeof value === "string" ? JSON.stringify(value) : String(value));
  const lines = data.layers.flatMap((layer, n) =>
    layer.modules.map((module) => {
      const keys = Object.entries(layer.choices[chosen[n]].keys).map(([key, value]) => `${key}: ${quoted(value)}`);
      return `  - {match: ${quoted(module)}, ${keys.join(", ")}}`;
    }),
  );
  return data.recipe_text.replace("  overrides: []", () => "  overrides:\n" + lines.join("\n"));
}

const markCurve = drawCurve();
function show(index) {
  const point = data.points[index];
  const chosen = chosenAt(index);
  const context = Number(at("context").value) || 0;
  at("budget").value = index;
  at("figure-size").textContent = bytes(size(point));
  at("remark-size").textContent = size(point).toLocaleString("en") + " bytes";
  at("figure-bits").textContent = point.bits.toFixed(3);
  at("figure-loss").textContent = loss(point.loss);
  at("remark-loss").textContent = index + 1 < data.points.length ? "" : "nothing is lost beyond this size";
  at("figure-card").textContent = bytes(onCard(point, context) / 0.9);
  at("remark-card").textContent = `weights and ${context.toLocaleString("en")} tokens of cache are 90 % of it`;
  at("command-text").textContent =
    `outlierq fit ${data.model} --stats ${data.stats} --bits ${Math.ceil(point.bits * 1e4) / 1e4} ` +
    `--client ${data.client_name} -o OUT`;
  at("recipe-text").textContent = recipeOf(chosen);
  markCurve(point);
  drawTable(chosen);
}

function last(fits) {
  let index = 0;
  data.points.forEach((point, n) => {
    if (fits(point)) index = n;
  });
  show(index);
}

at("budget").max = data.points.length - 1;
at("budget").addEventListener("input", (event) => show(Number(event.target.value)));
at("size").addEventListener("input", (event) => last((point) => size(point) <= Number(event.target.value)));
at("bits").addEventListener("input", (event) => last((point) => point.bits <= Number(event.target.value)));
const card = () => {
  const room = Number(at("card").value) * 2 ** 30 * 0.9;
  last((point) => onCard(point, Number(at("context").value) || 0) <= room);
};
at("card").addEventListener("input", card);
at("context").addEventListener("input", () => (at("card").value ? card() : show(Number(at("budget").value))));
last((point) => point.bits <= 4.5);
