// Texts of models that run in the page: qwen2.js answers the reader's problem with each checkpoint, and keeps all activations.
"use strict";

const LIVE = FACTS.live;
const BPE_TOKENIZER = new BPE(LIVE.tokenizer);
const MODELS = LIVE.weights.map((weights) => new Qwen2(FACTS.config, LIVE, fp32(weights)));
const MAX_TOKENS = 240;
const SETTINGS = { // common sampling settings, beside the reader's own
  "T = 1": {}, "T = 0.5": { temperature: 0.5 }, "T = 1.5": { temperature: 1.5 }, "top-k 3": { topK: 3 }, "top-p 0.9": { topP: 0.9 },
};

const settings = () => ({
  temperature: Number(byId("temperature").value), topK: Number(byId("topk").value), topP: Number(byId("topp").value),
});
const wordOf = (id) => BPE_TOKENIZER.decode([id]);

// A text with the trace of every token, in the form that the panels ask for.
class LiveText {
  constructor(model, name) {
    Object.assign(this, { model, name, first: 0 });
    const { num_hidden_layers: L, num_attention_heads: H } = FACTS.config;
    this.layers = Array.from({ length: L }, (_, i) => i);
    this.heads = Array.from({ length: H }, (_, i) => i);
    this.begin([]);
  }

  begin(ids) {
    this.cache = this.model.newCache();
    this.steps = []; // {logits, trace, p}: p is the probability with which the token was drawn, null in the prompt
    this.tokens = [];
    this.promptLength = ids.length;
    ids.forEach((id) => this.read(id, null));
  }

  read(id, p) {
    this.tokens.push({ id, text: wordOf(id) });
    this.steps.push({ id, p, ...this.model.step(id, this.cache) });
  }

  // Go back to the first `length` tokens.
  cutTo(length) {
    this.tokens.length = this.steps.length = this.cache.length = length;
    for (const { k, v } of this.cache.layers) k.length = v.length = length;
  }

  // The text that is judged: the prompt may have opened the thought.
  judged() {
    const text = this.response(), opened = LIVE.after.includes("<think>") && !text.trimStart().startsWith("<think>");
    return (opened ? "<think>" : "") + text;
  }

  response() { return BPE_TOKENIZER.decode(this.tokens.slice(this.promptLength).map((t) => t.id)); }
  weights(layer, head) { return this.steps.map((step) => step.trace.layers[layer].weights[head]); }
  probabilities(i, asked = {}) { return filtered(this.steps[i].logits, asked, LIVE.vocab_size); }

  next(i) {
    const logits = this.steps[i].logits, columns = Object.entries({ "as set": settings(), ...SETTINGS }).map(([name, asked]) =>
      [name, this.probabilities(i, asked)]);
    const order = Array.from(logits.slice(0, LIVE.vocab_size), (_, id) => id).sort((a, b) => logits[b] - logits[a]).slice(0, 12);
    return order.map((id) => ({ id, text: wordOf(id), logit: logits[id],
      p: Object.fromEntries(columns.map(([name, p]) => [name, p[id]])) }));
  }

  lens(i) {
    return this.steps[i].trace.residual.map((x, layer) => {
      const p = softmax(Array.from(this.model.read(x)).slice(0, LIVE.vocab_size));
      const order = p.map((_, id) => id).sort((a, b) => p[b] - p[a]).slice(0, 4);
      return [layer ? `block ${layer - 1}` : "embedding", order.map((id) => [wordOf(id), p[id]])];
    });
  }

  norms(i) {
    return this.layers.flatMap((layer) => [["input_layernorm", "residual"], ["post_attention_layernorm", "between"]].map(([norm, key]) => {
      const values = this.steps.map((step) => magnitude(step.trace[key][layer]));
      return { layer, norm, value: values[i], mean: values.reduce((a, b) => a + b) / values.length };
    }));
  }

  rope(i, layer) {
    const K = FACTS.config.head_dim, attn = `model.layers.${layer}.self_attn`, { residual, layers } = this.steps[i].trace;
    const before = this.model.project(attn, "q", this.model.norm(`model.layers.${layer}.input_layernorm`, residual[layer]));
    const pairs = [...new Set([0, Math.floor(K / 8), Math.floor(K / 4), K / 2 - 1])];
    return this.heads.flatMap((head) => pairs.map((pair) => ({ layer, head, pair, frequency: this.model.frequencies[pair],
      ...Object.fromEntries([["before", before], ["after", layers[layer].q]].map(([name, x]) =>
        [name, [x[head * K + pair], x[head * K + pair + K / 2]]])) })));
  }

  memory() { return this.cache.layers.reduce((sum, { k, v }) => [...k, ...v].reduce((n, x) => n + x.byteLength, sum), 0); }
}

// A checkpoint that answers: its text, where it draws it, and the verdict.
class Thinker extends LiveText {
  constructor(model, name) {
    super(model, name);
    this.list = tokenList(this);
    this.list.classList.add("answer");
    this.verdict = element("p", { class: "hint verdict" });
    byId("texts").append(element("div", { class: "thinker" }, element("h3", {}, name), this.list, this.verdict));
  }

