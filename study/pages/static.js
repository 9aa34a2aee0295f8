// The text of a page without a running model: the facts of `anatomy.look`, which Python worked out.
"use strict";

class StaticText {
  constructor(look, name) {
    Object.assign(this, { look, name, tokens: look.tokens, promptLength: FACTS.prompt_tokens });
    this.first = look.tokens.length - look.next.length;
    const known = Object.keys(look.attention).map((key) => key.split(".").map(Number));
    [this.layers, this.heads] = [0, 1].map((part) => [...new Set(known.map((pair) => pair[part]))]);
  }

  weights(layer, head) { return this.look.attention[`${layer}.${head}`]; }
  next(i) { return this.look.next[i - this.first]; }
  lens(i) { return this.look.lens.map((row) => [row.layer ? `block ${row.layer - 1}` : "embedding", [row.best[i - this.first]]]); }
  norms(i) { return this.look.norms.map((n) => ({ ...n, value: n.by_token[i] })); }
  rope(i) { return this.look.rope.map((r) => ({ ...r, before: r.before_by_token[i], after: r.after_by_token[i] })); }
  memory() { return this.look.cache.bytes_per_token * this.tokens.length; }
}

const TEXTS = FACTS.looks.map((look, i) => new StaticText(look, FACTS.names[i]));
for (const text of TEXTS) {
  const list = tokenList(text);
  text.tokens.forEach((token, i) => addToken(list, text, i, `id ${token.id}`).append(element("small", {}, String(token.id))));
  byId("texts").append(element("div", {}, element("h3", {}, text.name), list));
}
choose(TEXTS[0], FACTS.looks[0].shown);
