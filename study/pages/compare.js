// Two checkpoints on one text: where they differ, and which weights moved. The facts are Python's (`anatomy.compare`), or, if
// the models run in the page, worked out here for the text that is chosen.
"use strict";

const logSoftmax = (logits) => {
  const top = logits.reduce((a, b) => Math.max(a, b)), total = Math.log(logits.reduce((sum, v) => sum + Math.exp(v - top), 0)) + top;
  return Array.from(logits, (v) => v - total);
};

// [N][V] log-probabilities of a model for the next token, behind each token of a text
function scored(model, ids, vocabSize) {
  const cache = model.newCache();
  return ids.map((id) => logSoftmax(model.step(id, cache).logits.slice(0, vocabSize)));
}

// kl[i]: KL(after || before) of the choice behind token i, nats. rise[i]: change of token i's own log-probability.
function difference(before, after, ids) {
  const kl = before.map((p, i) => after[i].reduce((sum, q, v) => sum + Math.exp(q) * (q - p[v]), 0));
  const rise = ids.map((id, i) => (i ? after[i - 1][id] - before[i - 1][id] : 0));
  const next = (i) => {
    const [p, q] = [before[i], after[i]].map((x) => x.map(Math.exp));
    const order = p.map((_, v) => v).sort((a, b) => (q[b] - p[b]) - (q[a] - p[a]));
    return [...order.slice(0, 4), ...order.slice(-4)].filter((v) => p[v] !== q[v]).map((v) => ({ text: wordOf(v), before: p[v], after: q[v] }));
  };
  return { kl, rise, next };
}

const COMPARED = new WeakMap(); // text -> {length, difference}: a text grows while it is written

function comparisonOf(text) {
  if (!FACTS.live) return { ...FACTS.compare, next: (i) => FACTS.compare.next[i - text.first] };
  const ids = text.tokens.map((t) => t.id), known = COMPARED.get(text), key = ids.join();
  if (known?.key === key) return known.found;
  const found = difference(...MODELS.slice(0, 2).map((model) => scored(model, ids, LIVE.vocab_size)), ids);
  COMPARED.set(text, { key, found });
  return found;
}

function drawComparison(text, i) {
  if (FACTS.live && running !== null) return; // both models are busy with writing
  const { kl, rise, next } = comparisonOf(text), top = Math.max(...kl, 1e-9), from = Math.max(text.promptLength - 1, 0);
  const list = tokenList(text);
  text.tokens.forEach((token, k) => {
    const item = addToken(list, text, k, `log-probability ${rise[k] >= 0 ? "+" : ""}${short(rise[k])}; KL of the next token ${short(kl[k])}`);
    item.firstChild.append(element("span", { class: "kl", style: `height:${(14 * kl[k]) / top}px` }));
    if (k >= text.promptLength) item.setAttribute("style", shade(Math.min(0.55, Math.abs(rise[k]) / 2), rise[k] > 0 ? "--up" : "--down"));
    item.classList.toggle("chosen", k === i);
  });
  byId("rise-row").replaceChildren(list);
  const mean = kl.slice(from).reduce((a, b) => a + b, 0) / (kl.length - from);
  byId("mean-kl").textContent = `KL(after || before) = ${short(mean)} nats a token of the response of ${text.name}.`;
  fillTable(byId("moved-next"), ["token", "before", "after"], next(i).map((t) => [
    element("th", {}, visible(t.text)), element("td", { class: "n" }, percent(t.before)), element("td", { class: "n" }, percent(t.after))]));
}

function drawMovedWeights(weights, table, most = Math.max(...weights.map((w) => w.relative))) {
  const inLayers = weights.filter((w) => w.name.includes(".layers."));
  const kinds = [...new Set(inLayers.map((w) => w.name.split(".").slice(3).join(".").replace("self_attn.", "").replace("mlp.", "")))];
  const cell = (w) => element("td", { style: shade((w.relative / Math.max(most, 1e-12)) * 0.7), title: w.name }, w.relative.toExponential(1));
  fillTable(table, ["", ...Array.from({ length: FACTS.config.num_hidden_layers }, (_, i) => `layer ${i}`)], [
    ...kinds.map((kind) => [element("th", {}, kind), ...inLayers.filter((w) => w.name.endsWith("." + kind)).map(cell)]),
    ...weights.filter((w) => !w.name.includes(".layers.")).map((w) => [element("th", {}, w.name), cell(w)])]);
}

FOLLOWERS.push(drawComparison);
drawMovedWeights(FACTS.compare.weights, byId("moved-weights"));
redraw();
