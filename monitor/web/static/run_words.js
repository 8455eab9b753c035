// A run's words: heading, figures, advice, alerts, attempts. Text only; nothing here draws.
import { number } from "./api.js";
import { el } from "./dom.js";
import * as format from "./format.js";
import { ACTIONS, SEVERITIES, also, badge, interval, progress, then } from "./words.js";

export function heading(run) {
  return el("div", { class: "heading" }, el("h1", {}, run.run), badge(run), run.team ? el("span", { class: "muted" }, run.team) : null,
    run.phase && run.phase !== "waiting" ? el("span", { class: "muted" }, `${run.phase}${run.end_reason ? `: ${run.end_reason}` : ""}${run.attempt > 1 ? `, attempt ${run.attempt}` : ""}`) : null,
    also(run).map((text) => el("span", { class: "badge warn" }, text)),
    run.trouble ? el("span", { class: "warn" }, `The judge is in trouble: ${run.trouble}`) : null);
}

function fact(name, value, small) {
  return el("div", {}, el("dt", {}, name), el("dd", {}, value, small ? el("small", {}, small) : null));
}

/** The share of the GPU time that counts, and what the rest cost. */
function goodput(g) {
  if (!g?.gpu_seconds || !Number.isFinite(g.ratio)) return null;
  const wasted = (g.gpu_seconds.lost ?? 0) + (g.gpu_seconds.idle ?? 0);
  const money = g.dollars ? (g.dollars.lost ?? 0) + (g.dollars.idle ?? 0) : null;
  return fact("Goodput", format.percent(g.ratio), `${format.duration(wasted)} of GPU time lost or idle${money === null ? "" : `, ${format.money(money)}`}`);
}

export function facts(run, seen) {
  const done = progress(run);
  const final = run.predicted_final ?? run.prediction?.final_loss;
  const expected = number(run.expected);
  const i = seen.step.length - 1;
  const gap = number(seen.gap_sigma[i] ?? null);
  const rate = seen.tokens_per_s.findLast?.((v) => v !== null) ?? null;
  const left = run.advice?.hours_left;
  return el("dl", { class: "facts" },
    fact("Step", format.count(run.step), done === null ? null : `${format.percent(done)} of ${format.short(run.total_tokens)} tokens`),
    fact("Loss", format.loss(run.loss), expected === null ? null : `expected ${format.loss(expected)}`),
    gap === null ? null : fact("Off its line", `${format.signed(gap, 1)} σ`, "this step alone"),
    final ? fact("Predicted end", format.loss(final.p50), interval(final)) : fact("Predicted end", "–", "no prediction registered"),
    Number.isFinite(run.target_loss) ? fact("Target", format.loss(run.target_loss)) : null,
    rate === null ? null : fact("Tokens a second", format.short(rate)),
    goodput(run.goodput),
    fact(run.phase === "ended" ? "Ended" : run.phase === "waiting" ? "Last heard" : "Last step", format.ago(run.last_time), Number.isFinite(left) && run.phase !== "ended" ? `${format.duration(left * 3600)} left` : null));
}

/** `act(what, ...)` does what a button says: mute and see of the service. */
export function aside(run, act) {
  return el("div", { class: "stack" }, adviceCard(run, act), alertsCard(run, act), lineCard(run), attemptsCard(run), eventsCard(run));
}

