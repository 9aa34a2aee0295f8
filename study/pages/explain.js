// Draws the facts of `anatomy.look` and `anatomy.compare`. Texts go in as text, never as markup.
"use strict";

const FACTS = JSON.parse(document.getElementById("data").textContent);
const LOOK = FACTS.looks[0];
const byId = (id) => document.getElementById(id);

// A text on one line, with its blanks and line ends shown.
const visible = (text) => text.replace(/\n/g, "↵").replace(/ /g, "·").replace(/[\p{C}]/gu, "□") || "∅";

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const shade = (share, colour = "--hue") => `background: rgba(var(${colour}), ${Math.min(1, Math.max(0, share)).toFixed(3)})`;
const percent = (p) => (p === 0 ? "–" : p < 0.001 ? "<0.1%" : (100 * p).toFixed(1) + "%");

function fillTable(table, header, rows) {
  table.replaceChildren(
    element("thead", {}, element("tr", {}, ...header.map((h) => element("th", {}, h)))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row))));
}

// Tokens as buttons; `choose(i)` when one is pressed. Where `can` says no, there is nothing to show of it.
function tokenButtons(list, choose, can, dress = () => []) {
  list.append(...LOOK.tokens.map((token, i) => {
    const button = element("button", { type: "button" }, visible(token.text), ...dress(token, i));
    button.disabled = !can(i);
    button.addEventListener("click", () => choose(i));
    return element("li", { class: i < FACTS.prompt_tokens ? "prompt" : "" }, button);
  }));
}

function markChosen(list, index) {
  [...list.children].forEach((item, i) => item.classList.toggle("chosen", i === index));
}

function drawTokens() {
  const first = LOOK.tokens.length - LOOK.next.length;
  const choose = (i) => {
    markChosen(byId("token-row"), i);
    drawNext(i);
  };
  tokenButtons(byId("token-row"), choose, (i) => i >= first, (token) => [element("small", {}, String(token.id))]);
  choose(LOOK.shown);
}

// Root mean square by norm, one line a kind, as the last token sees it.
function drawNorms() {
  const layers = FACTS.config.num_hidden_layers, top = Math.max(...LOOK.norms.map((n) => Math.max(n.mean, n.last)));
  const x = (i) => 46 + (i * 560) / Math.max(1, 2 * layers - 1), y = (v) => 150 - (v / top) * 130;
  const chart = svg("svg", { viewBox: "0 0 640 180", width: 640, role: "img", "aria-label": "root mean square by norm" });
  for (const [key, width] of [["mean", 2.5], ["last", 1]]) {
    const points = LOOK.norms.map((n, i) => `${x(i)},${y(n[key])}`).join(" ");
    chart.append(svg("polyline", { points, fill: "none", stroke: "var(--accent)", "stroke-width": width }));
  }
  LOOK.norms.forEach((n, i) => {
    const mark = svg("circle", { cx: x(i), cy: y(n.mean), r: 3, fill: "var(--accent)" });
    mark.append(svg("title", {}, `layer ${n.layer}, ${n.norm}: mean ${n.mean}, last token ${n.last}`));
    chart.append(mark);
  });
  chart.append(svg("text", { x: 2, y: y(top) + 4 }, top.toPrecision(3)), svg("text", { x: 2, y: 154 }, "0"),
    svg("text", { x: 46, y: 174 }, "layer 0"), svg("text", { x: 560, y: 174 }, `layer ${layers - 1}`),
    svg("text", { x: 250, y: 174 }, "thick: mean of all tokens, thin: the last token"));
  byId("norm-chart").append(chart);
}

// Each pair of numbers as an arrow, before (grey) and after.
function drawRope() {
  for (const r of LOOK.rope) {
    const size = Math.max(1e-6, Math.hypot(...r.before)), scale = 44 / size;
    const arrow = ([a, b], colour) => svg("line", { x1: 60, y1: 55, x2: 60 + a * scale, y2: 55 - b * scale,
      stroke: colour, "stroke-width": 3, "stroke-linecap": "round" });
    const chart = svg("svg", { viewBox: "0 0 120 110", width: 130, role: "img", "aria-label": `turned by ${r.angle} radians` });
    chart.append(svg("circle", { cx: 60, cy: 55, r: 46, fill: "none", stroke: "var(--line)" }),
      arrow(r.before, "var(--soft)"), arrow(r.after, "var(--accent)"));
    byId("rope-charts").append(element("figure", { style: "margin:0" }, chart, element("figcaption", { class: "hint" },
      `head ${r.head}, pair ${r.pair}: ${r.angle.toPrecision(3)} rad; a whole turn takes ${r.turn.toPrecision(3)} tokens`)));
  }
}

