// The way of one token through one block, stage by stage, each with a sum worked out.
// Every number is computed again from the residual stream by the methods of qwen2.js, the ones that the answer came from.
"use strict";

const vector = (x, n = 5) => `[${Array.from(x.slice(0, n), short).join(", ")}${x.length > n ? ", …" : ""}]`;
const magnitude = (x) => Math.sqrt(x.reduce((sum, v) => sum + v * v, 0) / x.length);

// a . b as its largest terms, the rest, and the sum
function worked(a, b, extra = 0, terms = 3) {
  const products = Array.from(a, (v, i) => [v * b[i], i]).sort((p, q) => Math.abs(q[0]) - Math.abs(p[0]));
  const shown = products.slice(0, terms), rest = products.slice(terms).reduce((sum, [p]) => sum + p, 0);
  const total = products.reduce((sum, [p]) => sum + p, extra);
  const words = shown.map(([, i]) => `${short(a[i])}·${short(b[i])}`).join(" + ");
  return `${words} + ${products.length - shown.length} smaller terms ${short(rest)}${extra ? ` + bias ${short(extra)}` : ""} = ${short(total)}`;
}

// A row of a weight, and its bias
function rowOf(model, name, row, length) {
  return [model.weights[name + ".weight"].subarray(row * length, (row + 1) * length), (model.weights[name + ".bias"] ?? [])[row] ?? 0];
}

function normStage(model, title, name, x) {
  const y = model.norm(name, x), rms = Math.sqrt(magnitude(x) ** 2 + model.config.rms_norm_eps);
  return { name: title, shape: `[${x.length}]`, value: y, gist: `divided by ${short(rms)}`, lines: [
    `root mean square = √(mean of x² + ${model.config.rms_norm_eps}) = ${short(rms)}`,
    `number 0: ${short(x[0])} / ${short(rms)} · weight ${short(model.weights[name + ".weight"][0])} = ${short(y[0])}`] };
}

