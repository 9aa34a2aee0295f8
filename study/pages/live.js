// The live part of the page: qwen2.js thinks about the reader's problem, once a checkpoint, and shows what it looked at.
"use strict";

const LIVE = FACTS.live;
const BPE_TOKENIZER = new BPE(LIVE.tokenizer);
const MODELS = LIVE.weights.map((weights) => new Qwen2(FACTS.config, LIVE, weights));
const MAX_TOKENS = 240;

// One checkpoint at work: its tokens, what happened at each, and where it draws them.
class Thinker {
  constructor(model, name) {
    this.model = model;
    this.tokens = element("ol", { class: "tokens answer", "aria-live": "off" });
    this.verdict = element("p", { class: "hint" });
    this.bars = element("div", { class: "bars" });
    this.memory = element("p", { class: "hint memory" });
    this.title = element("h3");
    this.panel = element("div", { class: "thinker" }, element("h3", {}, name), this.tokens, this.verdict, this.memory,
      this.title, this.bars);
    byId("thinkers").append(this.panel);
  }

  start(ids, seed) {
    this.cache = this.model.newCache();
    this.steps = []; // {id, logits, trace, p}: p is the probability with which id was drawn, null in the prompt
    this.promptLength = ids.length;
    this.random = uniforms(seed);
    this.done = false;
    this.at = null; // the token behind which the bars are shown; null: the last choice
    this.tokens.replaceChildren();
    ids.forEach((id) => this.read(id, null));
    this.verdict.textContent = "";
    this.showNext();
  }

  read(id, p) {
    const step = { id, p, ...this.model.step(id, this.cache) }, index = this.steps.push(step) - 1;
    const button = element("button", { type: "button", title: p === null ? "prompt" : `drawn with ${percent(p)}` },
      visible(BPE_TOKENIZER.decode([id])));
    button.addEventListener("click", () => inspect(this, index));
    const item = element("li", { class: p === null ? "prompt" : "" }, button);
    if (p !== null) item.setAttribute("style", shade((1 - p) * 0.6, "--down"));
    this.tokens.append(item);
    this.tokens.scrollTop = this.tokens.scrollHeight;
  }

  // Draw one token. False when there is nothing more to draw.
  advance() {
    if (this.done) return false;
    this.at = null;
    const p = filtered(this.steps.at(-1).logits, settings(), LIVE.vocab_size), id = draw(p, this.random());
    const full = this.steps.length - this.promptLength >= MAX_TOKENS;
    this.done = full || LIVE.stop.includes(id);
    if (!full) this.read(id, p[id]);
    if (this.done) this.verdict.textContent = verdict(this.text(), full);
    this.showNext();
    return !this.done;
  }

  text() {
    return BPE_TOKENIZER.decode(this.steps.slice(this.promptLength).map((step) => step.id));
  }

  showNext() {
    const last = this.steps.length - (this.done && this.steps.length > 1 ? 2 : 1); // of a finished answer, its last choice
    const index = this.at ?? last, step = this.steps[index];
    this.title.textContent = `Next token, after ${index} ${visible(BPE_TOKENIZER.decode([step.id]))}`;
    const bytes = this.cache.layers.reduce((sum, { k, v }) => [...k, ...v].reduce((n, x) => n + x.byteLength, sum), 0);
    this.memory.textContent = `KV cache: ${this.cache.length} tokens, ${bytes.toLocaleString("en")} bytes`;
    const p = filtered(step.logits, settings(), LIVE.vocab_size);
    const order = p.map((_, i) => i).filter((i) => p[i] > 0).sort((a, b) => p[b] - p[a]).slice(0, 8);
    this.bars.replaceChildren(...order.flatMap((i) => [
      element("code", {}, visible(BPE_TOKENIZER.decode([i]))),
      element("div", { class: "track" }, element("span", { style: `width:${100 * p[i]}%` })), element("span", {}, percent(p[i]))]));
  }
}

const settings = () => ({
  temperature: Number(byId("temperature").value), topK: Number(byId("topk").value), topP: Number(byId("topp").value),
});

// Is the answer right? Only digits, + - * / and parentheses are read, by a parser of a few lines: an answer is data.
function verdict(text, cut) {
  const answer = text.split("</think>").at(-1).match(/<answer>([^<]*)<\/answer>/);
  const problem = byId("question").value.match(/\[([\d,\s]+)\]\s*=\s*(\d+)/);
  if (!answer) return cut ? `cut after ${MAX_TOKENS} tokens, without an answer` : "no answer in <answer> tags";
  if (!problem) return "";
  const value = calculate(answer[1]), used = (answer[1].match(/\d+/g) ?? []).map(Number).sort((a, b) => a - b);
  const given = problem[1].split(",").map(Number).sort((a, b) => a - b);
  if (value === null) return `${answer[1].trim()} is no expression`;
  const each = used.join() === given.join();
  const right = each && Math.abs(value - Number(problem[2])) < 1e-9;
  return `${answer[1].trim()} = ${Number(value.toFixed(4))}: ${right ? "right" : each ? "not the target" : "not every number once"}`;
}

