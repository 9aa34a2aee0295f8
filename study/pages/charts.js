// The curves of report.py, drawn by plotly.
"use strict";

const COLOURS = ["#1f83d6", "#e07a1f", "#2ba35a", "#c6423b", "#8a63d2", "#b08a2e", "#d65aa8", "#5f7d8c", "#2aa7a7", "#9a6a4f", "#7fa01f", "#b04ad0"];
const DASHES = ["solid", "dot", "dash", "longdash", "dashdot"];
const BUTTONS = [["toImage", "zoom2d", "pan2d", "resetScale2d"]]; // the others of plotly do nothing useful here, or need a network

// Means of the last `window` values.
function smoothed(values, window) {
  return values.map((_, i) => {
    const part = values.slice(Math.max(0, i - window + 1), i + 1);
    return part.reduce((a, b) => a + b) / part.length;
  });
}

// plotly reads some HTML in names: a run's folder may be called anything.
const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;");

// One run: a colour for each metric. Several: a colour for each run, a dash for each metric, and bands of evaluations only.
// The legend names the runs, which a click hides, and then the dashes.
function traces(chart) {
  const metrics = [...new Set(chart.lines.map((line) => line.metric))], many = FACTS.names.length > 1;
  const label = (metric) => chart.lines.find((line) => line.metric === metric).label;
  const dash = (metric) => (many ? DASHES[metrics.indexOf(metric) % DASHES.length] : "solid");
  const named = new Set();
  const drawn = chart.lines.flatMap((line) => {
    const colour = COLOURS[(many ? line.run : metrics.indexOf(line.metric)) % COLOURS.length];
    const training = !line.metric.startsWith("eval"), smooth = byId("smooth").checked && training;
    const group = { legendgroup: many ? line.run : line.metric, showlegend: !many || !named.has(line.run) };
    named.add(line.run);
    const curve = { x: line.x, y: smooth ? smoothed(line.y, 10) : line.y, ...group,
      name: plain(many ? FACTS.names[line.run] : line.label), mode: training ? "lines" : "lines+markers", marker: { size: 5 },
      text: plain(line.label), hovertemplate: `%{y:.4g} %{text}<extra>${many ? "%{fullData.name}" : ""}</extra>`,
      line: { color: colour, width: training ? 1.5 : 2, dash: dash(line.metric) } };
    if (!line.low || smooth || (many && training)) return [curve];
    const edge = { x: line.x, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false, legendgroup: group.legendgroup };
    return [{ ...edge, y: line.low }, { ...edge, y: line.high, fill: "tonexty", fillcolor: colour + "26" }, curve];
  });
  if (many && metrics.length > 1) drawn.push(...metrics.map((metric) => ({ x: [chart.lines[0].x[0]], y: [null], name: plain(label(metric)),
    mode: "lines", legendgroup: "metric " + metric, line: { color: css("--ink"), width: 1.5, dash: dash(metric) } })));
  return drawn;
}

// The title stands above the chart, in the page: on a touch screen plotly's buttons are always shown, inside the top margin.
function drawCharts() {
  const grid = { gridcolor: css("--line"), zerolinecolor: css("--line"), automargin: true };
  let holders = [...byId("charts").children]; // the same charts as before: they keep their zoom
  if (holders.length !== FACTS.charts.length || FACTS.charts.some((chart, i) => holders[i].firstChild.textContent !== chart.title)) {
    holders = FACTS.charts.map((chart) => element("div", { class: "chart" }, element("h3", {}, chart.title), element("div")));
    byId("charts").replaceChildren(...holders);
  }
  FACTS.charts.forEach((chart, i) => {
    const data = traces(chart), entries = data.filter((trace) => trace.showlegend !== false).length;
    const values = new Set(data.flatMap((trace) => trace.y)); // of one value alone plotly would show 1 more and 1 less
    Plotly.react(holders[i].lastChild, data, {
      height: 270 + 19 * entries, margin: { l: 46, r: 10, t: 30, b: 34 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: css("--ink"), size: 11 },
      xaxis: { ...grid, title: { text: "step", standoff: 2, font: { size: 10 } } },
      yaxis: { ...grid, rangemode: values.size === 1 ? "tozero" : "normal" },
      uirevision: chart.title, hovermode: "x unified", hoverlabel: { bgcolor: css("--card") }, showlegend: true,
      modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--soft"), activecolor: css("--accent") },
      legend: { y: -0.18, yanchor: "top", x: 0, font: { size: 10 }, maxheight: 1, tracegroupgap: 0 },
    }, { responsive: true, displaylogo: false, modeBarButtons: BUTTONS,
      toImageButtonOptions: { format: "png", scale: 2, filename: chart.title } });
  });
}
