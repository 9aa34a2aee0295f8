// Is the answer to a Countdown problem right? Only digits, + - * / and parentheses are read, by a parser of a few lines: an
// answer is data, never code.
"use strict";

// The text in the answer tags, or null: the rule of tasks/rewards.py.
function answerOf(judged) {
  const at = judged.indexOf("</think>"), text = at >= 0 ? judged.slice(at + 8) : judged.includes("<think>") ? "" : judged;
  const once = ["<answer>", "</answer>"].every((tag) => text.split(tag).length === 2);
  return once && !/<\/?think>/.test(text) ? text.match(/<answer>([^]*)<\/answer>/)?.[1] ?? null : null;
}

// The value of an answer: {value, each (every number once), right}; null if there is no answer or no problem.
function judge(response, question) {
  const answer = answerOf(response), problem = question.match(/\[([\d,\s]+)\]\s*=\s*(\d+)/);
  if (answer === null || !problem) return null;
  const value = calculate(answer), used = (answer.match(/\d+/g) ?? []).map(Number).sort((a, b) => a - b);
  const given = problem[1].split(",").map(Number).sort((a, b) => a - b), each = used.join() === given.join();
  return { answer: answer.trim(), value, each, right: value !== null && each && Math.abs(value - Number(problem[2])) < 1e-9 };
}

const isRight = (text, question) => judge(text, question)?.right ?? false;

function verdict(response, question, cut = 0) {
  const found = judge(response, question);
  if (!found) return answerOf(response) !== null ? "" : cut ? `cut after ${cut} tokens, without an answer` : "no answer in <answer> tags";
  if (found.value === null) return `${found.answer} is no expression`;
  return `${found.answer} = ${Number(found.value.toFixed(4))}: ${found.right ? "right" : found.each ? "not the target" : "not every number once"}`;
}

function calculate(text) {
  const tokens = text.match(/\d+|[-+*/()]/g) ?? [];
  if (tokens.join("") !== text.replace(/\s/g, "") || tokens.length > 64) return null;
  let at = 0;
  const atom = () => {
    if (tokens[at] === "(") {
      at += 1;
      const value = sum();
      return tokens[at++] === ")" ? value : NaN;
    }
    return /^\d+$/.test(tokens[at] ?? "") ? Number(tokens[at++]) : NaN;
  };
  const product = () => {
    let value = atom();
    while (tokens[at] === "*" || tokens[at] === "/") value = tokens[at++] === "*" ? value * atom() : value / atom();
    return value;
  };
  const sum = () => {
    let value = product();
    while (tokens[at] === "+" || tokens[at] === "-") value = tokens[at++] === "+" ? value + product() : value - product();
    return value;
  };
  const value = sum();
  return at === tokens.length && Number.isFinite(value) ? value : null;
}

// Why a model that has learnt one form of problem only does not read a text; "" if it does.
function refusal(question, trained) {
  const foreign = [...new Set(Array.from(question).filter((c) => trained && !trained.alphabet.includes(c)))];
  return foreign.length ? `Not run: this model has never seen ${foreign.map(visible).join(" ")} in a problem. ` +
    `It knows ${trained.alphabet.replace(" ", "")} and the blank: write a problem such as [3, 5, 2] = 13.` : "";
}

// Why such a model cannot be expected to solve a problem that it reads; "" if it can.
function complaint(question, trained) {
  if (!trained || refusal(question, trained)) return refusal(question, trained);
  const found = question.match(/^\[(\d+(?:, \d+)*)\] = (\d+)$/), numbers = found?.[1].split(", ").map(Number);
  if (!found) return "This model knows problems of the form [3, 5, 2] = 13 only: numbers with a comma and a blank between them.";
  const [few, many] = trained.counts, [low, high] = trained.range;
  if (numbers.length < few || numbers.length > many || numbers.some((n) => n < low || n > high))
    return `This model was trained on ${few} to ${many} numbers from ${low} to ${high}. It has seen no other problem, so its answer is a guess.`;
  return "";
}

if (typeof module !== "undefined") module.exports = { verdict, calculate, complaint, refusal, isRight, answerOf };
