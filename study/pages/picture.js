// The architecture as a picture of buttons. One zooms in: from the model to a block, from a block to a stage, and there is the
// sum of the chosen token (arithmetic.js). On a page without a running model a stage leads to the panel about it.
"use strict";

const FLOW = [ // name, stage of arithmetic.js, panel of a static page
  ["Embedding", 0, "parts"], ["Blocks", null, null], ["Final norm", 10, "norms"], ["Head", 11, "lens"], ["Sampler", 12, "next"],
];
const INSIDE = [
  ["Attention", [["RMSNorm", 1, "norms"], ["Query", 2, "rope"], ["RoPE", 3, "rope"], ["Attention weights", 4, "attention"],
    ["Weighted values", 5, "attention"], ["o_proj", 6, "parts"]]],
  ["MLP", [["RMSNorm", 7, "norms"], ["SwiGLU", 8, "parts"], ["down_proj", 9, "parts"]]],
];
const ZOOM = { block: null, stage: null }; // the block and the stage that are open

function box(name, pressed, act, note = "") {
  const made = element("button", { type: "button", class: "box", "aria-pressed": String(pressed) }, element("b", {}, name),
    element("small", {}, note));
  made.addEventListener("click", act);
  return made;
}

function zoom(block, stage, panel = null) {
  if (!FACTS.live && panel) return byId(panel).scrollIntoView();
  Object.assign(ZOOM, { block, stage });
  if (block !== null && CHOSEN.text.layers.includes(block)) CHOSEN.layer = block;
  const held = document.activeElement?.dataset?.box;
  redraw();
  document.querySelector(`[data-box="${held}"]`)?.focus({ preventScroll: true });
}

const noteOf = (stage) => (FACTS.live && STAGES[stage] ? STAGES[stage].gist : "");

// Boxes are made again at each choice; `data-box` says which one is which, so that the focus can stay.
function named(made, name) {
  made.dataset.box = name;
  return made;
}

function drawPicture(text, i) {
  const arrow = () => element("span", { class: "arrow", "aria-hidden": "true" }, "→");
  const L = FACTS.config.num_hidden_layers, few = L > 8 ? [0, 1, null, L - 2, L - 1] : Array.from({ length: L }, (_, k) => k);
  const blocks = few.flatMap((k) => [arrow(), k === null ? element("span", {}, `… ${L - 4} more …`)
    : named(box(`Block ${k}`, ZOOM.block === k, () => zoom(ZOOM.block === k ? null : k, null)), `block ${k}`)]);
  byId("diagram").replaceChildren(
    element("span", { class: "end" }, element("b", {}, `token ${i}`), element("small", {}, labelOf(text, i))),
    ...FLOW.flatMap(([name, stage, panel]) => (name === "Blocks" ? blocks : [arrow(),
      named(box(name, ZOOM.stage === stage, () => zoom(ZOOM.block, stage, panel), noteOf(stage)), name)])),
    arrow(), element("span", { class: "end" }, element("b", {}, "next token"), element("small", {}, likeliest(text, i))));
  byId("inside").hidden = ZOOM.block === null;
  byId("inside").replaceChildren(element("h3", {}, `Inside block ${ZOOM.block}`), ...INSIDE.map(([half, stages]) =>
    element("div", { class: "lane" }, element("span", { class: "end" }, element("b", {}, half), element("small", {}, "x → x + …")),
      ...stages.flatMap(([name, stage, panel]) => [arrow(),
        named(box(name, ZOOM.stage === stage, () => zoom(ZOOM.block, stage, panel), noteOf(stage)), `${half} ${name}`)]),
      arrow(), element("span", { class: "end" }, "⊕"))));
  drawZoomed();
}

function likeliest(text, i) {
  const [best] = text.next(i);
  return `${visible(best.text)} ${percent(Object.values(best.p)[0])}`;
}

// The last step of the zoom: the stage's sum.
function drawZoomed() {
  const stage = FACTS.live && ZOOM.stage !== null ? STAGES[ZOOM.stage] : null;
  byId("zoomed").hidden = !stage;
  if (stage) byId("zoomed").replaceChildren(element("h3", {}, `${stage.name} `, element("code", {}, stage.shape)),
    element("p", { class: "hint" }, byId("way-title").textContent), element("div", { class: "sum" }, stage.lines.join("\n")));
}

FOLLOWERS.push(drawPicture);
byId("picture").addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || (ZOOM.block === null && ZOOM.stage === null)) return;
  const block = ZOOM.stage === null ? null : ZOOM.block, back = `[data-box="block ${ZOOM.block}"]`;
  zoom(block, null);
  (document.activeElement === document.body ? document.querySelector(back) : null)?.focus({ preventScroll: true });
});
redraw();
