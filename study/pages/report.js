// Draws the facts of report.py. What a model wrote goes in as text, never as markup.
"use strict";

const FACTS = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const COLOURS = ["#1f83d6", "#e07a1f", "#2ba35a", "#c6423b", "#8a63d2", "#b08a2e", "#d65aa8", "#5f7d8c"];
const DASHES = ["solid", "dot", "dash", "longdash", "dashdot"];

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// Means of the last `window` values.
function smoothed(values, window) {
  return values.map((_, i) => {
    const part = values.slice(Math.max(0, i - window + 1), i + 1);
    return part.reduce((a, b) => a + b) / part.length;
  });
}

// One run: a colour for each metric. Several: a colour for each run, a dash for each metric, and bands of evaluations only;
// the legend names the runs, which a click hides, and then the dashes.
function traces(chart) {
  const metrics = [...new Set(chart.lines.map((line) => line.metric))], many = FACTS.names.length > 1;
  const dash = (metric) => (many ? DASHES[metrics.indexOf(metric) % DASHES.length] : "solid");
  const named = new Set();
  const drawn = chart.lines.flatMap((line) => {
    const colour = COLOURS[(many ? line.run : metrics.indexOf(line.metric)) % COLOURS.length];
    const training = !line.metric.startsWith("eval"), smooth = byId("smooth").checked && training;
    const group = { legendgroup: many ? line.run : line.metric, showlegend: !many || !named.has(line.run) };
    named.add(line.run);
    const curve = { x: line.x, y: smooth ? smoothed(line.y, 10) : line.y, ...group,
      name: plain(many ? FACTS.names[line.run] : line.metric), mode: training ? "lines" : "lines+markers", marker: { size: 5 },
      text: plain(line.metric), hovertemplate: `%{y:.4g} %{text}<extra>${many ? "%{fullData.name}" : ""}</extra>`,
      line: { color: colour, width: training ? 1.5 : 2, dash: dash(line.metric) } };
    if (!line.low || smooth || (many && training)) return [curve];
    const edge = { x: line.x, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false, legendgroup: group.legendgroup };
    return [{ ...edge, y: line.low }, { ...edge, y: line.high, fill: "tonexty", fillcolor: colour + "26" }, curve];
  });
  if (many && metrics.length > 1) drawn.push(...metrics.map((metric) => ({ x: [chart.lines[0].x[0]], y: [null], name: plain(metric),
    mode: "lines", legendgroup: "metric " + metric, line: { color: css("--ink"), width: 1.5, dash: dash(metric) } })));
  return drawn;
}

// plotly reads some HTML in names: a run's folder may be called anything.
const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;");

function drawCharts() {
  const grid = { gridcolor: css("--line"), zerolinecolor: css("--line"), automargin: true };
  byId("charts").replaceChildren(...FACTS.charts.map(() => element("div")));
  FACTS.charts.forEach((chart, i) => {
    const data = traces(chart), entries = data.filter((trace) => trace.showlegend !== false).length;
    const values = new Set(data.flatMap((trace) => trace.y)); // of one value alone plotly would show 1 more and 1 less
    Plotly.newPlot(byId("charts").children[i], data, {
      title: { text: chart.title, font: { size: 14 } }, height: 290 + 19 * entries, margin: { l: 46, r: 10, t: 36, b: 34 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: css("--ink"), size: 11 },
      xaxis: grid, yaxis: { ...grid, rangemode: values.size === 1 ? "tozero" : "normal" }, hovermode: "x unified", hoverlabel: { bgcolor: css("--card") }, showlegend: true,
      legend: { y: -0.13, yanchor: "top", x: 0, font: { size: 10 }, maxheight: 1, tracegroupgap: 0 },
    }, { responsive: true, displaylogo: false, toImageButtonOptions: { format: "png", scale: 2, filename: chart.title } });
  });
}

const parts = (answer) => Object.entries(answer.reward_parts).map(([name, value]) => `${name} ${value}`).join(", ");