function adviceCard(run, act) {
  const a = run.advice;
  if (!a) return el("section", { class: "card note" }, el("h2", {}, "Advice"), el("p", { class: "muted" }, "None yet."));
  if (run.phase === "ended" && a.action === "continue") {
    return el("section", { class: "card note" }, el("h2", {}, "Advice"), el("p", { class: "muted" }, `The run has ended${run.end_reason ? `: ${run.end_reason}` : ""}.`),
      a.final_loss ? el("p", { class: "muted" }, `The judge's last word on where it would end: ${format.loss(a.final_loss.p50)}, ${interval(a.final_loss)}`) : null);
  }
  const miss = Number.isFinite(a.p_miss) ? a.p_miss : null;
  // What stands elsewhere on the page is not said twice: the likely causes, the time and the money that are left.
  const elsewhere = new Set((run.causes ?? []).map((c) => `${c.name}: ${c.evidence}`));
  const evidence = (a.evidence ?? []).filter((e) => !elsewhere.has(e) && !(a.hours_left > 0 && /^finishing takes [0-9.]+ h/.test(e)));
  return el("section", { class: `card note advice${a.seen ? " seen" : ""}` },
    el("h2", {}, "Advice"),
    el("p", { class: "say" }, `${(ACTIONS[a.action] ?? String(a.action)).replace(/^./, (c) => c.toUpperCase())}`),
    miss === null ? null : el("p", {}, `${then(a) ? "Left as it is, " : ""}${format.percent(miss)} likely to miss the target`, Number.isFinite(run.target_loss) ? ` of ${format.loss(run.target_loss)}` : ""),
    miss === null ? null : el("meter", { min: 0, max: 1, low: 0.25, high: 0.75, optimum: 0, value: miss, "aria-label": "probability of a miss" }),
    a.final_loss ? el("p", { class: "muted" }, `${a.action === "continue" ? "Ends" : "Left as it is, ends"} at ${format.loss(a.final_loss.p50)}, ${interval(a.final_loss)}`) : null,
    evidence.length ? el("ul", {}, evidence.map((e) => el("li", {}, e))) : null,
    a.hours_left > 0 || a.money_left > 0 ? el("p", { class: "muted" }, "To the end: ",
      [a.hours_left > 0 ? format.duration(a.hours_left * 3600) : null, a.money_left > 0 ? format.money(a.money_left) : null].filter(Boolean).join(", ")) : null,
    el("p", { class: "muted small" }, `As of step ${format.count(a.step)}. It recommends; people decide.`),
    act ? adviceActs(run, a, act) : null);
}

function adviceActs(run, a, act) {
  if (a.seen) {
    return el("p", { class: "acts" }, el("span", { class: "muted small" }, a.seen.until ? `Snoozed by ${a.seen.by || "somebody"} until ${clock(a.seen.until)}. ` : `Acknowledged by ${a.seen.by || "somebody"} ${format.ago(a.seen.at)}. `),
      el("button", { type: "button", class: "plain", onclick: () => act("see", run.run, null, true) }, "Take back"));
  }
  return el("p", { class: "acts" }, el("button", { type: "button", class: "plain", onclick: () => act("see", run.run, null) }, "Acknowledge"),
    " ", el("button", { type: "button", class: "plain", onclick: () => act("see", run.run, 4 * 3600) }, "Snooze 4 h"));
}

const clock = (s) => new Date(1000 * s).toLocaleString([], { weekday: "short", hour: "2-digit", minute: "2-digit" });

function muteActs(run, act) {
  const m = run.muted;
  if (m && m.until * 1000 > Date.now()) {
    return el("p", { class: "acts" }, el("span", { class: "warn small" }, `${m.alerts?.length ? m.alerts.join(", ") : "All"} muted until ${clock(m.until)}${m.by ? ` by ${m.by}` : ""}${m.why ? `: ${m.why}` : ""} `),
      el("button", { type: "button", class: "plain", onclick: () => act("mute", run.run, null) }, "Unmute"));
  }
  if (run.phase === "ended") return null;
  return el("p", { class: "acts" }, el("span", { class: "muted small" }, "Mute for "), [["1 h", 3600], ["8 h", 28800], ["3 d", 259200]].flatMap(([text, s]) =>
    [el("button", { type: "button", class: "plain", onclick: () => act("mute", run.run, s) }, text), " "]));
}

function alertsCard(run, act) {
  const alerts = [...(run.alerts ?? [])].reverse();
  return el("section", { class: "card note" }, el("h2", {}, "Alerts"),
    alerts.length ? el("ol", { class: "alerts" }, alerts.slice(0, 50).map((a) => el("li", {},
      el("div", { class: "row" }, el("strong", {}, a.alert), el("span", { class: `badge ${SEVERITIES[a.severity] ?? ""}` }, a.severity)),
      el("p", { class: "muted small" }, `Called at step ${format.count(a.step)}, since step ${format.count(a.since_step)}`,
        a.expected === null || a.expected === undefined ? `: ${format.loss(a.value)}` : `: ${format.loss(a.value)} where ${format.loss(a.expected)} was expected`,
        (a.resolved_step ?? null) === null ? "; open" : `; resolved at ${format.count(a.resolved_step)}`))))
      : el("p", { class: "muted" }, "None raised."),
    act ? muteActs(run, act) : null);
}

