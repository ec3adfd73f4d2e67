"use strict";
// Draws the charts in the page's colours, and lets the arrow keys read heat maps out.
const specs = JSON.parse(document.getElementById("specs").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const drawn = new Map();

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function config() {
  const text = { labelColor: colour("faint"), titleColor: colour("ink"), titleFontWeight: "normal", labelFontSize: 12, titleFontSize: 12, titlePadding: 8 };
  return {
    background: null,
    font: "system-ui, sans-serif",
    view: { stroke: null },
    axis: { ...text, gridColor: colour("line"), domainColor: colour("line"), tickColor: colour("line") },
    axisBand: { grid: false },
    legend: { ...text, layout: { bottom: { anchor: "start", direction: "vertical" } } },
    range: { category: ["first", "second", "third", "fourth", "fifth", "sixth"].map(colour) },
  };
}

async function draw(id) {
  const options = { actions: false, ast: true, renderer: "svg", config: config(), tooltip: { theme: dark.matches ? "dark" : "light" } };
  drawn.get(id)?.finalize();
  const element = document.getElementById(id);
  const result = await vegaEmbed(element, specs[id], options);
  drawn.set(id, result);
  if (element.classList.contains("heat")) {
    result.view.addEventListener("click", (event, item) => item?.datum?.module && point(element, item.datum.row, item.datum.expert));
  }
}

function point(element, row, expert) {
  const layer = specs[element.id].datasets.layers[row];
  const { view } = drawn.get(element.id);
  element.dataset.row = row;
  element.dataset.expert = expert;
  view.signal("at_row", row).signal("at_expert", expert).runAsync();
  const share = layer.routes ? layer.tokens[expert] / layer.routes : 0;
  element.parentElement.querySelector("output").textContent =
    `layer ${layer.layer}, expert ${expert}: width ${layer.width[expert]} of ${layer.full}, routing share ${(100 * share).toFixed(2)}%`;
}

function move(event) {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!step || !drawn.has(event.currentTarget.id)) return;
  event.preventDefault();
  const element = event.currentTarget;
  const layers = specs[element.id].datasets.layers;
  const isNew = element.dataset.row === undefined;
  const row = isNew ? 0 : Math.min(Math.max(Number(element.dataset.row) + step[0], 0), layers.length - 1);
  const expert = isNew ? 0 : Number(element.dataset.expert) + step[1];
  point(element, row, Math.min(Math.max(expert, 0), layers[row].width.length - 1));
}

for (const element of document.querySelectorAll(".heat")) element.addEventListener("keydown", move);
async function drawAll() {
  for (const id of Object.keys(specs)) await draw(id);
  document.body.dataset.drawn = "yes";
}
dark.addEventListener("change", drawAll);
drawAll();
