// The three x axes of a run: steps, tokens and time, and the way between them.
import { at } from "./charts.js";
import * as format from "./format.js";

/**
 * From steps to the chosen axis, by the samples that were seen, and beyond them by the prediction's tokens or the
 * mean pace. `seen` are columns over the whole run. Time is seconds since the run's start and never runs backwards.
 */
export function mapping(kind, seen, curve, started) {
  if (kind === "steps") return { to: (step) => step, from: (x) => x };
  const step = [], value = [];
  const push = (s, v) => {
    if (Number.isFinite(s) && Number.isFinite(v) && (!step.length || s > step.at(-1))) {
      step.push(s);
      value.push(Math.max(v, value.at(-1) ?? -Infinity));
    }
  };
  const origin = started ?? seen.time.find((t) => Number.isFinite(t)) ?? 0;
  if (kind === "time") push(0, 0);
  seen.step.forEach((s, i) => push(s, kind === "tokens" ? seen.tokens[i] : seen.time[i] === null ? NaN : seen.time[i] - origin));
  if (kind === "tokens" && curve?.tokens?.length) {
    if (!step.length) push(curve.step[0], curve.tokens[0]);
    curve.step.forEach((s, i) => push(s, curve.tokens[i]));
  }
  if (step.length < 2) return null;
  const n = step.length;
  const back = Math.max(0, n - 200);
  const pace = Math.max(1e-12, (value[n - 1] - value[back]) / (step[n - 1] - step[back]));
  const first = Math.max(1e-12, (value[1] - value[0]) / (step[1] - step[0]));
  const to = (s) => (s > step[n - 1] ? value[n - 1] + (s - step[n - 1]) * pace : s < step[0] ? value[0] - (step[0] - s) * first : at(step, value, s));
  const from = (x) => (x > value[n - 1] ? step[n - 1] + (x - value[n - 1]) / pace : x < value[0] ? step[0] - (value[0] - x) / first : at(value, step, x));
  return { to, from };
}

export const AXES = {
  steps: { label: "step", format: (v) => (Math.abs(v) < 1e5 ? format.count(v) : format.short(v, 6)), say: (v) => `step ${format.count(v)}` },
  tokens: { label: "tokens", format: (v) => format.short(v, 6), say: (v) => `${format.short(v)} tokens` },
  time: { label: "time since the start", format: (v) => (v === 0 ? "0" : format.duration(v)), say: (v) => format.duration(v) },
};

export const lossTick = (v) => (Math.abs(v) >= 1e6 ? format.power(v) : String(+v.toPrecision(4)));
