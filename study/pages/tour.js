// The guided tour: seven stops from a prompt to a changed weight, each with something to try. A stop shows its panel, and notes
// when it was tried. Keys: the arrows inside the card go back and on, Escape leaves.
"use strict";

const STOPS = [
  { at: "text", title: "A prompt is a row of tokens", text: "The model reads numbers, one for each token. Grey tokens are the prompt: the chat template and the problem. The rest is the response.",
    task: "Choose another token of the prompt, or change the problem.", key: () => `${CHOSEN.index} ${byId("question").value}` },
  { at: "picture", title: "A token goes through the model", text: "Each token becomes a vector. Every block adds to it twice: attention brings something from earlier tokens, the MLP works on the token alone.",
    task: "Choose Block 1, and in it Attention weights. There is the sum.", key: () => `${ZOOM.stage}`, done: () => ZOOM.stage === 4 },
  { at: "attention", title: "Attention looks back", text: "Each head decides how much every earlier token counts. Blue is more.",
    task: "Choose another head, and see its tokens in blue.", key: () => `${CHOSEN.layer}.${CHOSEN.head}` },
  { at: "next", title: "Logits become probabilities", text: "The head gives each token of the vocabulary a number, its logit. Divided by the temperature, softmax makes probabilities of them.",
    task: "Move the temperature: its slider is here.", key: () => byId("temperature").value, slider: true },
  { at: "text", title: "A token is sampled", text: "One token is drawn from these probabilities and put behind the text. Then the model reads it, too. The redder a token, the less likely it was.",
    task: "Press One token a few times, or Think. Another seed draws another response.", key: () => THINKERS[0].tokens.map((t) => t.id).join() },
  { at: "group", title: "Rewards become advantages", text: "GRPO draws several responses to one problem. A right answer has reward 1, the right form 0.1. The advantage says how much better a response is than its group.",
    task: "Draw a group of 8.", key: () => `${GROUP.members.length}`, done: () => GROUP.members.length === GROUP_SIZE },
  { at: "group", title: "An advantage changes a weight", text: "Every token of a response with a positive advantage becomes likelier, of one with a negative advantage less likely. The slope of the loss tells each weight where to go.",
    task: "Move the step size, and see the drawn token's probability and its weight change.", key: () => byId("rate").value, focus: "push-panel" },
];
const TOUR = { stop: null, begun: "", tried: new Set() };

function goTo(stop) {
  TOUR.stop = stop;
  byId("tour").hidden = stop === null;
  document.body.classList.toggle("touring", stop !== null);
  document.querySelectorAll(".toured").forEach((section) => section.classList.remove("toured"));
  if (stop === null) return byId("tour-start").focus();
  const { at, title, text, task, key, focus, slider } = STOPS[stop];
  if (stop === STOPS.length - 1 && GROUP.members.length && byId("push-panel").hidden) pointAtFirst();
  TOUR.begun = key();
  byId("tour-title").textContent = `${stop + 1} of ${STOPS.length}: ${title}`;
  byId("tour-text").textContent = text;
  byId("tour-task").textContent = task;
  byId("tour-slider").hidden = !slider;
  byId("tour-temperature").value = byId("temperature").value;
  byId("tour-back").disabled = stop === 0;
  byId("tour-next").textContent = stop === STOPS.length - 1 ? "End" : "Next";
  byId(at).classList.add("toured");
  (focus && !byId(focus).hidden ? byId(focus) : byId(at)).scrollIntoView({ block: "start" });
  byId("tour-title").focus({ preventScroll: true });
  noteTried();
}

// A stop was tried if its subject has changed since the stop began.
function noteTried() {
  if (TOUR.stop === null) return;
  const { key, done } = STOPS[TOUR.stop];
  if (done ? done() : key() !== TOUR.begun) TOUR.tried.add(TOUR.stop);
  byId("tour-tried").textContent = TOUR.tried.has(TOUR.stop) ? "✓ tried" : "to try";
  byId("tour-tried").classList.toggle("right", TOUR.tried.has(TOUR.stop));
  byId("tour-marks").textContent = STOPS.map((_, i) => (TOUR.tried.has(i) ? "●" : i === TOUR.stop ? "◉" : "○")).join(" ");
}

const move = (by) => {
  const stop = TOUR.stop + by;
  goTo(stop >= STOPS.length ? null : Math.max(0, stop));
};
byId("tour-start").addEventListener("click", () => goTo(0));
byId("tour-next").addEventListener("click", () => move(1));
byId("tour-back").addEventListener("click", () => move(-1));
byId("tour-leave").addEventListener("click", () => goTo(null));
byId("tour-temperature").addEventListener("input", () => {
  byId("temperature").value = byId("tour-temperature").value;
  byId("temperature").dispatchEvent(new Event("input"));
});
byId("tour").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (event.key === "Escape") goTo(null);
  else if (step && event.target.type !== "range") { event.preventDefault(); move(TOUR.stop === STOPS.length - 1 ? Math.min(step, 0) : step); }
});
for (const kind of ["click", "input", "keyup"]) document.addEventListener(kind, () => requestAnimationFrame(noteTried));
FOLLOWERS.push(noteTried);
