// The page of `moh.inspection.page`: one input's tokens or patches, the map of layers and heads, and the links between
// them. Text of the input is inserted only through textContent.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const state = { sample: 0, layer: 0, head: 0, value: 0, token: null, hover: null, query: "" };
const MOST = 20; // tokens in the list of a head's uses

// ---- data ---------------------------------------------------------------------------------------------------------

async function unpack(sample) {
  const bytes = Uint8Array.from(atob(sample.values), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const all = new Uint8Array(await new Response(stream).arrayBuffer());
  let at = 0;
  sample.layers.forEach((layer, index) => {
    const size = data.layers[index].heads * layer.tokens;
    layer.values = layer.scales.map(() => all.subarray(at, (at += size)));
  });
  delete sample.values;
}

const sample = () => data.samples[state.sample];
const level = (s, layer, head, token, value) => s.layers[layer].values[value][head * s.layers[layer].tokens + token];
const number = (s, layer, head, token, value) =>
  (level(s, layer, head, token, value) / 255) * s.layers[layer].scales[value];

/** Index of the chosen token in a layer: the same token of a text, or the patch at the same place of an image. */
function tokenIn(layer, token = state.token) {
  if (token === null) return null;
  if (!sample().image) return token;
  const [prefix, rows, columns] = sample().layers[layer].grid;
  return prefix + Math.floor(token.y * rows) * columns + Math.floor(token.x * columns);
}

/** Share of tokens that use a head, or the mean of its contribution, over samples. */
function mean(samples, layer, head, value) {
  let sum = 0, count = 0;
  for (const s of samples) {
    const part = s.layers[layer], start = head * part.tokens, values = part.values[value];
    for (let i = part.grid ? part.grid[0] : 0; i < part.tokens; i++) {
      sum += value === 0 ? (values[start + i] > 0 ? 1 : 0) : (values[start + i] / 255) * part.scales[1];
      count++;
    }
  }
  return count ? sum / count : 0;
}

const groups = () => [...new Set(data.samples.map((s) => s.group))];
const inGroup = (group) => data.samples.filter((s) => s.group === group);
const kind = (layer, head) => kindOf(data.layers[layer], head);
const shown = (token) => token.trim() || JSON.stringify(token).slice(1, -1) || "(empty)";

// ---- the input ----------------------------------------------------------------------------------------------------

let spans = [];
const picture = new Image();

function buildInput() {
  const s = sample(), text = $("text");
  text.hidden = Boolean(s.image);
  $("picture").hidden = !s.image;
  text.replaceChildren();
  spans = [];
  if (s.image) {
    picture.src = s.image;
    return;
  }
  s.tokens.forEach((token, index) => {
    const span = make("span", { "data-i": index });
    span.textContent = token.replaceAll("\n", "↵\n");
    spans.push(span);
  });
  text.append(...spans);
}

function shadeInput() {
  const s = sample(), layer = s.layers[state.layer], { heads } = data.layers[state.layer];
  const name = state.value === 0 ? "gate" : "contribution";
  $("caption").textContent =
    `Shaded by the ${name} of layer ${state.layer}, head ${state.head} (${kind(state.layer, state.head)}); ` +
    `darkest: ${layer.scales[state.value].toPrecision(3)}. ${layer.tokens} tokens, ${heads} heads.`;
  if (s.image) return drawPicture();
  const kept = tokenIn(state.layer);
  spans.forEach((span, i) => {
    span.style.setProperty("--v", level(s, state.layer, state.head, i, state.value) / 255);
    span.classList.toggle("kept", i === kept);
  });
}

function drawPicture() {
  const canvas = $("picture"), s = sample(), [prefix, rows, columns] = s.layers[state.layer].grid;
  if (!picture.complete || !picture.naturalWidth) return;
  const scale = Math.max(1, Math.round(640 / picture.naturalWidth));
  canvas.width = picture.naturalWidth * scale;
  canvas.height = picture.naturalHeight * scale;
  const pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
  pen.imageSmoothingEnabled = false;
  pen.filter = "grayscale(1)";
  pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
  pen.filter = "none";
  const width = canvas.width / columns, height = canvas.height / rows;
  for (let i = 0; i < rows * columns; i++) {
    const v = level(s, state.layer, state.head, prefix + i, state.value) / 255;
    pen.fillStyle = `rgba(255, 140, 40, ${v * 0.75})`; // visible on black, white and grey
    pen.fillRect((i % columns) * width, Math.floor(i / columns) * height, width, height);
  }
  if (state.token) {
    const i = tokenIn(state.layer) - prefix;
    pen.lineWidth = 3;
    pen.strokeStyle = style.getPropertyValue("--mark");
    pen.strokeRect((i % columns) * width, Math.floor(i / columns) * height, width, height);
  }
}

function placeOf(event) {
  const box = $("picture").getBoundingClientRect();
  const inside = (v) => Math.min(0.999, Math.max(0, v));
  return { x: inside((event.clientX - box.left) / box.width), y: inside((event.clientY - box.top) / box.height) };
}

// ---- the map ------------------------------------------------------------------------------------------------------

let map;

function shadeMap() {
  const s = sample(), value = state.value, token = state.hover ?? state.token;
  const members = inGroup(s.group);
  const numbers = data.layers.map((layer, l) =>
    Array.from({ length: layer.heads }, (_, h) =>
      token === null ? mean(members, l, h, value) : number(s, l, h, tokenIn(l, token), value)));
  // contributions grow with depth: each layer is shaded relative to its own largest
  const tops = numbers.map((row) => (value === 0 && token === null ? 1 : Math.max(...row, 1e-9)));
  map.shade(numbers, {
    tops,
    legend: value === 0 && token === null ? "every token" : "largest of the layer",
    what: value === 0 ? (token === null ? "share of tokens that use it" : "gate") : "contribution",
    chosen: [state.layer, state.head],
  });
  $("maptitle").textContent = token === null
    ? `${value === 0 ? "Load" : "Mean contribution"} in “${s.group}”: layers × heads`
    : `Heads of ${describe(token)}: layers × heads`;
}

const describe = (token) =>
  sample().image ? `the patch at ${Math.round(token.x * 100)} %, ${Math.round(token.y * 100)} %`
    : `“${shown(sample().tokens[token])}” (token ${token})`;

// ---- the panels ---------------------------------------------------------------------------------------------------

const bar = (what, share, text) =>
  make("div", { class: "bar" }, make("span", { class: "what", dir: "auto", title: what }, what),
    make("div", { class: "track" }, make("div", { class: "fill", "--v": Math.min(1, share) })),
    make("span", { class: "number" }, text));

function showHead() {
  const { layer, head, value } = state;
  $("headtitle").textContent = `Layer ${layer}, head ${head}: ${kind(layer, head)}`;
  const means = groups().map((group) => [group, mean(inGroup(group), layer, head, value)]);
  const top = value === 0 ? 1 : Math.max(...means.map(([, v]) => v), 1e-9);
  $("groups").replaceChildren(...means.map(([group, v]) =>
    bar(group, v / top, value === 0 ? `${(100 * v).toFixed(1)} %` : v.toPrecision(3))));
  const s = sample(), part = s.layers[layer], prefix = part.grid ? part.grid[0] : 0;
  const order = Array.from({ length: part.tokens - prefix }, (_, i) => i + prefix)
    .filter((i) => level(s, layer, head, i, value) > 0)
    .sort((a, b) => level(s, layer, head, b, value) - level(s, layer, head, a, value) || a - b);
  $("usestitle").textContent = order.length
    ? `${order.length} of ${part.tokens - prefix} ${s.image ? "patches" : "tokens"} use it; the most:`
    : `no ${s.image ? "patch" : "token"} of this input uses it`;
  $("uses").replaceChildren(...order.slice(0, MOST).map((i) => {
    const button = make("button", { type: "button", onclick: () => keep(s.image ? placeOfPatch(i) : i, true) });
    if (s.image) button.append(describe(placeOfPatch(i)));
    else button.append(s.tokens.slice(Math.max(0, i - 4), i).join(""), make("b", {}, s.tokens[i].trim() ? s.tokens[i] : shown(s.tokens[i])),
      s.tokens.slice(i + 1, i + 5).join(""));
    button.append(` · ${number(s, layer, head, i, value).toPrecision(3)}`);
    return make("li", { dir: "auto" }, button);
  }));
}

function placeOfPatch(index) {
  const [prefix, rows, columns] = sample().layers[state.layer].grid, i = index - prefix;
  return { x: ((i % columns) + 0.5) / columns, y: (Math.floor(i / columns) + 0.5) / rows };
}

function showToken() {
  $("tokenpanel").hidden = state.token === null;
  if (state.token === null) return;
  const s = sample();
  let used = 0, all = 0;
  data.layers.forEach((layer, l) => {
    for (let h = 0; h < layer.heads; h++, all++) used += level(s, l, h, tokenIn(l), 0) > 0 ? 1 : 0;
  });
  $("tokentitle").textContent = `${describe(state.token)} uses ${used} of ${all} heads; in layer ${state.layer}:`;
  const i = tokenIn(state.layer), values = [];
  for (let h = 0; h < data.layers[state.layer].heads; h++) values.push(number(s, state.layer, h, i, state.value));
  const top = Math.max(...values, 1e-9);
  $("tokenheads").replaceChildren(...values.map((v, h) => {
    const row = bar(`head ${h} (${kind(state.layer, h)})`, v / top, v.toPrecision(3));
    row.style.cursor = "pointer";
    row.addEventListener("click", () => choose(state.layer, h));
    return row;
  }));
}

function showSummary() {
  const s = sample();
  let used = 0, all = 0;
  s.layers.forEach((part) => {
    for (const v of part.values[0]) used += v > 0 ? 1 : 0;
    all += part.values[0].length;
  });
  const dense = data.layers.filter((l) => !l.routed).length;
  const note = dense === data.layers.length ? " This model is dense: every token uses every head."
    : dense ? ` ${dense} of the layers are dense.` : "";
  const counts = data.layers.map((l) => l.heads), least = Math.min(...counts), most = Math.max(...counts);
  $("summary").textContent =
    `${data.layers.length} layers of ${least === most ? most : `${least} to ${most}`} heads; this input uses ${((100 * used) / all).toFixed(1)} % of them.${note}`;
}

// ---- what a person does -------------------------------------------------------------------------------------------

function refresh() {
  shadeInput();
  shadeMap();
  showHead();
  showToken();
}

function choose(layer, head) {
  state.layer = Math.min(data.layers.length - 1, Math.max(0, layer));
  state.head = Math.min(data.layers[state.layer].heads - 1, Math.max(0, head));
  refresh();
}

function keep(token, scroll = false) {
  state.token = token;
  state.hover = null;
  refresh();
  if (scroll && token !== null && !sample().image) spans[token].scrollIntoView({ block: "nearest" });
}

function search() {
  state.query = $("query").value;
  const wanted = state.query.toLocaleLowerCase();
  let count = 0;
  spans.forEach((span, i) => {
    const hit = wanted !== "" && sample().tokens[i].toLocaleLowerCase().includes(wanted);
    span.classList.toggle("found", hit);
    count += hit ? 1 : 0;
  });
  $("found").textContent = wanted === "" ? "" : `${count} found`;
}

function tip(event, token, layer = state.layer) {
  const box = $("tip");
  box.hidden = token === null;
  if (token === null) return;
  const s = sample(), i = tokenIn(layer, token), { heads } = data.layers[layer];
  let used = 0;
  for (let h = 0; h < heads; h++) used += level(s, layer, h, i, 0) > 0 ? 1 : 0;
  box.textContent = `${describe(token)}: gate ${number(s, layer, state.head, i, 0).toPrecision(3)}, contribution ` +
    `${number(s, layer, state.head, i, 1).toPrecision(3)}; uses ${used} of ${heads} heads of layer ${layer}`;
  box.style.left = `${Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8)}px`;
  box.style.top = `${Math.min(event.clientY + 18, innerHeight - box.offsetHeight - 8)}px`;
}

let frame = 0;
function hover(event, token) {
  tip(event, token);
  if (String(state.hover) === String(token) && !sample().image) return;
  state.hover = token;
  cancelAnimationFrame(frame);
  frame = requestAnimationFrame(shadeMap);
}

function listen() {
  const token = (event) => {
    const span = event.target.closest("span[data-i]");
    return span ? Number(span.dataset.i) : null;
  };
  $("text").addEventListener("mousemove", (e) => hover(e, token(e)));
  $("text").addEventListener("mouseleave", (e) => hover(e, null));
  $("text").addEventListener("click", (e) => {
    const clicked = token(e);
    if (clicked !== null) keep(clicked === state.token ? null : clicked);
  });
  $("picture").addEventListener("mousemove", (e) => hover(e, placeOf(e)));
  $("picture").addEventListener("mouseleave", (e) => hover(e, null));
  $("picture").addEventListener("click", (e) => keep(placeOf(e)));
  picture.addEventListener("load", drawPicture);
  $("sample").addEventListener("change", (e) => open(Number(e.target.value)));
  document.querySelectorAll("input[name=value]").forEach((radio) =>
    radio.addEventListener("change", () => { state.value = Number(radio.value); refresh(); }));
  $("query").addEventListener("input", search);
  $("search").addEventListener("submit", (e) => {
    e.preventDefault();
    const hits = spans.flatMap((span, i) => (span.classList.contains("found") ? [i] : []));
    if (hits.length) keep(hits.find((i) => i > (state.token ?? -1)) ?? hits[0], true);
  });
  $("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme !== "dark"));
  $("help").addEventListener("click", () => {
    $("keys").hidden = !$("keys").hidden;
    $("help").setAttribute("aria-expanded", String(!$("keys").hidden));
  });
  document.addEventListener("keydown", onKey);
}

function onKey(event) {
  if (event.target.matches("input[type=search], select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const arrows = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (arrows && event.target.id === "picture") {
    const [, rows, columns] = sample().layers[state.layer].grid, at = state.token ?? { x: 0.5, y: 0.5 };
    const inside = (v) => Math.min(0.999, Math.max(0, v));
    keep({ x: inside(at.x + arrows[1] / columns), y: inside(at.y + arrows[0] / rows) });
  } else if (event.key === "Escape") keep(null);
  else if (event.key === "/") $("query").focus();
  else if (event.key === "[") choose(state.layer - 1, state.head);
  else if (event.key === "]") choose(state.layer + 1, state.head);
  else if (event.key === "{") choose(state.layer, state.head - 1);
  else if (event.key === "}") choose(state.layer, state.head + 1);
  else return;
  event.preventDefault();
}

function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  $("theme").textContent = dark ? "light" : "dark";
  if (data.samples[0].layers[0].values) shadeInput();
}

function open(index) {
  state.sample = index;
  state.token = state.hover = null;
  $("search").hidden = Boolean(sample().image);
  buildInput();
  search();
  showSummary();
  refresh();
}

async function start() {
  $("title").textContent = data.title;
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches);
  await Promise.all(data.samples.map(unpack));
  for (const group of groups()) {
    const box = make("optgroup", { label: group });
    data.samples.forEach((s, i) => { if (s.group === group) box.append(make("option", { value: i }, s.name)); });
    $("sample").append(box);
  }
  // a head that half of the tokens use is the most informative
  let best = 1;
  data.layers.forEach((layer, l) => {
    for (let h = 0; h < layer.heads; h++) {
      const distance = Math.abs(mean(inGroup(data.samples[0].group), l, h, 0) - 0.5);
      if (distance < best) [best, state.layer, state.head] = [distance, l, h];
    }
  });
  map = headMap($("map"), data.layers, choose);
  listen();
  open(0);
  document.body.dataset.ready = "yes";
}

start();
