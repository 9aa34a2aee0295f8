// One chosen token, and the panels that show it. A text comes from a checkpoint's facts (static.js) or from a model that
// runs in the page (live.js). It has
//   name, tokens [{id, text}], promptLength     and, by position i:
//   first                    the first position that has tables
//   layers, heads            those whose attention is known; weights(layer, head) -> rows, row i over tokens 0 to i
//   next(i)                  [{id, text, logit, p: {setting: probability}}]
//   lens(i)                  [[where, [[text, probability], ...]], ...], from the embedding to the last block
//   norms(i)                 [{layer, norm, value, mean}]: the root mean square that each norm divides by
//   rope(i, layer)           [{head, pair, frequency, before, after}]: pairs of the query before and after the rotation
//   memory()                 bytes of keys and values
"use strict";

const FACTS = JSON.parse(byId("data").textContent);
const CHOSEN = { text: null, index: 0, layer: 0, head: 0, open: new Set() };
const FOLLOWERS = []; // functions that draw something of the chosen token: all of them run after each choice

const labelOf = (text, i) => visible(text.tokens[i].text);

// The only way to choose: every panel of the page then speaks of this token.
function choose(text, index) {
  const changed = text !== CHOSEN.text || index !== CHOSEN.index;
  Object.assign(CHOSEN, { text, index: Math.min(Math.max(index, text.first), text.tokens.length - 1) });
  if (!text.layers.includes(CHOSEN.layer)) CHOSEN.layer = text.layers[0];
  if (!text.heads.includes(CHOSEN.head)) CHOSEN.head = text.heads[0];
  FOLLOWERS.forEach((draw) => draw(text, CHOSEN.index));
  return changed;
}

const redraw = () => CHOSEN.text && choose(CHOSEN.text, CHOSEN.index);

function drawBar(text, i) {
  byId("chosen-token").replaceChildren("token ", element("b", {}, String(i)), " ", element("code", {}, labelOf(text, i)),
    ` of ${text.tokens.length}, ${i < text.promptLength ? "prompt" : "response"} of ${text.name}`);
  byId("earlier").disabled = i <= text.first;
  byId("later").disabled = i >= text.tokens.length - 1;
  for (const place of document.querySelectorAll(".place")) place.textContent = `token ${i}, ${labelOf(text, i)}`;
  for (const list of document.querySelectorAll("ol.tokens"))
    [...list.children].forEach((item, k) => item.classList.toggle("chosen", list.text === text && k === i));
}

// Tokens as buttons in a list that belongs to `text`; the arrow keys move the choice along it.
function tokenList(text) {
  const list = element("ol", { class: "tokens" });
  list.text = text;
  list.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || CHOSEN.text !== text) return;
    event.preventDefault();
    choose(text, CHOSEN.index + step);
    list.children[CHOSEN.index].firstChild.focus();
  });
  return list;
}

function addToken(list, text, i, title = "") {
  const button = element("button", { type: "button", title }, labelOf(text, i));
  button.disabled = i < text.first;
  button.addEventListener("click", () => choose(text, i));
  list.append(element("li", { class: i < text.promptLength ? "prompt" : "" }, button));
  return list.lastChild;
}

function drawNext(text, i) {
  const choices = text.next(i), settings = Object.keys(choices[0].p);
  fillTable(byId("next-table"), ["token", "id", "logit", ...settings], choices.map((t) => [
    element("th", {}, visible(t.text)), element("td", { class: "n" }, String(t.id)),
    element("td", { class: "n" }, t.logit.toFixed(2)),
    ...settings.map((s) => element("td", { class: "n", style: shade(t.p[s] * 0.7) }, percent(t.p[s])))]));
}

// A row a head, over the tokens that the chosen one looks at; its button chooses the head.
function drawLooks(text, i) {
  fillTable(byId("looks"), [], text.layers.flatMap((layer) => text.heads.map((head) => {
    const button = element("button", { type: "button", "aria-pressed": String(layer === CHOSEN.layer && head === CHOSEN.head) },
      `layer ${layer}, head ${head}`);
    button.addEventListener("click", () => chooseHead(layer, head));
    return [element("th", {}, button), ...text.weights(layer, head)[i].map((w, t) => element("td",
      { style: shade(Math.sqrt(w) * 0.8), title: `token ${t}: ${w.toFixed(3)}` }, labelOf(text, t)))];
  })));
}

function chooseHead(layer, head) {
  Object.assign(CHOSEN, { layer, head });
  redraw();
  const at = CHOSEN.text.layers.indexOf(layer) * CHOSEN.text.heads.length + CHOSEN.text.heads.indexOf(head);
  byId("looks").querySelectorAll("button")[at].focus({ preventScroll: true });
}

// A head's weights on a canvas, with a frame around row i
function drawHead(canvas, weights, i) {
  const N = weights.length, cell = Math.max(2, Math.min(14, Math.floor(560 / N))), pen = canvas.getContext("2d"), colour = css("--hue");
  canvas.width = canvas.height = N * cell;
  weights.forEach((row, r) => row.forEach((w, c) => {
    pen.fillStyle = `rgba(${colour}, ${Math.sqrt(w)})`; // the root: small weights are seen, too
    pen.fillRect(c * cell, r * cell, cell, cell);
  }));
  pen.strokeStyle = css("--accent");
  pen.strokeRect(0.5, i * cell + 0.5, (i + 1) * cell - 1, Math.max(1, cell - 1));
}

