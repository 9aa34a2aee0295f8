// Swap one token: the model before training writes a response, the reader puts a token of the trained model into it, and the
// model before training goes on from there. A second reader of the same tokens, the trained model, says where both disagree.
"use strict";

const MOST = 5; // positions of largest disagreement that are marked

class Swapped extends LiveText {
  constructor() {
    super(MODELS[0], `${FACTS.names[0]} with swaps`);
    this.trained = new LiveText(MODELS[1], FACTS.names[1]);
    this.list = tokenList(this);
    this.at = 0;
    byId("swap-list").append(this.list);
  }

  // Begin with the response of the model before training, as it stands above.
  start() {
    const [written] = THINKERS, ids = written.tokens.map((t) => t.id);
    Object.assign(this, { question: written.question, stopped: written.done, swaps: new Map(), history: [] });
    this.take(ids, written.promptLength);
    this.random = uniforms(Number(byId("seed").value) + 1);
    this.at = this.differMost() ?? this.promptLength;
    this.draw();
  }

  take(ids, promptLength) {
    for (const text of [this, this.trained]) {
      text.begin(ids.slice(0, promptLength));
      ids.slice(promptLength).forEach((id) => text.read(id, 1));
    }
  }

  // KL(after || before), nats, of the choice of the token at position i; the position behind the last token is the stop.
  disagreement(i) {
    const [p, q] = [this, this.trained].map((text) => logSoftmax(text.steps[i - 1].logits.slice(0, LIVE.vocab_size)));
    return q.reduce((sum, log, v) => sum + Math.exp(log) * (log - p[v]), 0);
  }

  preferred(i) { return this.trained.probabilities(i - 1, { temperature: 0 }).indexOf(1); }
  current(i) { return i < this.tokens.length ? this.tokens[i].id : this.stopped ? LIVE.stop[0] : null; }
  changes(i) { return this.preferred(i) !== this.current(i) && !(LIVE.stop.includes(this.preferred(i)) && i === this.tokens.length); }
  positions() { return Array.from({ length: this.tokens.length + 1 - this.promptLength }, (_, k) => this.promptLength + k); }

  // The position where another token would be taken and both models disagree most; undefined if there is none.
  differMost() {
    return this.positions().filter((i) => this.changes(i)).sort((a, b) => this.disagreement(b) - this.disagreement(a))[0];
  }

  // Take the trained model's token at position i, and let the model before training go on.
  swap(i) {
    this.history.push({ ids: this.tokens.map((t) => t.id), swaps: new Map(this.swaps), at: this.at, stopped: this.stopped });
    const id = this.preferred(i), ends = LIVE.stop.includes(id);
    const replaced = this.current(i);
    this.cutTo(i);
    this.trained.cutTo(i);
    this.swaps = new Map([...this.swaps].filter(([k]) => k < i)); // position -> the token that was there
    this.stopped = ends;
    if (!ends) {
      this.add(id);
      this.swaps.set(i, replaced);
      this.goOn();
    }
    this.at = i;
    this.draw();
  }

  add(id) { [this, this.trained].forEach((text) => text.read(id, 1)); }

  goOn() {
    while (this.tokens.length - this.promptLength < MAX_TOKENS) {
      const id = draw(this.probabilities(this.tokens.length - 1, settings()), this.random());
      if (LIVE.stop.includes(id)) { this.stopped = true; return; }
      this.add(id);
    }
  }

  undo() {
    const { ids, swaps, at, stopped } = this.history.pop();
    this.take(ids, this.promptLength);
    Object.assign(this, { swaps, at, stopped });
    this.draw();
  }

  draw() {
    const kl = new Map(this.positions().map((i) => [i, this.disagreement(i)])), top = Math.max(...kl.values(), 1e-9);
    const most = new Set([...kl.keys()].sort((a, b) => kl.get(b) - kl.get(a)).slice(0, MOST));
    this.list.replaceChildren();
    this.tokens.forEach((_, i) => addToken(this.list, this, i));
    const end = element("button", { type: "button" }, "end");
    end.addEventListener("click", () => this.point(this.tokens.length));
    this.list.append(element("li", { class: "end" }, end));
    for (const [i, value] of kl) {
      const item = this.list.children[i];
      item.firstChild.append(element("span", { class: "kl", style: `height:${(14 * value) / top}px` }));
      item.firstChild.title = `the models disagree by ${short(value)} nats`;
      item.classList.toggle("most", most.has(i));
      item.classList.toggle("swapped", this.swaps.has(i));
    }
    byId("swap-verdict").textContent = `${this.question}: ${verdict(this.judged(), this.question, this.stopped ? 0 : MAX_TOKENS)}. ` +
      `${this.swaps.size === 1 ? "1 swap" : `${this.swaps.size} swaps`}.`;
    this.point(this.at);
  }

  // Show position i, and the token that each model would write there.
  point(i) {
    this.at = Math.max(i, this.promptLength);
    [...this.list.children].forEach((item, k) => item.classList.toggle("pointed", k === this.at));
    const before = this.probabilities(this.at - 1), after = this.trained.probabilities(this.at - 1), id = this.preferred(this.at);
    const own = this.current(this.at);
    const shares = (token) => `${nameOf(token)} (before ${percent(before[token])}, after ${percent(after[token])})`;
    const there = this.swaps.has(this.at) ? `${nameOf(this.swaps.get(this.at))} was swapped for ${shares(own)}`
      : `${FACTS.names[0]} wrote ${own === null ? "nothing more" : shares(own)}. ${FACTS.names[1]} prefers ${shares(id)}`;
    byId("swap-said").textContent = `Position ${this.at}: ${there}. The models disagree by ${short(this.disagreement(this.at))} nats (KL).`;
    byId("swap-take").textContent = this.changes(this.at) ? `Take ${nameOf(id)}` : "Same token";
    // A disabled button would lose the keyboard's focus: these stay, and do nothing.
    const idle = { "swap-take": !this.changes(this.at), "swap-undo": !this.history.length, "swap-most": this.differMost() === undefined };
    for (const [name, without] of Object.entries(idle)) byId(name).setAttribute("aria-disabled", String(without));
  }
}

const nameOf = (id) => (LIVE.stop.includes(id) ? "the end" : visible(wordOf(id)));

const SWAPPED = new Swapped();
ENDED.push(() => SWAPPED.start());
FOLLOWERS.push((text, i) => text === SWAPPED && SWAPPED.point(i));
for (const [name, act] of Object.entries({ "swap-take": () => SWAPPED.swap(SWAPPED.at), "swap-most": () => SWAPPED.swap(SWAPPED.differMost()),
  "swap-undo": () => SWAPPED.undo() }))
  byId(name).addEventListener("click", () => byId(name).getAttribute("aria-disabled") === "true" || act());
byId("swap-again").addEventListener("click", () => SWAPPED.start());
SWAPPED.start();
