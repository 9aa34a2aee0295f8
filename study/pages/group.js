// A group of responses, their rewards and advantages, and the push that an advantage gives to a token: the numbers of GRPO for
// one problem. The push goes through the head's weights alone, so that each number can be worked out in a line.
"use strict";

const GROUP_SIZE = 8, FORMAT_WEIGHT = 0.1, EPSILON = 1e-4; // as in `compute_advantages`
const GROUP = { members: [], advantages: [], drawing: false };

// The rewards of tasks/rewards.py: 1 for a right answer, and a tenth of the format's.
function formatOf(text) {
  const tags = ["<think>", "</think>", "<answer>", "</answer>"], count = (tag) => text.split(tag).length - 1;
  const rest = text.slice(text.indexOf("</think>") + 8).trimStart();
  const inOrder = text.startsWith("<think>") && text.includes("</think>") && rest.startsWith("<answer>") && rest.endsWith("</answer>");
  if (inOrder && tags.every((tag) => count(tag) === 1)) return 1;
  const pair = (open, close) => text.includes(open) && text.indexOf(close, text.indexOf(open) + open.length) >= 0;
  return 0.1 * pair("<think>", "</think>") + 0.5 * pair("<answer>", "</answer>");
}

const rewardOf = (text, question) => Number(isRight(text, question)) + FORMAT_WEIGHT * formatOf(text);

// (reward - mean) / (deviation of the group + epsilon); exactly 0 if all rewards are equal
function advantagesOf(rewards) {
  if (Math.min(...rewards) === Math.max(...rewards)) return rewards.map(() => 0);
  const mean = rewards.reduce((a, b) => a + b) / rewards.length;
  const deviation = Math.sqrt(rewards.reduce((sum, r) => sum + (r - mean) ** 2, 0) / rewards.length);
  return rewards.map((r) => (r - mean) / (deviation + EPSILON));
}

// A sampled response at temperature 1, without filters, as in training.
function sampleMember(ids, seed, number) {
  const text = new LiveText(MODELS[0], `response ${number} of the group`), random = uniforms(seed);
  text.begin(ids);
  while (text.tokens.length - text.promptLength < MAX_TOKENS) {
    const p = text.probabilities(text.tokens.length - 1), id = draw(p, random());
    if (LIVE.stop.includes(id)) return Object.assign(text, { stopped: true });
    text.read(id, p[id]);
  }
  return text;
}

function drawGroup() {
  const question = byId("question").value;
  byId("complaint").textContent = complaint(question, LIVE.trained);
  if (GROUP.drawing || refusal(question, LIVE.trained)) return;
  const ids = BPE_TOKENIZER.encode(LIVE.before + question + LIVE.after), seed = Number(byId("seed").value);
  Object.assign(GROUP, { members: [], advantages: [], rewards: [], question, drawing: true });
  const one = () => { // a frame for each response, so that the page stays awake
    GROUP.members.push(sampleMember(ids, seed * GROUP_SIZE + GROUP.members.length + 1, GROUP.members.length + 1));
    const rewards = GROUP.members.map((text) => rewardOf(text.judged(), question));
    Object.assign(GROUP, { rewards, advantages: advantagesOf(rewards), drawing: GROUP.members.length < GROUP_SIZE });
    showGroup();
    if (GROUP.drawing) requestAnimationFrame(one);
    else pointAtFirst();
  };
  one();
}

// The first token of the response of largest advantage that the model was not sure of.
function pointAtFirst() {
  const size = GROUP.advantages.map(Math.abs), text = GROUP.members[size.indexOf(Math.max(...size))];
  const unsure = text.steps.findIndex((step) => step.p !== null && step.p < 0.9);
  choose(text, Math.max(unsure, text.promptLength));
}

