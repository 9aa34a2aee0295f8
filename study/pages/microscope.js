// The token microscope of report.py: one response, what the step did to each token, and what another loss would have done.
"use strict";

const LOSSES = ["dapo", "grpo", "bnpo", "dr_grpo", "gspo", "cispo", "sapo"];
const UNIT_OF = { gspo: "sequence_surrogate", cispo: "cispo", sapo: "sapo" };
const UNITS = (loss) => UNIT_OF[loss] ?? "clipped_surrogate";
const looked = { token: 0 }; // the token whose numbers are shown

const small = (x) => (x === null || x === undefined ? "not known" : x === 0 ? "0" : Math.abs(x) >= 0.001 && Math.abs(x) < 1e5 ? x.toPrecision(4) : x.toExponential(3));

// All numbers of token i of a response under a loss. Tokens of a response that the step left out move nothing.
function tokenNumbers(step, response, loss, i) {
  const weight = response.weights[loss], out = response.left_out !== undefined;
  const units = out ? null : response.units[UNITS(loss)], own = loss === step.loss_type;
  const ratio = out ? null : units.ratio ?? response.ratio[i];
  return {
    coefficient: out ? 0 : own ? response.coefficient[i] : units.unit[i] === null ? null : weight * units.unit[i],
    advantage: response.advantage, ratio, weight, entropy: out ? null : response.entropy[i], drawn: response.drawn[i],
    clipped: out ? null : Number(units.clipped[i]), masked: Boolean(response.mask && !response.mask[i]),
  };
}

const largestOf = (step, response, losses, name) => Math.max(1e-30, ...losses.flatMap((loss) =>
  response.tokens.map((_, i) => Math.abs(tokenNumbers(step, response, loss, i)[name] ?? 0))));

// [what the colour says, (numbers, largest) -> [colour variable, strength 0 to 1] or null]
const LENSES = {
  coefficient: [(largest) => `Green: the step makes the token likelier; red: less likely. Full colour: a coefficient of ${small(largest)}.`,
    (n, largest) => n.coefficient && [n.coefficient < 0 ? "--up" : "--down", Math.abs(n.coefficient) / largest]],
  advantage: [() => "Green: better than the other responses of the group; red: worse. Full colour: 2 deviations. All tokens of a response have the same.",
    (n) => n.advantage && [n.advantage > 0 ? "--up" : "--down", Math.abs(n.advantage) / 2]],
  ratio: [() => "Probability now / probability when drawn. Green: above 1; red: below. Full colour: a factor of 1.2.",
    (n) => n.ratio && [n.ratio > 1 ? "--up" : "--down", Math.abs(Math.log(n.ratio)) / Math.log(1.2)]],
  clipped: [() => "Orange: the ratio left the clip range, so the policy loss does not move this token.", (n) => n.clipped && ["--mark", 1]],
  weight: [(largest) => `Share of the token in the step's loss. Full colour: ${small(largest)}.`, (n, largest) => ["--hue", n.weight / largest]],
  entropy: [() => "How open the choice was. Full colour: 2 nats or more.", (n) => n.entropy !== null && ["--hue", n.entropy / 2]],
  drawn: [() => "Darker: less likely when it was drawn. Full colour: a chance of 1 in 50 or less.",
    (n) => n.drawn !== null && ["--down", -n.drawn / Math.log(50)]],
};

const lookedAt = () => {
  const run = FACTS.microscope[byId("m-run").value], step = run?.steps[byId("m-step").value];
  return { step, response: step?.responses[byId("m-response").value] };
};

function options(select, texts) {
  const before = select.value;
  if (texts.length === select.children.length && texts.every((text, i) => select.children[i].textContent === text)) return; // it may be open
  select.replaceChildren(...texts.map((text, i) => element("option", { value: i }, text)));
  if (before !== "" && before < texts.length) select.value = before;
}

function drawMicroscopeChoices(wanted) {
  options(byId("m-run"), FACTS.names);
  byId("m-run").parentElement.hidden = FACTS.names.length < 2;
  const run = FACTS.microscope[byId("m-run").value];
  byId("m-note").textContent = run.note;
  byId("m-body").hidden = !run.steps.length;
  if (!run.steps.length) return;
  const seen = String(wanted ?? byId("m-step").dataset.step), number = run.steps.findIndex((step) => String(step.step) === seen);
  options(byId("m-step"), run.steps.map((step) => `${step.step}${step.facts.refused ? " (refused)" : ""}`));
  byId("m-step").value = number < 0 ? 0 : number; // the same step, if a longer run shows others now
  const { step } = lookedAt();
  const same = byId("m-step").dataset.step === String(step.step);
  byId("m-step").dataset.step = step.step;
  options(byId("m-response"), step.responses.map((r) =>
    `${r.problem ?? "group " + r.group}, ${r.number}: ${r.right ? "right" : "wrong"}, advantage ${r.advantage?.toFixed(2) ?? "none"}${r.left_out ? ", left out" : ""}`));
  if (!same) byId("m-response").value = Math.max(0, step.responses.findIndex((r) => r.advantage && !r.left_out)); // one that was moved
  for (const [id, fallback] of [["m-left", step.loss_type], ["m-right", step.loss_type === "gspo" ? "dapo" : "gspo"]]) {
    const select = byId(id), before = select.value;
    select.replaceChildren(...LOSSES.map((loss) => element("option", { value: loss }, loss + (loss === step.loss_type ? " (this run's)" : ""))));
    select.value = before || fallback;
  }
}

