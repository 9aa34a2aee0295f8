// Draws the facts of report.py.
"use strict";

let FACTS = JSON.parse(byId("data").textContent); // follow.js replaces it

const parts = (answer) => Object.entries(answer.reward_parts).map(([name, value]) => `${name} ${value}`).join(", ");

function verdict(answer, run) {
  const right = answer.reward_parts.answer === 1, cost = FACTS.false_sum_costs[run];
  return element("div", { class: "verdict" }, element("b", { class: right ? "right" : "wrong" }, right ? "right" : "wrong"),
    ` reward ${answer.reward === null ? "none" : answer.reward.toFixed(2)} (${parts(answer)}), ${answer.response_tokens} tokens` +
    (answer.finish_reason === "length" ? ", cut" : "") + (answer.reward_parts.arithmetic < 0 && cost ? `, a false sum cost ${cost.toFixed(2)}` : ""));
}

// A response with its false sums underlined and the text of its tool in a frame
function responseText(answer) {
  return element("div", { class: "answer" }, ...answer.pieces.map(([text, wrong, given]) =>
    wrong ? element("mark", { class: "false", title: "a false sum" }, text) :
      given ? element("ins", { class: "given", title: "text of the tool: the policy did not write it" }, text) : text));
}

// "Sampled: right in 2 of the 8 shown, then 5; of all 512 problems 24%, then 63%."
function drawWays() {
  const share = (x) => (100 * x).toFixed(0) + "%";
  byId("ways").textContent = FACTS.held_out.flatMap(({ ways }, run) => ways.filter((w) => w.shown).map((w) =>
    `${FACTS.names.length > 1 ? FACTS.names[run] + ", " : ""}${w.way === "greedy" ? "Greedy" : "Sampled"}: right in ${w.right[0]} of the ${w.shown} shown, then in ${w.right[1]}` +
    (w.all ? ` (of all ${w.problems} problems ${share(w.all[0])}, then ${share(w.all[1])})` : ""))).join(". ");
}

function drawHeldOut() {
  const cards = FACTS.held_out.flatMap(({ pairs }, run) => pairs.map((pair) => element("div", { class: "card" },
    element("b", {}, (FACTS.names.length > 1 ? FACTS.names[run] + ": " : "") + (pair.problem ?? "a problem without a name")),
    ...Object.entries(pair.ways).map(([way, both]) => element("div", { class: "way columns" }, ...both.map((answer, i) => element("div", {},
      element("div", { class: "soft" }, `${way}, ${i ? "after" : "before"} (step ${answer.step})`), verdict(answer, run), responseText(answer))))))));
  byId("held-out").replaceChildren(...(cards.length ? cards : [element("p", { class: "soft" },
    "This run kept no held-out responses of two evaluations.")]));
}

// [what the colour says, (answer, i) -> [colour variable, strength 0 to 1]] of a token
const COLOURINGS = {
  logprob: ["Darker red: less likely when it was drawn (white: certain; full: a chance of 1 in 50 or less).",
    (answer, i) => answer.tokens && answer.token_logprobs[i] !== null && ["--down", Math.min(1, -answer.token_logprobs[i] / Math.log(50))]],
  advantage: ["Green: better than its siblings, the whole answer; red: worse.",
    (answer) => answer.advantage !== null && [answer.advantage > 0 ? "--up" : "--down", Math.min(1, Math.abs(answer.advantage) / 2)]],
  ratio: ["Green: the later checkpoint makes this token likelier than it was when drawn; red: less likely (report.py --after).",
    (answer, i) => answer.ratios && [answer.ratios[i] > 1 ? "--up" : "--down", Math.min(1, Math.abs(Math.log(answer.ratios[i])) / 2)]],
};

function tokenSpans(answer, colouring) {
  const wrong = new Set(answer.false_tokens), given = (i) => answer.token_sampled?.[i] === false;
  return answer.tokens.map((text, i) => {
    if (given(i)) return element("ins", { class: "given", title: "a token of the tool: it is not trained on" }, text);
    const found = COLOURINGS[colouring][1](answer, i);
    const told = `p = ${Math.exp(answer.token_logprobs[i] ?? NaN).toFixed(4)}` + (answer.ratios ? `, ratio ${answer.ratios[i]}` : "");
    return element("span", { title: told, ...(wrong.has(i) ? { class: "false" } : {}),
      ...(found ? { style: `background: rgba(var(${found[0]}), ${(0.55 * found[1]).toFixed(3)})` } : {}) }, text);
  });
}

function groupsOfAll() {
  return FACTS.groups.flatMap((groups, number) => groups.map((group) => ({ number, run: FACTS.names[number], ...group })));
}

function drawGroupChoices() {
  options(byId("group"), groupsOfAll().map((g) => `${FACTS.names.length > 1 ? g.run + ", " : ""}step ${g.step}: ${g.problem}`));
}

function drawGroup() {
  const group = groupsOfAll()[byId("group").value], colouring = byId("colour").value;
  if (!group) return byId("group-view").replaceChildren(element("p", { class: "soft" }, "This run kept no samples."));
  const shown = group.answers.some((a) => a.tokens && COLOURINGS[colouring][1](a, 0));
  byId("colour-hint").textContent = (shown ? "" : "Not known for this group. ") + COLOURINGS[colouring][0] + " Wavy underline: a false sum.";
  const rewards = group.answers.map((a) => a.reward ?? 0), mean = rewards.reduce((a, b) => a + b) / rewards.length;
  byId("group-view").replaceChildren(
    element("p", { class: "soft" }, `mean reward ${mean.toFixed(3)} of ${rewards.length} answers`),
    ...group.answers.map((answer) => element("div", { class: "card" }, verdict(answer, group.number),
      element("div", { class: "soft" }, `advantage ${answer.advantage === null ? "none" : answer.advantage.toFixed(3)}`),
      answer.tokens ? element("div", { class: "answer" }, ...tokenSpans(answer, colouring)) : responseText(answer))));
}

// Everything that the data decide. What the reader has chosen stays chosen.
function drawAll() {
  drawCharts();
  drawWays();
  drawHeldOut();
  drawGroupChoices();
  drawGroup();
  drawMicroscopeChoices();
  drawMicroscope();
}

drawAll();
startMicroscope();
byId("group").addEventListener("change", drawGroup);
byId("colour").addEventListener("change", drawGroup);
byId("smooth").addEventListener("change", drawCharts);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCharts);