function drawMap(text, i) {
  const weights = text.weights(CHOSEN.layer, CHOSEN.head);
  drawHead(byId("attention-map"), weights, i);
  byId("map-title").textContent = `layer ${CHOSEN.layer}, head ${CHOSEN.head}`;
  sayWeight(i, weights[i].indexOf(Math.max(...weights[i])));
}

function sayWeight(row, column) {
  const { text, layer, head } = CHOSEN, weights = text.weights(layer, head);
  if (!(column >= 0 && column <= row && row < weights.length)) return;
  byId("attention-hint").textContent =
    `${row} ${labelOf(text, row)} looks at ${column} ${labelOf(text, column)}: ${weights[row][column].toFixed(3)}`;
  byId("attention-map").at = [row, column];
}

function listenToMap() {
  const canvas = byId("attention-map"), steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const cellOf = (event) => {
    const scale = CHOSEN.text.tokens.length / canvas.clientWidth;
    return [Math.floor(event.offsetY * scale), Math.floor(event.offsetX * scale)];
  };
  canvas.addEventListener("pointermove", (event) => sayWeight(...cellOf(event)));
  canvas.addEventListener("click", (event) => choose(CHOSEN.text, cellOf(event)[0]));
  canvas.addEventListener("keydown", (event) => {
    const step = steps[event.key];
    if (event.key === "Enter") choose(CHOSEN.text, canvas.at[0]);
    if (!step) return;
    event.preventDefault();
    const row = canvas.at[0] + step[0];
    sayWeight(row, Math.min(canvas.at[1] + step[1], row)); // on the diagonal, up is up and to the left
  });
}

function drawLens(text, i) {
  fillTable(byId("lens-table"), ["if the model stopped at", "likeliest next tokens"], text.lens(i).map(([where, best]) => [
    element("th", {}, where),
    ...best.map(([word, p]) => element("td", { style: shade(p * 0.7) }, `${visible(word)} ${percent(p)}`))]));
}

// Root mean square by norm: the mean of all tokens (grey), and the chosen one.
function drawNorms(text, i) {
  const norms = text.norms(i), top = Math.max(...norms.map((n) => Math.max(n.mean, n.value)), 1e-9);
  const x = (k) => 46 + (k * 560) / Math.max(1, norms.length - 1), y = (v) => 150 - (v / top) * 130;
  const chart = svg("svg", { viewBox: "0 0 640 180", width: 640, role: "img", "aria-label": "root mean square by norm" });
  for (const [key, stroke] of [["mean", "var(--soft)"], ["value", "var(--accent)"]])
    chart.append(svg("polyline", { points: norms.map((n, k) => `${x(k)},${y(n[key])}`).join(" "), fill: "none", stroke, "stroke-width": 2 }));
  norms.forEach((n, k) => {
    const mark = svg("circle", { cx: x(k), cy: y(n.value), r: 3, fill: "var(--accent)" });
    mark.append(svg("title", {}, `layer ${n.layer}, ${n.norm}: ${short(n.value)}, mean of all tokens ${short(n.mean)}`));
    chart.append(mark);
  });
  chart.append(svg("text", { x: 2, y: y(top) + 4 }, top.toPrecision(3)), svg("text", { x: 2, y: 154 }, "0"),
    svg("text", { x: 46, y: 174 }, "layer 0"), svg("text", { x: 560, y: 174 }, `layer ${FACTS.config.num_hidden_layers - 1}`),
    svg("text", { x: 215, y: 174 }, "blue: the chosen token, grey: mean of all"));
  byId("norm-chart").replaceChildren(chart);
}

// Each pair of numbers of the query as an arrow, before (grey) and after.
function drawRope(text, i) {
  byId("rope-charts").replaceChildren(...text.rope(i, CHOSEN.layer).map((r) => {
    const scale = 44 / Math.max(1e-6, Math.hypot(...r.before)), angle = i * r.frequency, turn = (2 * Math.PI) / r.frequency;
    const arrow = ([a, b], colour) => svg("line", { x1: 60, y1: 55, x2: 60 + a * scale, y2: 55 - b * scale,
      stroke: colour, "stroke-width": 3, "stroke-linecap": "round" });
    const chart = svg("svg", { viewBox: "0 0 120 110", width: 130, role: "img", "aria-label": `turned by ${short(angle)} radians` },
      svg("circle", { cx: 60, cy: 55, r: 46, fill: "none", stroke: "var(--line)" }), arrow(r.before, "var(--soft)"), arrow(r.after, "var(--accent)"));
    return element("figure", {}, chart, element("figcaption", { class: "hint" },
      `head ${r.head}, pair ${r.pair}: position ${i} · ${short(r.frequency)} = ${short(angle)} rad; a whole turn takes ${short(turn)} tokens`));
  }));
}

function drawMemory(text) {
  const bytes = text.memory();
  byId("memory").textContent = `Now: ${text.tokens.length} tokens, ${bytes.toLocaleString("en")} bytes, ` +
    `${(bytes / text.tokens.length).toLocaleString("en")} a token.`;
}

FOLLOWERS.push(drawBar, drawNext, drawLooks, drawMap, drawLens, drawNorms, drawRope, drawMemory);
listenToMap();
byId("earlier").addEventListener("click", () => choose(CHOSEN.text, CHOSEN.index - 1));
byId("later").addEventListener("click", () => choose(CHOSEN.text, CHOSEN.index + 1));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
