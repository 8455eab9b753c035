// What the judge and the service say, in a person's words and with a colour's name.
import { el } from "./dom.js";
import * as format from "./format.js";

export const STATES = {
  warming_up: ["warming up", ""],
  healthy: ["on its line", "good"],
  off_line: ["off its line", "warn"],
  diverged: ["diverged", "bad"],
  above: ["above its line", "warn"],
  below: ["below its line", "warn"],
  non_finite: ["not a number", "bad"],
  spike: ["spike", "predicted"],
  stalled: ["stalled", "bad"],
  jump_after_resume: ["jumped at a resume", "warn"],
  plateau: ["no longer falls", "warn"],
  validation_apart: ["validation apart", "warn"],
  rank_apart: ["one rank apart", "warn"],
  grad_norm_high: ["gradient norm high", "predicted"],
};

/** What can hold of a run beside what its badge says. */
const ALSO = {
  will_miss: "will miss its target",
  silent: "nothing heard of it",
  restart_loop: "restarts without a step",
  checkpoint_overdue: "checkpoint overdue",
  checkpoint_bad: "a checkpoint does not verify",
  lease_lost: "a second writer was refused",
  clock_skew: "its clock is wrong",
};
/** What else holds of a run, in words. */
export const also = (run) => (run.states ?? []).filter((s) => Object.hasOwn(ALSO, s)).map((s) => ALSO[s]);

export const SEVERITIES = { critical: "bad", warning: "warn", info: "predicted" };
export const ACTIONS = { continue: "continue", stop: "stop", roll_back: "roll back", lower_lr: "lower the learning rate" };

const worst = (alerts) => ["critical", "warning", "info"].find((s) => (alerts ?? []).some((a) => a.severity === s && (a.resolved_step ?? null) === null));

/** The one badge of a run: what is wrong, or else that it ended, waits, or is on its line. */
export function badge(run) {
  const [word, tone] = STATES[run.state] ?? [String(run.state ?? "unknown").replaceAll("_", " "), ""];
  if (run.state === "healthy" && run.source === "own_past" && run.phase === "running") return el("span", { class: "badge good" }, "steady");
  const wrong = tone === "bad" || tone === "warn" || run.state === "spike";
  if (!wrong && run.phase === "ended") return el("span", { class: "badge" }, "ended");
  if (!wrong && run.phase === "waiting") return el("span", { class: "badge" }, "waiting");
  return el("span", { class: `badge ${SEVERITIES[worst(run.alerts)] === "bad" ? "bad" : tone}` }, word);
}

/** How urgent a run is, for sorting: pages first, then warnings, then what is running, then the rest. */
export function urgency(run) {
  const severity = worst(run.alerts);
  const tone = (STATES[run.state] ?? [])[1];
  if (run.phase === "ended") return 4;
  if (severity === "critical" || tone === "bad") return 0;
  if (severity === "warning" || tone === "warn") return 1;
  return run.phase === "running" ? 2 : 3;
}

/** How far a run has come, 0 to 1, or null. */
export function progress(run) {
  return run.total_tokens > 0 && run.tokens !== null ? Math.min(1, run.tokens / run.total_tokens) : null;
}

export function interval(q) {
  return q ? `${format.loss(q.p05)} to ${format.loss(q.p95)}` : "";
}

/** A run that is told to roll back has its end told as it stands, not as if it had. */
export const then = (a) => (a.action === "roll_back" ? "left as it is " : "");

/** The advice in two words, and what speaks for it in a few more. */
export function advice(a) {
  if (!a) return ["", ""];
  const miss = a.p_miss === null || a.p_miss === undefined ? null : `${then(a)}${format.percent(a.p_miss)} likely to miss`;
  const money = a.money_left > 0 ? `${format.money(a.money_left)} to go` : null;
  return [ACTIONS[a.action] ?? a.action, [miss, money].filter(Boolean).join(", ")];
}

const clock = (s) => new Date(1000 * s).toLocaleString([], { weekday: "short", hour: "2-digit", minute: "2-digit" });

/** Which of a run's alerts are silent, and until when. */
export function mutedWords(m) {
  return `${m.alerts?.length ? m.alerts.join(", ") : "all"} muted until ${clock(m.until)}`;
}