function showGroup() {
  const top = Math.max(...GROUP.advantages.map(Math.abs), 1e-9);
  fillTable(byId("group-table"), ["response", "reward", "advantage", "answer"], GROUP.members.map((text, k) => {
    const button = element("button", { type: "button", "aria-pressed": String(CHOSEN.text === text) }, String(k + 1));
    button.addEventListener("click", () => { choose(text, text.promptLength); byId("group-table").querySelectorAll("button")[k].focus(); });
    const a = GROUP.advantages[k];
    return [element("th", {}, button), element("td", { class: "n" }, GROUP.rewards[k].toFixed(2)),
      element("td", { class: "n", style: shade((Math.abs(a) / top) * 0.5, a > 0 ? "--up" : "--down") }, (a > 0 ? "+" : "") + a.toFixed(2)),
      element("td", {}, verdict(text.judged(), GROUP.question, text.stopped ? 0 : MAX_TOKENS))];
  }));
  const spread = new Set(GROUP.rewards.map((r) => r.toFixed(4))).size > 1;
  byId("group-said").textContent = GROUP.drawing ? `${GROUP.members.length} of ${GROUP_SIZE} …`
    : spread ? "Each advantage is (reward − mean) / deviation of the group." : "All rewards are equal: every advantage is 0, and nothing is learnt. Take another seed or problem.";
}

// The gradient of -A log p(token) with respect to the logits is A (p - 1[token]). A step of SGD on the head's weights W moves
// the logits, W x, by -lr A (p - 1[token]) |x|^2.
function push(model, step, id, advantage, rate) {
  const x = model.norm("model.norm", step.residual), p = softmax(Array.from(step.logits.slice(0, LIVE.vocab_size)));
  const coefficients = p.map((share, v) => advantage * (share - (v === id ? 1 : 0)));
  const squared = x.reduce((sum, v) => sum + v * v, 0);
  const after = softmax(Array.from(step.logits.slice(0, LIVE.vocab_size), (v, i) => v - rate * coefficients[i] * squared));
  return { x, p, after, coefficients, squared };
}

function drawPush(text, i) {
  const k = GROUP.members.indexOf(text), inResponse = i >= text.promptLength;
  const shown = GROUP.members.length === GROUP_SIZE && k >= 0 && inResponse;
  byId("push-panel").hidden = !shown;
  if (GROUP.members.length) showGroup();
  if (!shown) return;
  byId("push-tokens").replaceChildren(groupList(text, i));
  const A = GROUP.advantages[k], id = text.tokens[i].id, before = text.steps[i - 1];
  const step = { logits: before.logits, residual: before.trace.residual.at(-1) };
  const { squared } = push(text.model, step, id, A, 0), rate = (Number(byId("rate").value) * 2) / squared;
  const { x, p, after, coefficients } = push(text.model, step, id, A, rate);
  const name = LIVE.shapes.some(([n]) => n === "lm_head.weight") ? "lm_head.weight" : "model.embed_tokens.weight";
  const w = text.model.weights[name][id * x.length], gradient = coefficients[id] * x[0];
  byId("rate-value").textContent = short(rate);
  byId("push-sum").textContent = [
    `advantage A = ${short(A)}, p(${visible(wordOf(id))}) = ${short(p[id])}`,
    `loss = −A · log p; slope at its logit = A · (p − 1) = ${short(coefficients[id])}`,
    `weight [${id}, 0] of the head, row ${visible(wordOf(id))}: slope = ${short(coefficients[id])} · x[0] = ${short(coefficients[id])} · ${short(x[0])} = ${short(gradient)}`,
    `new weight = ${short(w)} − ${short(rate)} · ${short(gradient)} = ${short(w - rate * gradient)}`,
  ].join("\n");
  const order = p.map((_, v) => v).sort((a, b) => p[b] - p[a]).slice(0, 6), rows = order.includes(id) ? order : [id, ...order.slice(0, 5)];
  fillTable(byId("push-table"), ["token", "before", "after the step", "slope at its logit"], rows.map((v) => [
    element("th", {}, v === id ? element("b", {}, `${visible(wordOf(v))} (drawn)`) : visible(wordOf(v))),
    element("td", { class: "n" }, percent(p[v])),
    element("td", { class: "n", style: shade(Math.abs(after[v] - p[v]), after[v] > p[v] ? "--up" : "--down") }, percent(after[v])),
    element("td", { class: "n" }, short(coefficients[v]))]));
}

function groupList(text, i) {
  const list = tokenList(text);
  text.tokens.forEach((_, k) => addToken(list, text, k).classList.toggle("chosen", k === i));
  if (document.activeElement?.closest?.("#push-tokens")) requestAnimationFrame(() => list.children[CHOSEN.index]?.firstChild.focus({ preventScroll: true }));
  return list;
}

FOLLOWERS.push(drawPush);
byId("draw-group").addEventListener("click", drawGroup);
byId("rate").addEventListener("input", redraw);
