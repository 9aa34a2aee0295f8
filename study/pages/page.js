// What the scripts of both pages share. Text of a model or of a file goes in as text, never as markup.
"use strict";

const byId = (id) => document.getElementById(id);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// A text on one line, with its blanks, line ends and control characters shown.
const visible = (text) => text.replace(/\n/g, "↵").replace(/ /g, "·").replace(/[\p{C}]/gu, "□") || "∅";
const shade = (share, colour = "--hue") => `background: rgba(var(${colour}), ${Math.min(1, Math.max(0, share)).toFixed(3)})`;
const short = (v) => (v === 0 ? "0" : Math.abs(v) >= 1e4 || Math.abs(v) < 1e-3 ? v.toExponential(2) : v.toPrecision(4));
const percent = (p) => (p === 0 ? "–" : p < 0.001 ? "<0.1%" : (100 * p).toFixed(1) + "%");

function fillTable(table, header, rows) {
  table.replaceChildren(
    element("thead", {}, element("tr", {}, ...header.map((h) => element("th", {}, h)))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row))));
}
