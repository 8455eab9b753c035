// The first view: every run, the most urgent on top.
import * as api from "./api.js";
import { runAddress } from "./address.js";
import { choice, el, link, say } from "./dom.js";
import * as format from "./format.js";
import { spark } from "./spark.js";
import { advice, also, badge, interval, mutedWords, progress, urgency } from "./words.js";

const SHOWN = 300;

export async function open(host, context) {
  const known = new Map((await api.runs()).map((r) => [r.run, r]));
  const find = el("input", { type: "search", placeholder: "find a run or a team", "aria-label": "find", value: context.state.find });
  const filter = el("div");
  const summary = el("p", { class: "muted summary" });
  const body = el("tbody");
  const table = el("table", { class: "runs" },
    el("thead", {}, el("tr", {},
      el("th", {}, "State"), el("th", {}, "Run"), el("th", {}, "Progress"), el("th", { class: "wide" }, "Curve"), el("th", { class: "num" }, "Loss"),
      el("th", { class: "num" }, "Predicted end"), el("th", {}, "Advice"), el("th", { class: "num" }, "Last step"))),
    body);
  const empty = el("div");
  const card = el("div", { class: "card scroll" }, table);
  host.append(el("div", { class: "tools" }, filter, find), summary, card, empty);

  const rows = new Map();
  function choices() {
    filter.replaceChildren(choice("which runs", [["all"], ["running"], ["alerts", "with alerts"], ["ended"]], context.state.show,
      (show) => { context.go({ show }, { quiet: true, replace: true }); choices(); draw(); }));
  }

  find.addEventListener("input", () => { context.go({ find: find.value.slice(0, 100) }, { quiet: true, replace: true }); draw(); });

  function matching() {
    const { show, find: text } = context.state;
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    return [...known.values()].filter((r) =>
      (show === "all" || (show === "alerts" ? urgency(r) < 2 : r.phase === show))
      && words.every((w) => `${r.run} ${r.team ?? ""}`.toLowerCase().includes(w)))
      .sort((a, b) => urgency(a) - urgency(b) || (a.state === "stalled") - (b.state === "stalled") || (b.last_time ?? 0) - (a.last_time ?? 0) || (a.run < b.run ? -1 : 1));
  }

  function draw() {
    const focused = document.activeElement?.closest?.("tr")?.dataset.run;
    const all = [...known.values()];
    const list = matching();
    const wrong = all.filter((r) => urgency(r) < 2).length;
    summary.textContent = !all.length ? "" : `${format.count(all.length)} ${all.length === 1 ? "run" : "runs"}, `
      + `${all.filter((r) => r.phase === "running").length} running, ${wrong ? `${wrong} off ${wrong === 1 ? "its" : "their"} line or worse` : "none off its line"}`
      + (list.length > SHOWN ? `; the first ${SHOWN} of ${format.count(list.length)} shown` : "");
    place(list.slice(0, SHOWN).map(kept));
    document.title = wrong ? `(${wrong}) losscast` : "losscast";
    if (focused && !body.contains(document.activeElement)) rows.get(focused)?.tr.querySelector("a")?.focus({ preventScroll: true });
    empty.replaceChildren(...(all.length ? (list.length ? [] : [el("p", { class: "empty" }, "No run matches.")]) : [welcome()]));
    card.hidden = !list.length;
  }

  /** The run's row, made again only where what it says has changed. */
  function kept(r) {
    const says = JSON.stringify(r);
    const have = rows.get(r.run);
    if (have?.says === says) {
      say(have.ago, format.ago(r.last_time));
      return have.tr;
    }
    const ago = el("span", { class: "nowrap" }, format.ago(r.last_time));
    const tr = row(r, ago);
    rows.set(r.run, { says, tr, ago });
    return tr;
  }

  /** Put the rows in order and touch only those that moved, so that a pointer or a selection elsewhere stays. */
  function place(wanted) {
    const staying = new Set(wanted);
    for (const tr of [...body.children]) if (!staying.has(tr)) tr.remove();
    wanted.forEach((tr, i) => { if (body.children[i] !== tr) body.insertBefore(tr, body.children[i] ?? null); });
  }

  function row(r, ago) {
    const done = progress(r);
    const [what, why] = advice(r.advice);
    const gone = r.state === "diverged" || r.state === "non_finite";
    const end = r.advice?.final_loss ?? (gone ? null : r.predicted_final);
    return el("tr", { "data-run": r.run },
      el("td", { "data-label": "State" }, badge(r), r.muted ? el("small", { class: "warn mute" }, mutedWords(r.muted)) : null),
      el("td", { "data-label": "Run", class: "name" }, link(runAddress(r.run, context.state), {}, r.run), r.team ? el("small", { class: "muted", title: r.team }, r.team) : null,
        ...also(r).map((text) => el("small", { class: "warn" }, text))),
      el("td", { "data-label": "Progress", class: "progress" },
        done === null ? null : el("progress", { max: 1, value: done, "aria-label": "share of tokens" }),
        el("small", { class: "muted" }, `step ${format.count(r.step)}${done === null ? "" : `, ${format.percent(done)}`}`)),
      el("td", { class: "wide" }, spark(r)),
      el("td", { "data-label": "Loss", class: "num" }, format.loss(r.loss),
        r.expected === null || r.expected === undefined ? null : el("small", { class: "muted" }, `expected ${format.loss(api.number(r.expected))}`)),
      el("td", { "data-label": "Predicted end", class: "num" }, format.loss(r.phase === "ended" ? r.loss : end?.p50),
        r.phase === "ended" ? el("small", { class: "muted" }, "ended at") : end ? el("small", { class: "muted" }, interval(end)) : null),
      el("td", { "data-label": "Advice" }, r.phase === "ended" ? el("span", { class: "muted ending", title: r.end_reason }, r.end_reason ?? "ended") : what,
        r.phase !== "ended" && why ? el("small", { class: "muted" }, why) : null),
      el("td", { "data-label": "Last step", class: "num" }, ago,
        r.since_step !== null && r.since_step !== undefined && urgency(r) < 2 ? el("small", { class: "muted" }, `since step ${format.count(r.since_step)}`) : null));
  }

  function move(by) {
    const links = [...body.querySelectorAll("td.name a")];
    const now = links.indexOf(document.activeElement);
    links[Math.max(0, Math.min(links.length - 1, now < 0 ? 0 : now + by))]?.focus();
  }

  choices();
  draw();
  let due = null;
  const later = () => { due ??= setTimeout(() => { due = null; draw(); }, 500); };
  const clock = setInterval(later, 10000);
  return {
    hear(r) { known.set(r.run, { ...known.get(r.run), ...r }); later(); },
    key(name) {
      if (name === "/") find.focus();
      if (name === "j") move(1);
      if (name === "k") move(-1);
    },
    close() { clearInterval(clock); clearTimeout(due); },
  };
}

function welcome() {
  return el("div", { class: "empty" },
    el("p", {}, "No run has reported yet. Make a token that may send, and point a run at this monitor:"),
    el("pre", {}, "losscast monitor token create --store DIR --scope ingest,read\nlosscast submit run.yaml"),
    el("p", {}, "Or see the whole line on this machine first:"), el("pre", {}, "losscast demo"));
}