// Stages of token `index` in `layer`, as `head` sees it: [{name, shape, gist, lines, value}]
function wayThrough(model, steps, cache, index, layer, head, label) {
  const { config } = model, K = config.head_dim, D = config.hidden_size, stages = [];
  const name = `model.layers.${layer}`, attn = `${name}.self_attn`, x = steps[index].trace.residual[layer];
  const group = Math.floor((head * config.num_key_value_heads) / config.num_attention_heads);
  stages.push({ name: "Residual stream", shape: `[${D}]`, value: x, gist: `root mean square ${short(magnitude(x))}`, lines: [
    layer ? `output of block ${layer - 1}: ${vector(x)}` : `row ${steps[index].id} of embed_tokens: ${vector(x)}`] });

  const n = normStage(model, "RMSNorm", `${name}.input_layernorm`, x);
  const q = model.project(attn, "q", n.value), own = q.subarray(head * K, (head + 1) * K);
  const [row, bias] = rowOf(model, `${attn}.q_proj`, head * K, D);
  stages.push(n, { name: "Query", shape: `[${D}] → [${K}]`, value: own, gist: vector(own, 3), lines: [
    `number 0 of head ${head}: ${worked(row, n.value, bias)}`,
    `heads ${groupOf(config, group).join(", ")} share key-value head ${group}`] });

  const turned = model.rotate(q, index).subarray(head * K, (head + 1) * K), i = Math.floor(K / 8);
  const angle = index * model.frequencies[i], [a, b] = [own[i], own[i + K / 2]];
  stages.push({ name: "RoPE", shape: `[${K}]`, value: turned, gist: `pair ${i} turned by ${short(angle)} rad`, lines: [
    `angle = position ${index} · ${short(model.frequencies[i])} = ${short(angle)} rad`,
    `number ${i}: ${short(a)}·cos − ${short(b)}·sin = ${short(turned[i])}`,
    `number ${i + K / 2}: ${short(b)}·cos + ${short(a)}·sin = ${short(turned[i + K / 2])}`] });

  const { scores, weights } = steps[index].trace.layers[layer], s = scores[head], w = weights[head];
  const top = w.map((_, t) => t).sort((t, u) => w[u] - w[t]).slice(0, 5), total = s.reduce((sum, v) => sum + Math.exp(v - s[top[0]]), 0);
  const key = cache.layers[layer].k[top[0]].subarray(group * K, (group + 1) * K);
  stages.push({ name: "Attention weights", shape: `[${w.length}]`, value: w, gist: `most to ${label(top[0])}: ${short(w[top[0]])}`, lines: [
    `q · k of token ${top[0]}: ${worked(turned, key)}`,
    ...top.map((t) => `${label(t)} (token ${t}): score q·k/√${K} = ${short(s[t])}; exp(score − largest) / Σ = ${short(Math.exp(s[t] - s[top[0]]))} / ${short(total)} = ${short(w[t])}`)] });

  const values = cache.layers[layer].v.slice(0, w.length).map((v) => v.subarray(group * K, (group + 1) * K));
  const z = Float32Array.from({ length: K }, (_, c) => w.reduce((sum, weight, t) => sum + weight * values[t][c], 0));
  stages.push({ name: "Weighted values", shape: `[${w.length}, ${K}] → [${K}]`, value: z, gist: vector(z, 3), lines: [
    `number 0: Σ weight · value = ${worked(w, values.map((v) => v[0]))}`] });

  const between = steps[index].trace.between[layer], added = between.map((v, c) => v - x[c]);
  stages.push({ name: "o_proj, added", shape: `[${config.num_attention_heads * K}] → [${D}]`, value: between,
    gist: `adds ${short(magnitude(added))}`, lines: [`all heads together; number 0: ${short(x[0])} + ${short(added[0])} = ${short(between[0])}`] });

  const m = normStage(model, "RMSNorm", `${name}.post_attention_layernorm`, between);
  const { gate, up, act } = model.swiglu(layer, m.value);
  const j = act.reduce((best, v, c) => (Math.abs(v) > Math.abs(act[best]) ? c : best), 0);
  stages.push(m, { name: "SwiGLU", shape: `[${D}] → [${act.length}]`, value: act, gist: `loudest neuron ${j}: ${short(act[j])}`, lines: [
    `neuron ${j}, gate: ${worked(rowOf(model, `${name}.mlp.gate_proj`, j, D)[0], m.value)}`,
    `silu(gate) = gate / (1 + exp(−gate)) = ${short(gate[j] / (1 + Math.exp(-gate[j])))}`,
    `silu(gate) · up = ${short(gate[j] / (1 + Math.exp(-gate[j])))} · ${short(up[j])} = ${short(act[j])}`] });

  const out = steps[index].trace.residual[layer + 1];
  stages.push({ name: "down_proj, added", shape: `[${act.length}] → [${D}]`, value: out,
    gist: `adds ${short(magnitude(out.map((v, c) => v - between[c])))}`, lines: [
      `number 0: ${worked(rowOf(model, `${name}.mlp.down_proj`, 0, act.length)[0], act)}`,
      `added to the stream: ${short(between[0])} + ${short(out[0] - between[0])} = ${short(out[0])}`] });
  return [...stages, ...headStages(model, steps[index])];
}

// Behind the last block: norm, logits, probabilities.
function headStages(model, step) {
  const n = normStage(model, "Final norm", "model.norm", step.trace.residual.at(-1)), D = model.config.hidden_size;
  const logits = step.logits, best = logits.indexOf(Math.max(...logits)), asked = settings();
  const E = model.weights["lm_head.weight"] ?? model.weights["model.embed_tokens.weight"];
  const p = filtered(logits, asked, LIVE.vocab_size), text = (id) => visible(BPE_TOKENIZER.decode([id]));
  const order = p.map((_, i) => i).filter((i) => p[i] > 0).sort((i, k) => p[k] - p[i]).slice(0, 4);
  return [n, { name: "Logits", shape: `[${D}] → [${logits.length}]`, value: logits, gist: `highest ${text(best)}: ${short(logits[best])}`,
    lines: [`logit of ${text(best)} = row ${best} · x: ${worked(E.subarray(best * D, (best + 1) * D), n.value)}`] },
  { name: "Sampler", shape: `[${p.length}]`, value: p, gist: `${text(order[0])} ${percent(p[order[0]])}`, lines: [
    `temperature ${asked.temperature}, top-k ${asked.topK || "off"}, top-p ${asked.topP}: ${p.filter((v) => v > 0).length} of ${p.length} tokens are left`,
    ...order.map((i) => `${text(i)}: logit / temperature = ${asked.temperature ? short(logits[i] / asked.temperature) : "(greedy)"}, probability ${percent(p[i])}`)] }];
}

function groupOf(config, group) {
  const size = config.num_attention_heads / config.num_key_value_heads;
  return Array.from({ length: size }, (_, i) => group * size + i);
}