function attemptsCard(run) {
  const attempts = run.attempts ?? [];
  if (attempts.length < 2) return null;
  return el("section", { class: "card note" }, el("h2", {}, "Attempts"), el("ol", { class: "plainlist" }, attempts.map((a) =>
    el("li", { class: "muted" }, `${a.attempt}: from step ${format.count(a.resume_step)}, ${format.ago(a.started_time)}`))));
}

const SOURCES = {
  prediction: "Held against the prediction that was registered for it.",
  old_runs: "Held against the finished runs of its recipe.",
  own_past: "Held against its own past; a prediction would say more.",
  none: "Nothing to hold it against yet.",
};

/** A prediction is there and the run is past where it ends. */
function pastItsEnd(run, curve) {
  const step = curve.step?.at(-1), tokens = curve.tokens?.at(-1);
  const far = tokens > 0 && run.tokens > tokens ? [`${format.short(tokens)} tokens`, format.short(run.tokens)] : run.step > step ? [`step ${format.count(step)}`, format.count(run.step)] : null;
  return far ? `Its prediction ends at ${far[0]} and the run is at ${far[1]}: held against its own past.` : "Held against its own past: its prediction says nothing of these steps.";
}

/** What the run is held against, the prediction's particulars, and what the judge takes for causes. */
function lineCard(run) {
  const p = run.prediction;
  const beyond = run.source === "own_past" && p?.curve ? pastItsEnd(run, p.curve) : null;
  const words = beyond ?? (run.source === "control" ? `Held against ${run.control ? `the control run ${run.control}` : "a control run"} on the same batches.` : SOURCES[run.source]);
  if (!p && !words && !run.causes?.length) return null;
  const digest = typeof p?.digest === "string" ? p.digest.replace(/^sha256:/, "").slice(0, 16) : null;
  const particulars = p ? [
    Number.isFinite(p.params) ? `${format.short(p.params)} parameters` : null,
    Number.isFinite(p.tokens) ? `${format.short(p.tokens)} tokens` : null,
    p.in_range === false ? "outside the range of the fitted runs" : null,
    p.identifiable === false ? "law not fully identified" : null,
  ].filter(Boolean).join(", ") : "";
  return el("section", { class: "card note" }, el("h2", {}, "Its line"),
    words ? el("p", {}, words) : null,
    particulars ? el("p", { class: "muted small" }, `Prediction: ${particulars}`) : null,
    p?.made_at ? el("p", { class: "muted small" }, `Made ${typeof p.made_at === "number" ? format.ago(p.made_at) : p.made_at}`,
      digest ? ", digest " : "", digest ? el("code", {}, digest) : null,
      run.predictions?.length > 1 ? `; the newest of ${run.predictions.length}` : "") : null,
    run.causes?.length ? el("h3", {}, "Likely causes") : null,
    run.causes?.length ? el("ul", {}, run.causes.map((c) => el("li", {}, `${String(c.name).replaceAll("_", " ")}: ${c.evidence}`))) : null);
}

const EVENTS = {
  run_started: (e) => `attempt ${e.attempt} started${e.resume_step ? `, from step ${format.count(e.resume_step)}` : ""}`,
  checkpoint: (e) => `checkpoint${Number.isFinite(e.step) ? ` at step ${format.count(e.step)}` : ""}`,
  goodput: (e) => `time booked${Number.isFinite(e.steps_lost) ? `: ${format.count(e.steps_lost)} steps trained twice` : ""}`,
  restart: (e) => `restart${e.cause ? `: ${e.cause}` : ""}`,
  announce: (e) => `announced: ${e.what ?? "a change"}${Number.isFinite(e.step) ? ` at step ${format.count(e.step)}` : ""}`,
  run_ended: (e) => `ended${e.reason ? `: ${e.reason}` : ""}`,
};

function eventsCard(run) {
  const events = (run.events ?? []).filter((e) => Object.hasOwn(EVENTS, e?.event ?? ""));
  if (events.length < 2) return null;
  return el("section", { class: "card note" }, el("h2", {}, "What happened"), el("ol", { class: "plainlist" },
    events.slice(-12).reverse().map((e) => el("li", { class: "event" }, el("span", {}, EVENTS[e.event](e)), el("span", { class: "muted small nowrap" }, format.ago(e.time ?? e.received))))));
}