function heatmap(weights, tokens, hint) {
  const N = weights.length, cell = Math.max(2, Math.min(14, Math.floor(520 / N)));
  const canvas = element("canvas", { width: N * cell, height: N * cell, tabindex: 0, role: "img",
    "aria-label": "attention map; the arrow keys move over it" });
  const pen = canvas.getContext("2d"), colour = getComputedStyle(document.documentElement).getPropertyValue("--hue");
  weights.forEach((row, i) => row.forEach((w, j) => {
    pen.fillStyle = `rgba(${colour}, ${Math.sqrt(w)})`; // the root: small weights are seen, too
    pen.fillRect(j * cell, i * cell, cell, cell);
  }));
  let at = [N - 1, 0];
  const say = (i, j) => {
    if (j < 0 || j > i || i >= N) return;
    at = [i, j];
    hint.textContent = `${i} ${visible(tokens[i].text)} looks at ${j} ${visible(tokens[j].text)}: ${weights[i][j].toFixed(3)}`;
  };
  canvas.addEventListener("pointermove", (event) => {
    const scale = N / canvas.clientWidth;
    say(Math.floor(event.offsetY * scale), Math.floor(event.offsetX * scale));
  });
  const arrows = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  canvas.addEventListener("focus", () => say(...at));
  canvas.addEventListener("keydown", (event) => {
    const step = arrows[event.key];
    if (!step) return;
    event.preventDefault();
    say(at[0] + step[0], at[1] + step[1]);
  });
  return canvas;
}

function drawAttention() {
  const select = byId("head"), maps = byId("attention-maps");
  for (const name of Object.keys(LOOK.attention)) {
    const [layer, head] = name.split(".");
    select.append(element("option", { value: name }, `layer ${layer}, head ${head}`));
  }
  const draw = () => maps.replaceChildren(...FACTS.looks.map((look, i) => element("div", {},
    element("h3", {}, FACTS.names[i]), heatmap(look.attention[select.value], look.tokens, byId("attention-hint")))));
  select.addEventListener("change", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
}

function drawLens() {
  const tokens = LOOK.tokens.slice(-LOOK.lens[0].best.length), last = LOOK.tokens.length - tokens.length;
  fillTable(byId("lens-table"), ["after", ...tokens.map((t) => visible(t.text))], LOOK.lens.map((row) => [
    element("th", {}, row.layer === 0 ? "embedding" : `block ${row.layer - 1}`),
    ...row.best.map(([text, p], i) => element("td", { style: shade(p * 0.7), title:
      `after token ${last + i} ${visible(tokens[i].text)}: ${visible(text)} ${percent(p)}` }, visible(text)))]));
}

function drawNext(position) {
  const choices = LOOK.next[position - LOOK.tokens.length + LOOK.next.length], settings = Object.keys(choices[0].p);
  for (const place of document.querySelectorAll(".place"))
    place.textContent = `token ${position}, ${visible(LOOK.tokens[position].text)}`;
  fillTable(byId("next-table"), ["token", "id", "logit", ...settings], choices.map((t) => [
    element("th", {}, visible(t.text)), element("td", { class: "n" }, String(t.id)),
    element("td", { class: "n" }, t.logit.toFixed(2)),
    ...settings.map((s) => element("td", { class: "n", style: shade(t.p[s] * 0.7) }, percent(t.p[s])))]));
}

// Item i stands for the choice of token i, which was made behind token i - 1; the last one's is not in the row.
function drawComparison() {
  const moved = FACTS.compare, top = Math.max(...moved.kl, 1e-9), first = LOOK.tokens.length - moved.next.length;
  const row = byId("rise-row");
  const choose = (i) => {
    markChosen(row, i);
    byId("moved-place").textContent = i < LOOK.tokens.length ? `token ${i}, ${visible(LOOK.tokens[i].text)}` : "the token that follows";
    fillTable(byId("moved-next"), ["token", "before", "after"], moved.next[i - 1 - first].map((t) => [
      element("th", {}, visible(t.text)), element("td", { class: "n" }, percent(t.before)),
      element("td", { class: "n" }, percent(t.after))]));
  };
  tokenButtons(row, choose, (i) => i - 1 >= first, (token, i) => [element("span", { class: "kl",
    style: `height:${i ? (14 * moved.kl[i - 1]) / top : 0}px` })]);
  [...row.children].forEach((item, i) => {
    const rise = moved.rise[i];
    item.setAttribute("style", shade(Math.min(0.55, Math.abs(rise) / 2), rise > 0 ? "--up" : "--down"));
    item.title = `log-probability ${rise >= 0 ? "+" : ""}${rise}, KL ${i ? moved.kl[i - 1] : 0}`;
  });
  choose(moved.shown + 1);
  const inLayers = moved.weights.filter((w) => w.name.includes(".layers."));
  const kinds = [...new Set(inLayers.map((w) => w.name.split(".").slice(3).join(".").replace("self_attn.", "").replace("mlp.", "")))];
  const layers = FACTS.config.num_hidden_layers, most = Math.max(...moved.weights.map((w) => w.relative), 1e-12);
  const cell = (w) => element("td", { style: shade((w.relative / most) * 0.7), title: w.name }, w.relative.toExponential(1));
  fillTable(byId("moved-weights"), ["", ...Array.from({ length: layers }, (_, i) => String(i))], [
    ...kinds.map((kind) => [element("th", {}, kind), ...inLayers.filter((w) => w.name.endsWith("." + kind)).map(cell)]),
    ...moved.weights.filter((w) => !w.name.includes(".layers.")).map((w) => [element("th", {}, w.name), cell(w)])]);
}

drawTokens();
drawNorms();
drawRope();
drawAttention();
drawLens();
if (FACTS.compare) drawComparison();