  start(ids, seed) {
    this.begin(ids);
    this.random = uniforms(seed);
    this.question = byId("question").value;
    this.done = false;
    this.verdict.textContent = "";
    this.list.replaceChildren();
    ids.forEach((_, i) => this.show(i));
  }

  show(i) {
    const p = this.steps[i].p, item = addToken(this.list, this, i, p === null ? "prompt" : `drawn with ${percent(p)}`);
    if (p !== null) item.setAttribute("style", shade((1 - p) * 0.6, "--down"));
    this.list.scrollTop = this.list.scrollHeight;
  }

  // Draw one token. False if there is nothing more to draw.
  advance() {
    if (this.done) return false;
    const p = this.probabilities(this.steps.length - 1, settings()), id = draw(p, this.random());
    const full = this.steps.length - this.promptLength >= MAX_TOKENS;
    this.done = full || LIVE.stop.includes(id);
    if (!this.done) {
      this.read(id, p[id]);
      this.show(this.steps.length - 1);
    } else this.verdict.textContent = `${verdict(this.judged(), this.question, full ? MAX_TOKENS : 0)}`;
    return !this.done;
  }
}

const THINKERS = MODELS.map((model, i) => new Thinker(model, FACTS.names[i]));
const ENDED = []; // functions that run once the responses of all models are whole
let running = null;
const asked = () => byId("question").value + "/" + byId("seed").value;

// Begin again with the problem in the field. False, and nothing is changed, if the model cannot read it.
function restart() {
  stop();
  byId("complaint").textContent = complaint(byId("question").value, LIVE.trained);
  if (refusal(byId("question").value, LIVE.trained)) return false;
  const ids = BPE_TOKENIZER.encode(LIVE.before + byId("question").value + LIVE.after);
  THINKERS.forEach((thinker) => thinker.start(ids, Number(byId("seed").value)));
  THINKERS.asked = asked();
  choose(THINKERS.includes(CHOSEN.text) ? CHOSEN.text : THINKERS[0], ids.length - 1);
  return true;
}

function stop() {
  cancelAnimationFrame(running);
  running = null;
  byId("run").textContent = "Think";
}

// While a model thinks, the chosen token is the newest one of the text that was chosen.
function advance() {
  const more = THINKERS.map((thinker) => thinker.advance()).some(Boolean);
  const text = THINKERS.includes(CHOSEN.text) ? CHOSEN.text : THINKERS[0];
  choose(text, text.tokens.length - 1);
  return more;
}

function think() {
  if (advance()) running = requestAnimationFrame(think); // each token draws a frame: one sees it think
  else end();
}

function end() {
  stop();
  ENDED.forEach((act) => act());
}

// The finished responses at once, and in them the token where the model was least sure.
function finish() {
  while (THINKERS.map((thinker) => thinker.advance()).some(Boolean));
  const [text] = THINKERS, unsure = (i) => text.probabilities(i).reduce((sum, p) => sum - (p ? p * Math.log(p) : 0), 0);
  let best = text.promptLength - 1;
  for (let i = best; i < text.steps.length; i++) if (unsure(i) > unsure(best)) best = i;
  choose(text, best);
  ENDED.forEach((act) => act());
}

let STAGES = []; // of the chosen token, layer and head

function drawWay(text, index) {
  const { layer, head, open } = CHOSEN;
  STAGES = wayThrough(text.model, text.steps, text.cache, index, layer, head, (t) => labelOf(text, t));
  byId("way-title").textContent = `Token ${index}, ${labelOf(text, index)}: layer ${layer}, head ${head}`;
  byId("way").replaceChildren(...STAGES.map((stage, i) => {
    const details = element("details", { "data-stage": stage.name }, element("summary", {}, element("b", {}, stage.name), " ",
      element("code", {}, stage.shape), " ", element("span", { class: "hint" }, stage.gist)), element("div", { class: "sum" }, stage.lines.join("\n")));
    details.open = open.has(i);
    details.addEventListener("toggle", () => (details.open ? open.add(i) : open.delete(i)));
    return details;
  }));
}

function listenToControls() {
  byId("controls").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running !== null) return stop();
    if (!restart()) return;
    byId("run").textContent = "Stop";
    running = requestAnimationFrame(think);
  });
  byId("one").addEventListener("click", () => {
    stop();
    if (THINKERS.asked !== asked() || THINKERS.every((t) => t.done)) restart();
    else if (!advance()) end();
  });
  for (const name of ["temperature", "topk", "topp"]) {
    const say = () => {
      const value = Number(byId(name).value);
      byId(name + "-value").textContent = name === "topk" && value === 0 ? "off" : name === "temperature" && value === 0 ? "0, greedy" : String(value);
    };
    byId(name).addEventListener("input", () => { say(); redraw(); });
    say();
  }
  byId("question").addEventListener("input", () => {
    byId("complaint").textContent = complaint(byId("question").value, LIVE.trained);
  });
}

byId("question").value = LIVE.question;
listenToControls();
FOLLOWERS.push(drawWay);
restart();
finish();
