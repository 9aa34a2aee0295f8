// Scrub through training: each frame is the model at one snapshot of the run (run/snapshots.py), on the text that is chosen.
// A frame's weights are the start's plus a change: whole numbers of 12 bits, two characters each, times the scale of their row.
"use strict";

const SNAPSHOTS = LIVE.snapshots; // {steps, start (base64 of fp32, or null: the first model's), frames: [{numbers, scales}]}
const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
const SIX_BITS = new Uint8Array(128);
[...LETTERS].forEach((letter, value) => { SIX_BITS[letter.charCodeAt(0)] = value; });

// fp32 at every step, as in `restore`: the frame's weights are those of PyTorch to the last bit.
function restored(start, { numbers, scales }) {
  const weights = new Float32Array(start.length), scale = fp32(scales);
  let at = 0, row = 0;
  for (const [, shape] of LIVE.shapes) {
    const width = shape.at(-1), rows = shape.length < 2 ? 1 : shape[0];
    for (let r = 0; r < rows; r++, row++)
      for (let c = 0; c < width; c++, at++) {
        const number = SIX_BITS[numbers.charCodeAt(2 * at)] * 64 + SIX_BITS[numbers.charCodeAt(2 * at + 1)] - 2048;
        weights[at] = start[at] + Math.fround(number * scale[row]);
      }
  }
  return weights;
}

const START = SNAPSHOTS.start === null ? MODELS[0].all : fp32(SNAPSHOTS.start);
const FRAMES = SNAPSHOTS.steps.map(() => null); // models, made when they are asked for

function frame(n) {
  if (!FRAMES[n]) FRAMES[n] = new Qwen2(FACTS.config, LIVE, n === 0 ? START : restored(START, SNAPSHOTS.frames[n - 1]));
  return FRAMES[n];
}

// The text that is chosen as the model of a frame reads it: logits and attention of every token.
const READ = { key: null, steps: [] };

function read(n, ids) {
  if (READ.key !== ids.join()) Object.assign(READ, { key: ids.join(), steps: [] });
  if (!READ.steps[n]) {
    const cache = frame(n).newCache();
    READ.steps[n] = ids.map((id) => {
      const { logits, trace } = frame(n).step(id, cache);
      return { logp: logSoftmax(logits.slice(0, LIVE.vocab_size)), weights: trace.layers.map((layer) => layer.weights) };
    });
  }
  return READ.steps[n];
}

// |frame - start| / |start| by weight
function movedIn(n) {
  const now = frame(n).weights, start = frame(0).weights, norm = (x) => Math.sqrt(x.reduce((sum, v) => sum + v * v, 0));
  return LIVE.shapes.map(([name]) => ({ name, relative: norm(now[name].map((v, i) => v - start[name][i])) / Math.max(norm(start[name]), 1e-12) }));
}

let LAST_MOVED = null; // of the last frame: its largest change is the full colour of all frames

function drawScrub(text, i) {
  if (running !== null) return; // the models are busy with writing
  const n = Number(byId("frame").value), last = FRAMES.length - 1, ids = text.tokens.map((t) => t.id);
  byId("frame-value").textContent = `step ${SNAPSHOTS.steps[n]} of ${SNAPSHOTS.steps[last]}`;
  byId("frame").setAttribute("aria-valuetext", byId("frame-value").textContent);
  byId("frame-earlier").setAttribute("aria-disabled", String(n === 0));
  byId("frame-later").setAttribute("aria-disabled", String(n === last));
  const [first, now, end] = [0, n, last].map((k) => read(k, ids));
  drawFrameTable([first[i], now[i], end[i]].map((step) => step.logp.map(Math.exp)), n);
  drawFrameText(text, i, ids, first, now);
  drawHead(byId("frame-map"), now.map((step) => step.weights[CHOSEN.layer][CHOSEN.head]), i);
  byId("frame-map-title").textContent = `Layer ${CHOSEN.layer}, head ${CHOSEN.head}`;
  LAST_MOVED ??= movedIn(last);
  drawMovedWeights(movedIn(n), byId("frame-weights"), Math.max(...LAST_MOVED.map((w) => w.relative)));
}

function drawFrameTable([first, now, end], n) {
  const order = now.map((_, id) => id).sort((a, b) => Math.max(first[b], end[b]) - Math.max(first[a], end[a])).slice(0, 8);
  fillTable(byId("frame-table"), ["token", `step ${SNAPSHOTS.steps[0]}`, `step ${SNAPSHOTS.steps[n]}`, `step ${SNAPSHOTS.steps.at(-1)}`],
    order.map((id) => [element("th", {}, visible(wordOf(id))), ...[first, now, end].map((p) =>
      element("td", { class: "n", style: shade(p[id] * 0.7) }, percent(p[id])))]));
}

// Each token of the response in the colour of its log-probability at this frame
function drawFrameText(text, i, ids, first, now) {
  const list = tokenList(text), logp = (steps, k) => steps[k - 1].logp[ids[k]];
  let sum = 0, sumFirst = 0;
  text.tokens.forEach((_, k) => {
    const inside = k >= text.promptLength, item = addToken(list, text, k, inside
      ? `log-probability ${short(logp(now, k))}, at the start ${short(logp(first, k))}` : "prompt");
    item.classList.toggle("chosen", k === i);
    if (!inside) return;
    sum += logp(now, k);
    sumFirst += logp(first, k);
    item.setAttribute("style", shade((1 - Math.exp(logp(now, k))) * 0.6, "--down"));
  });
  byId("frame-text").replaceChildren(list);
  const length = Math.max(1, text.tokens.length - text.promptLength);
  byId("frame-mean").textContent = `Mean log-probability of the response of ${text.name}: ${short(sum / length)} nats a token, at the start ${short(sumFirst / length)}.`;
}

const scrubTo = (n) => {
  byId("frame").value = String(Math.min(Math.max(n, 0), FRAMES.length - 1));
  redraw();
};
byId("frame").max = byId("frame").value = String(FRAMES.length - 1);
byId("frame").addEventListener("input", redraw);
byId("frame-earlier").addEventListener("click", () => scrubTo(Number(byId("frame").value) - 1));
byId("frame-later").addEventListener("click", () => scrubTo(Number(byId("frame").value) + 1));
FOLLOWERS.push(drawScrub);
redraw();
