// Qwen2 in plain JavaScript: the forward pass with a cache, the tokenizer and the sampler of this project's Python, for a
// model small enough to live in a page. One token at a time, fp32 like the weights; every loop is the textbook's.
//
//   const model = new Qwen2(config, live, fp32(live.weights[0]));  // weights: fp32, in the order of live.shapes;
//                                                                  // live.frequencies: radians a token
//   const cache = model.newCache();
//   const { logits, trace } = model.step(id, cache);      // trace: the activations, for the page
"use strict";

// Numbers in fp32 from base64 of their little-endian bytes.
const fp32 = (base64) => new Float32Array(Uint8Array.from(atob(base64), (c) => c.charCodeAt(0)).buffer);

class Qwen2 {
  constructor(config, { shapes, frequencies }, view) {
    this.config = config;
    this.all = view;
    this.weights = {};
    let start = 0;
    for (const [name, shape] of shapes) {
      const size = shape.reduce((a, b) => a * b, 1);
      this.weights[name] = view.subarray(start, start + size);
      start += size;
    }
    this.frequencies = frequencies;
  }

  newCache() {
    return { length: 0, layers: Array.from({ length: this.config.num_hidden_layers }, () => ({ k: [], v: [] })) };
  }

  // y = W x + b; W is [out, in] row by row
  linear(name, x) {
    const W = this.weights[name + ".weight"], b = this.weights[name + ".bias"];
    const rows = W.length / x.length, y = new Float32Array(rows);
    for (let o = 0, at = 0; o < rows; o++) {
      let sum = 0;
      for (let i = 0; i < x.length; i++, at++) sum += W[at] * x[i];
      y[o] = b ? sum + b[o] : sum;
    }
    return y;
  }

  // x / sqrt(mean(x^2) + eps) * weight; a head at a time where the weight is as long as a head (Qwen3's q_norm, k_norm)
  norm(name, x) {
    const weight = this.weights[name + ".weight"], y = new Float32Array(x.length);
    for (let start = 0; start < x.length; start += weight.length) {
      let squares = 0;
      for (let i = 0; i < weight.length; i++) squares += x[start + i] * x[start + i];
      const scale = 1 / Math.sqrt(squares / weight.length + this.config.rms_norm_eps);
      for (let i = 0; i < weight.length; i++) y[start + i] = x[start + i] * scale * weight[i];
    }
    return y;
  }

  // turn each pair (i, i + K/2) of every head by position * frequency
  rotate(x, position) {
    const K = this.config.head_dim, y = new Float32Array(x.length);
    for (let head = 0; head < x.length; head += K)
      for (let i = 0; i < K / 2; i++) {
        const angle = position * this.frequencies[i], cos = Math.cos(angle), sin = Math.sin(angle);
        const a = x[head + i], b = x[head + i + K / 2];
        y[head + i] = a * cos - b * sin;
        y[head + i + K / 2] = b * cos + a * sin;
      }
    return y;
  }

  // Queries or keys before they are turned; Qwen3 norms them
  project(name, which, x) {
    const y = this.linear(`${name}.${which}_proj`, x), norm = `${name}.${which}_norm`;
    return this.weights[norm + ".weight"] ? this.norm(norm, y) : y;
  }

  // One token's attention over the cache: its new key and value are put there first.
  attention(layer, x, cache, trace) {
    const { num_attention_heads: H, num_key_value_heads: G, head_dim: K } = this.config;
    const name = `model.layers.${layer}.self_attn`, { k: keys, v: values } = cache.layers[layer];
    const q = this.rotate(this.project(name, "q", x), cache.length);
    keys.push(this.rotate(this.project(name, "k", x), cache.length));
    values.push(this.linear(name + ".v_proj", x));
    const z = new Float32Array(H * K), scores = [], weights = [];
    for (let h = 0; h < H; h++) {
      const from = Math.floor((h * G) / H) * K; // heads share keys and values
      const s = keys.map((key) => dot(q, h * K, key, from, K) / Math.sqrt(K));
      const w = softmax(s);
      values.forEach((value, t) => { for (let i = 0; i < K; i++) z[h * K + i] += w[t] * value[from + i]; });
      scores.push(s);
      weights.push(w);
    }
    trace.layers.push({ q, scores, weights });
    return this.linear(name + ".o_proj", z);
  }

  // silu(gate(x)) * up(x)
  swiglu(layer, x) {
    const name = `model.layers.${layer}.mlp`;
    const gate = this.linear(name + ".gate_proj", x), up = this.linear(name + ".up_proj", x);
    return { gate, up, act: gate.map((g, i) => (g / (1 + Math.exp(-g))) * up[i]) };
  }

  mlp(layer, x) {
    return this.linear(`model.layers.${layer}.mlp.down_proj`, this.swiglu(layer, x).act);
  }

  // One token through the model: logits [V] of the next one, and the activations.
  step(id, cache) {
    const D = this.config.hidden_size, trace = { layers: [], residual: [], between: [] };
    let x = this.weights["model.embed_tokens.weight"].slice(id * D, (id + 1) * D);
    for (let layer = 0; layer < this.config.num_hidden_layers; layer++) {
      const name = `model.layers.${layer}`;
      trace.residual.push(x);
      x = add(x, this.attention(layer, this.norm(name + ".input_layernorm", x), cache, trace));
      trace.between.push(x); // the residual stream between the two halves of the block
      x = add(x, this.mlp(layer, this.norm(name + ".post_attention_layernorm", x)));
    }
    trace.residual.push(x);
    cache.length += 1;
    return { logits: this.read(x), trace };
  }

