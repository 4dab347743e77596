"use strict";
// The map of layers and heads, of the page and of `moh explore`. A layer is {heads, routed, shared}: its number of heads,
// whether tokens choose among them, and the indices of those that all tokens use.

const kindOf = (layer, head) => (!layer.routed ? "dense" : layer.shared.includes(head) ? "shared" : "routed");

function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("--")) made.style.setProperty(name, value);
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/**
 * Fill a box with the map and its legend.
 *
 * `choose(layer, head)` is called for a head that is clicked or reached by an arrow key, and should shade the map with it;
 * without it the map is only shown.
 */
function headMap(box, layers, choose = null) {
  const most = Math.max(...layers.map((layer) => layer.heads));
  const grid = make("div", { class: "grid", role: "grid", "aria-label": "layers and heads" });
  grid.style.gridTemplateColumns = `auto repeat(${most}, auto)`;
  grid.style.setProperty("--cell", most > 20 ? "10px" : most > 12 ? "16px" : "26px");
  grid.style.setProperty("--cell-height", layers.length > 16 ? "12px" : "18px");
  const label = (head) => (most <= 12 || head % 4 === 0 ? `${head}` : "");
  grid.append(make("div", { class: "row", "aria-hidden": "true" }, make("span"),
    ...Array.from({ length: most }, (_, head) => make("span", { class: "number" }, label(head)))));
  const cells = layers.map((layer, l) => {
    const made = Array.from({ length: layer.heads }, (_, h) => {
      const cell = make(choose ? "button" : "span", { role: "gridcell", "data-l": l, "data-h": h });
      if (choose) Object.assign(cell, { type: "button", tabIndex: -1, onclick: () => choose(l, h) });
      cell.classList.add("cell");
      cell.classList.toggle("shared", kindOf(layer, h) === "shared");
      return cell;
    });
    const rest = Array.from({ length: most - layer.heads }, () => make("span"));
    grid.append(make("div", { class: "row", role: "row" },
      make("span", { class: "name", role: "rowheader" }, `${l}`), ...made, ...rest));
    return made;
  });
  const inside = (index, count) => Math.min(count - 1, Math.max(0, index));
  grid.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!choose || !step || !event.target.dataset.l) return;
    const layer = inside(Number(event.target.dataset.l) + step[0], layers.length);
    const head = inside(Number(event.target.dataset.h) + step[1], layers[layer].heads);
    choose(layer, head);
    cells[layer][head].focus();
    event.preventDefault();
    event.stopPropagation();
  });
  const top = make("span");
  const legend = make("p", { class: "legend" }, make("span", {}, "0"), make("span", { class: "ramp" }), top);
  if (layers.some((layer) => layer.routed && layer.shared.length)) {
    legend.append(make("span", { class: "dot" }), " shared head");
  }
  const dense = layers.filter((layer) => !layer.routed).length;
  if (dense) legend.append(make("span", { class: "dense" }, `${dense} of ${layers.length} layers are dense`));
  box.classList.add("headmap");
  box.replaceChildren(make("div", { class: "scroll" }, grid), legend);

  /** Shade by `values`, an array per layer, each relative to the layer's entry of `tops`; mark the head `chosen`. */
  function shade(values, { tops, legend, what, chosen = null }) {
    top.textContent = legend;
    cells.forEach((row, l) => row.forEach((cell, h) => {
      const marked = chosen !== null && l === chosen[0] && h === chosen[1];
      cell.style.setProperty("--v", values[l][h] / tops[l]);
      cell.classList.toggle("chosen", marked);
      if (choose) cell.tabIndex = marked ? 0 : -1;
      cell.title = `layer ${l}, head ${h}, ${kindOf(layers[l], h)}, ${what} ${values[l][h].toPrecision(3)}`;
      cell.setAttribute("aria-label", cell.title);
    }));
  }
  return { shade };
}