function microscopeText(step, response, loss, lens, largest) {
  const text = element("div", { class: "answer lens", tabindex: 0, role: "group", "aria-label": `tokens under ${loss}; arrow keys choose one` });
  const wanted = Math.min(looked.token, response.tokens.length - 1);
  text.append(...response.tokens.map((token, i) => {
    const numbers = tokenNumbers(step, response, loss, i), found = LENSES[lens][1](numbers, largest);
    const span = element("span", { "data-i": i, title: `${lens}: ${lens === "clipped" ? ["no", "below", "above"][numbers.clipped] ?? "not known" : small(numbers[lens])}`,
      ...(i === wanted ? { class: "chosen" } : {}),
      ...(found ? { style: `background: rgba(var(${found[0]}), ${(0.6 * Math.min(1, found[1])).toFixed(3)})` } : {}) }, token.replace(/\n/g, "↵\n"));
    return span;
  }));
  text.addEventListener("click", (event) => { if (event.target.dataset.i) choose(Number(event.target.dataset.i)); });
  text.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1, Home: -1e9, End: 1e9 }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    choose(Math.max(0, Math.min(response.tokens.length - 1, wantedToken(response) + move)));
  });
  return text;
}

const wantedToken = (response) => Math.min(looked.token, response.tokens.length - 1);

function choose(i) {
  looked.token = i;
  for (const text of document.querySelectorAll(".lens")) {
    text.querySelector(".chosen")?.classList.remove("chosen");
    text.children[i]?.classList.add("chosen");
  }
  drawToken();
}

// The numbers of the chosen token, under all seven losses
function drawToken() {
  const { step, response } = lookedAt(), i = wantedToken(response);
  if (i < 0) return byId("m-token").replaceChildren(element("p", { class: "soft" }, "This response has no token."));
  const own = tokenNumbers(step, response, step.loss_type, i), masked = own.masked ? ", not among the step's tokens of highest entropy" : "";
  byId("m-token-name").textContent = `Token ${i + 1} of ${response.tokens.length}: ${visible(response.tokens[i])}`;
  byId("m-token-facts").textContent = `drawn with probability ${own.drawn === null ? "not known" : small(Math.exp(own.drawn))}, in the update ` +
    `${response.left_out ? "not computed" : small(Math.exp(response.logp[i]))}; advantage ${small(own.advantage)}; entropy ${small(own.entropy)} nats${masked}`;
  fillTable(byId("m-token"), ["loss", "coefficient", "becomes", "ratio", "clipped", "weight"], LOSSES.map((loss) => {
    const n = tokenNumbers(step, response, loss, i), name = loss === step.loss_type ? element("b", {}, loss) : loss;
    return [element("th", {}, name), element("td", { class: "n" }, small(n.coefficient)),
      element("td", {}, n.coefficient === null ? "" : n.coefficient < 0 ? "likelier" : n.coefficient > 0 ? "rarer" : "neither"),
      ...[small(n.ratio), ["no", "below", "above"][n.clipped] ?? "not known", small(n.weight)].map((text) => element("td", { class: "n" }, text))];
  }));
}

function drawMicroscope() {
  const { step, response } = lookedAt();
  if (!response) return;
  const lens = byId("m-colour").value, losses = [byId("m-left").value, byId("m-right").value];
  const largest = largestOf(step, response, losses, lens), f = step.facts;
  byId("m-hint").textContent = LENSES[lens][0](largest);
  const limited = step.grad_norm > step.max_grad_norm ? ` The whole gradient had norm ${small(step.grad_norm)} and was then scaled down to ${small(step.max_grad_norm)}.` : "";
  byId("m-step-facts").textContent = `Step ${step.step}: ${f.responses} responses, ${f.tokens} tokens in the loss, longest possible ${f.longest}.` +
    (step.options ? ` Options: ${step.options}.` : "") + (f.refused ? " This update was refused, so no weight moved." : "") + limited;
  byId("m-left-out").textContent = response.left_out ? `The step left this response out: ${response.left_out}.` : "";
  byId("m-covers").textContent = (step.entropy_coef ? `The entropy term of this run (${small(step.entropy_coef)}) moves the logits through the entropy of each position, not through ` +
    "this log-probability, so the coefficient does not contain it. " : "") + (step.transport ? "Nor does it contain the optimal transport, which moves the hidden states. " : "");
  byId("m-view").replaceChildren(...losses.map((loss) => element("div", { class: "card" }, element("b", {}, loss + (loss === step.loss_type ? " (this run's)" : "")),
    element("div", { class: "soft" }, `weight ${small(response.weights[loss])}` + (response.left_out ? "" : `, ${[...response.units[UNITS(loss)].clipped].filter((c) => c !== "0").length} of ${response.tokens.length} tokens clipped` +
      (loss === step.loss_type ? `; autograd's numbers, which the page's differ from by ${small(response.difference)} at most, at weight 1` : ""))),
    microscopeText(step, response, loss, lens, largest))));
  drawToken();
}

function startMicroscope() {
  const redraw = (step) => { drawMicroscopeChoices(step); drawMicroscope(); };
  byId("m-run").addEventListener("change", () => { byId("m-step").dataset.step = ""; redraw(); });
  byId("m-step").addEventListener("change", () => {
    const { steps } = FACTS.microscope[byId("m-run").value];
    byId("m-step").dataset.step = "";
    redraw(steps[byId("m-step").value].step);
  });
  for (const id of ["m-response", "m-colour", "m-left", "m-right"]) byId(id).addEventListener("change", drawMicroscope);
}