  // final norm and head; of any residual stream, which makes it the logit lens
  read(x) {
    return this.linear(this.weights["lm_head.weight"] ? "lm_head" : "model.embed_tokens", this.norm("model.norm", x));
  }
}

const add = (a, b) => a.map((v, i) => v + b[i]);

function dot(a, i, b, j, n) {
  let sum = 0;
  for (let m = 0; m < n; m++) sum += a[i + m] * b[j + m];
  return sum;
}

function softmax(x) {
  const top = x.reduce((a, b) => Math.max(a, b)), e = Array.from(x, (v) => Math.exp(v - top));
  const total = e.reduce((a, b) => a + b);
  return e.map((v) => v / total);
}

// Probabilities the sampler draws from: temperature first, then top-k, then top-p. Ties of the k-th stay in, as in Python.
function filtered(logits, { temperature = 1, topK = 0, topP = 1 }, vocabSize = logits.length) {
  const kept = Array.from(logits).slice(0, vocabSize);
  if (temperature === 0) {
    const best = kept.indexOf(Math.max(...kept));
    return kept.map((_, i) => (i === best ? 1 : 0));
  }
  let p = softmax(kept.map((v) => v / temperature));
  if (topK > 0 && topK < p.length) {
    const kth = [...p].sort((a, b) => b - a)[topK - 1];
    p = p.map((v) => (v < kth ? 0 : v));
  }
  if (topP < 1) {
    const order = p.map((_, i) => i).sort((a, b) => p[b] - p[a]), all = p.reduce((a, b) => a + b);
    let above = 0; // weight of all that is likelier
    for (const i of order) {
      const own = p[i];
      if (above >= topP * all) p[i] = 0;
      above += own;
    }
  }
  const total = p.reduce((a, b) => a + b);
  return p.map((v) => v / total);
}

// The first id whose cumulative probability exceeds u in [0, 1).
function draw(p, u) {
  let sum = 0, last = 0;
  for (let i = 0; i < p.length; i++) {
    if (p[i] === 0) continue;
    sum += p[i];
    last = i;
    if (u < sum) return i;
  }
  return last;
}

// A small seeded generator (mulberry32), so that both models of a page draw the same numbers.
function uniforms(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

// Byte-level BPE from a tokenizer.json as Qwen2's: added tokens, NFC, the split, bytes as letters, merges by rank.
class BPE {
  constructor(file) {
    this.vocab = file.model.vocab;
    this.ranks = new Map(file.model.merges.map((m, i) => [Array.isArray(m) ? m.join(" ") : m, i]));
    this.added = new Map(file.added_tokens.map((t) => [t.content, t.id]));
    this.texts = new Map(Object.entries(this.vocab).map(([token, id]) => [id, token]));
    const escape = (s) => s.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
    const longest = [...this.added.keys()].sort((a, b) => b.length - a.length).map(escape);
    this.special = longest.length ? new RegExp(`(${longest.join("|")})`, "u") : null;
    const source = file.pre_tokenizer.pretokenizers[0].pattern.Regex;
    // JavaScript has no inline (?i:...) yet everywhere: spell the contractions out.
    this.split = new RegExp(source.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)",
      "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"), "gu");
    this.letters = byteLetters();
    this.bytes = new Map(this.letters.map((letter, byte) => [letter, byte]));
  }

  encode(text) {
    const ids = [];
    for (const piece of this.special ? text.split(this.special) : [text]) {
      if (this.added.has(piece)) ids.push(this.added.get(piece));
      else for (const word of piece.normalize("NFC").match(this.split) ?? []) ids.push(...this.word(word));
    }
    return ids;
  }

  word(text) {
    let parts = Array.from(new TextEncoder().encode(text), (byte) => this.letters[byte]);
    for (;;) {
      let best = Infinity, at = -1;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.ranks.get(parts[i] + " " + parts[i + 1]) ?? Infinity;
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) return parts.map((part) => this.vocab[part]);
      parts = [...parts.slice(0, at), parts[at] + parts[at + 1], ...parts.slice(at + 2)];
    }
  }

  decode(ids) {
    const bytes = [], special = new Map([...this.added].map(([text, id]) => [id, text]));
    for (const id of ids) {
      if (special.has(id)) bytes.push(...new TextEncoder().encode(special.get(id)));
      else for (const letter of this.texts.get(id) ?? "") bytes.push(this.bytes.get(letter));
    }
    return new TextDecoder().decode(new Uint8Array(bytes));
  }
}

// GPT-2's printable letter for each byte.
function byteLetters() {
  const printable = (b) => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || (b >= 174 && b <= 255);
  let extra = 256;
  return Array.from({ length: 256 }, (_, b) => String.fromCharCode(printable(b) ? b : extra++));
}

if (typeof module !== "undefined") module.exports = { Qwen2, fp32, BPE, filtered, draw, softmax, uniforms };