function verdict(answer) {
  const right = answer.reward_parts.answer === 1;
  return element("div", { class: "verdict" }, element("b", { class: right ? "right" : "wrong" }, right ? "right" : "wrong"),
    ` reward ${answer.reward === null ? "none" : answer.reward.toFixed(2)} (${parts(answer)}), ${answer.response_tokens} tokens` +
    (answer.finish_reason === "length" ? ", cut" : ""));
}

function drawHeldOut() {
  const cards = Object.entries(FACTS.held_out).flatMap(([run, pairs]) => pairs.map((pair) => element("div", { class: "card" },
    element("b", {}, FACTS.names.length > 1 ? `${run}: ${pair.problem}` : pair.problem),
    element("div", { class: "columns" }, ...[pair.before, pair.after].map((answer) => element("div", {},
      element("div", { class: "soft" }, `step ${answer.step}`), verdict(answer),
      element("div", { class: "answer" }, answer.response)))))));
  byId("held-out").replaceChildren(...(cards.length ? cards : [element("p", { class: "soft" },
    "This run kept no held-out answers of two evaluations.")]));
}

// [colour variable, strength 0 to 1] of a token
const COLOURINGS = {
  logprob: ["Darker red: less likely when it was drawn (white: certain; full: a chance of 1 in 50 or less).",
    (answer, i) => answer.token_logprobs && ["--down", Math.min(1, -answer.token_logprobs[i] / Math.log(50))]],
  advantage: ["Green: better than its siblings, the whole answer; red: worse.",
    (answer) => [answer.advantage > 0 ? "--up" : "--down", Math.min(1, Math.abs(answer.advantage) / 2)]],
  ratio: ["Green: the last checkpoint makes this token likelier than it was when drawn; red: less likely (report.py --ratio).",
    (answer, i) => answer.ratios && [answer.ratios[i] > 1 ? "--up" : "--down", Math.min(1, Math.abs(Math.log(answer.ratios[i])) / 2)]],
};

function tokenSpans(answer, colouring) {
  return (answer.tokens ?? [answer.response]).map((text, i) => {
    const found = COLOURINGS[colouring][1](answer, i);
    const told = answer.token_logprobs ? `p = ${Math.exp(answer.token_logprobs[i]).toFixed(4)}` +
      (answer.ratios ? `, ratio ${answer.ratios[i]}` : "") : "";
    return element("span", { title: told, ...(found ? { style: `background: rgba(var(${found[0]}), ${(0.55 * found[1]).toFixed(3)})` } : {}) }, text);
  });
}

function drawGroups() {
  const all = Object.entries(FACTS.groups).flatMap(([run, groups]) => groups.map((group) => ({ run, ...group })));
  byId("group").replaceChildren(...all.map((g, i) => element("option", { value: i },
    `${FACTS.names.length > 1 ? g.run + ", " : ""}step ${g.step}: ${g.problem}`)));
  const draw = () => {
    const group = all[byId("group").value], colouring = byId("colour").value;
    if (!group) return byId("group-view").replaceChildren(element("p", { class: "soft" }, "This run kept no samples."));
    const shown = group.answers.some((a) => COLOURINGS[colouring][1](a, 0));
    byId("colour-hint").textContent = shown ? COLOURINGS[colouring][0] : "Not known for this group. " + COLOURINGS[colouring][0];
    const rewards = group.answers.map((a) => a.reward ?? 0), mean = rewards.reduce((a, b) => a + b) / rewards.length;
    byId("group-view").replaceChildren(
      element("p", { class: "soft" }, `mean reward ${mean.toFixed(3)} of ${rewards.length} answers`),
      ...group.answers.map((answer) => element("div", { class: "card" }, verdict(answer),
        element("div", { class: "soft" }, `advantage ${answer.advantage === null ? "none" : answer.advantage.toFixed(3)}`),
        element("div", { class: "answer" }, ...tokenSpans(answer, colouring)))));
  };
  byId("group").addEventListener("change", draw);
  byId("colour").addEventListener("change", draw);
  draw();
}

drawCharts();
drawHeldOut();
drawGroups();
byId("smooth").addEventListener("change", drawCharts);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCharts);