function calculate(text) {
  const tokens = text.match(/\d+|[-+*/()]/g) ?? [];
  if (tokens.join("") !== text.replace(/\s/g, "") || tokens.length > 64) return null;
  let at = 0;
  const atom = () => {
    if (tokens[at] === "(") {
      at += 1;
      const value = sum();
      return tokens[at++] === ")" ? value : NaN;
    }
    return /^\d+$/.test(tokens[at] ?? "") ? Number(tokens[at++]) : NaN;
  };
  const product = () => {
    let value = atom();
    while (tokens[at] === "*" || tokens[at] === "/") value = tokens[at++] === "*" ? value * atom() : value / atom();
    return value;
  };
  const sum = () => {
    let value = product();
    while (tokens[at] === "+" || tokens[at] === "-") value = tokens[at++] === "+" ? value + product() : value - product();
    return value;
  };
  const value = sum();
  return at === tokens.length && Number.isFinite(value) ? value : null;
}

// Everything about one token: attention by head, its way through a block with the sums, and the logit lens.
const CHOSEN = { thinker: null, index: 0, layer: 0, head: 0, open: new Set() };

function inspect(thinker, index) {
  Object.assign(CHOSEN, { thinker, index });
  thinker.at = index;
  thinker.showNext();
  THINKERS.forEach((t) => [...t.tokens.children].forEach((li, i) => li.classList.toggle("chosen", t === thinker && i === index)));
  drawLooks();
  drawWay();
  const lens = byId("live-lens");
  fillTable(lens, ["read after", "likeliest next tokens"], thinker.steps[index].trace.residual.map((x, layer) => {
    const p = softmax(Array.from(thinker.model.read(x)).slice(0, LIVE.vocab_size));
    const order = p.map((_, i) => i).sort((a, b) => p[b] - p[a]).slice(0, 4);
    return [element("th", {}, layer ? `block ${layer - 1}` : "embedding"),
      ...order.map((i) => element("td", { style: shade(p[i] * 0.7) }, `${visible(BPE_TOKENIZER.decode([i]))} ${percent(p[i])}`))];
  }));
}

const labelOf = (t) => visible(BPE_TOKENIZER.decode([CHOSEN.thinker.steps[t].id]));

// A row a head; its button chooses the head whose sums are shown.
function drawLooks() {
  const step = CHOSEN.thinker.steps[CHOSEN.index];
  fillTable(byId("looks"), [], step.trace.layers.flatMap(({ weights }, layer) => weights.map((row, head) => {
    const button = element("button", { type: "button" }, `layer ${layer}, head ${head}`);
    button.addEventListener("click", () => {
      Object.assign(CHOSEN, { layer, head });
      drawWay();
    });
    return [element("th", {}, button),
      ...row.map((w, t) => element("td", { style: shade(Math.sqrt(w) * 0.8), title: `${labelOf(t)}: ${w.toFixed(3)}` }, labelOf(t)))];
  })));
}

function drawWay() {
  const { thinker, index, layer, head, open } = CHOSEN;
  [...byId("looks").querySelectorAll("button")].forEach((button, i) =>
    button.setAttribute("aria-pressed", String(i === layer * FACTS.config.num_attention_heads + head)));
  byId("way-title").textContent = `Token ${index}, ${labelOf(index)}: layer ${layer}, head ${head}`;
  byId("way").replaceChildren(...wayThrough(thinker.model, thinker.steps, thinker.cache, index, layer, head, labelOf).map((stage, i) => {
    const details = element("details", {}, element("summary", {}, element("b", {}, stage.name), " ",
      element("code", {}, stage.shape), " ", element("span", { class: "hint" }, stage.gist)), element("div", { class: "sum" }, stage.lines.join("\n")));
    details.open = open.has(i);
    details.addEventListener("toggle", () => (details.open ? open.add(i) : open.delete(i)));
    return details;
  }));
}

const THINKERS = MODELS.map((model, i) => new Thinker(model, FACTS.names[i]));
let running = null;

function restart() {
  stop();
  const ids = BPE_TOKENIZER.encode(LIVE.before + byId("question").value + LIVE.after);
  THINKERS.forEach((thinker) => thinker.start(ids, Number(byId("seed").value)));
  THINKERS[0].restartedWith = byId("question").value + "/" + byId("seed").value;
  inspect(THINKERS[0], THINKERS[0].steps.length - 1);
}

function stop() {
  cancelAnimationFrame(running);
  running = null;
  byId("run").textContent = "Think";
}

function think() {
  const more = THINKERS.map((thinker) => thinker.advance()).some(Boolean); // each token draws a frame: one sees it think
  if (more) running = requestAnimationFrame(think);
  else stop();
}

byId("controls").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running !== null) return stop();
  restart();
  byId("run").textContent = "Stop";
  running = requestAnimationFrame(think);
});
byId("one").addEventListener("click", () => {
  stop();
  const asked = byId("question").value + "/" + byId("seed").value;
  if (THINKERS[0].restartedWith !== asked || THINKERS.every((t) => t.done)) restart();
  THINKERS.forEach((thinker) => thinker.advance());
});
for (const name of ["temperature", "topk", "topp"]) {
  const show = () => {
    const value = Number(byId(name).value);
    byId(name + "-value").textContent = name === "topk" && value === 0 ? "off" : String(value);
    THINKERS.forEach((thinker) => thinker.showNext());
    drawWay();
  };
  byId(name).addEventListener("input", show);
}
byId("question").value = LIVE.question;
byId("question").addEventListener("change", restart);
restart();
for (const name of ["temperature", "topk", "topp"]) byId(name).dispatchEvent(new Event("input"));
