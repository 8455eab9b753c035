// The laws: the ladder each was fitted to, the fit with its band, the predictions made from it, and what came of them.
import * as api from "./api.js";
import { runAddress } from "./address.js";
import { lossTick } from "./axes.js";
import { chart } from "./charts.js";
import { choice, el, link } from "./dom.js";
import * as format from "./format.js";
import { interval } from "./words.js";

const MOST = 60;

export async function open(host, context) {
  const [all, laws] = await Promise.all([api.runs(), api.laws()]);
  const list = all.filter((r) => r.predicted_final).slice(0, MOST);
  const details = (await Promise.all(list.map((r) => api.run(r.run).catch(() => null)))).filter((d) => d?.prediction);
  const ends = await Promise.all(details.map((d) => (d.phase === "ended" ? ending(d) : null)));
  const rows = details.map((d, i) => {
    const p = d.prediction;
    const flops = Number.isFinite(p.flops) ? p.flops : 6 * p.params * p.tokens;
    return { run: d.run, flops, params: p.params, tokens: p.tokens, final: p.final_loss, actual: ends[i], phase: d.phase, law: p.law_digest };
  }).filter((r) => Number.isFinite(r.flops) && r.flops > 0).sort((a, b) => a.flops - b.flops);
  const law = laws.find((l) => hex(l.digest) === context.state.law) ?? laws[0] ?? null;
  host.append(el("h1", {}, "Laws, predictions, and what came of them"),
    el("p", { class: "muted lede" }, "Each prediction was registered before its run started. Compute is 6 x parameters x tokens, or as the law's runs count it. A run ends at its last validation loss, or without one at the mean of its last steps' loss."));
  if (!rows.length && !law) {
    host.append(el("div", { class: "empty" }, el("p", {}, "No law and no prediction yet. Fit a law to finished runs, show it here, and name it in the next run's spec:"),
      el("pre", {}, "losscast fit points.csv -o law.json\nlosscast monitor law add law.json --store DIR\nlosscast submit run.yaml   # with  law: law.json")));
    return { close() {} };
  }
  const ended = rows.filter((r) => r.actual !== null);
  const inside = ended.filter((r) => r.actual >= r.final.p05 && r.actual <= r.final.p95).length;
  const plotHost = el("div", { class: "plot", id: "law-chart" });
  const ladder = law?.runs ? [...law.runs].sort((a, b) => a.flops - b.flops) : [];
  host.append(
    laws.length > 1 ? el("div", { class: "tools" }, choice("law", laws.map((l) => [hex(l.digest), hex(l.digest).slice(0, 8)]), hex(law.digest), (v) => context.go({ law: v }))) : "",
    law ? fitted(law) : "",
    ended.length ? el("p", { class: "came" }, `${inside} of ${ended.length} finished ${ended.length === 1 ? "run" : "runs"} ended inside the predicted 90% interval.`) : "",
    el("div", { class: "card figure" }, plotHost, el("ul", { class: "key" }, [
      ladder.length ? ["k-val", "runs it was fitted to"] : null, ladder.length ? ["k-median", "fit"] : null, ladder.length ? ["k-band", "90% interval"] : null,
    ].filter(Boolean).map(([kind, text]) => el("li", {}, el("i", { class: kind }), text)))));
  if (rows.length) {
    host.append(el("div", { class: "card scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ["Run", "Parameters", "Tokens", "FLOPs", "Predicted", "90% interval", "Ended at", "Error"].map((t, i) => el("th", { class: i ? "num" : null }, t)))),
      el("tbody", {}, rows.map((r) => el("tr", {}, el("td", {}, link(runAddress(r.run, context.state), {}, r.run)),
        ...[format.short(r.params), format.short(r.tokens), format.power(r.flops), format.loss(r.final.p50), interval(r.final), r.actual === null ? r.phase : format.loss(r.actual),
          r.actual === null ? "–" : `${format.signed(100 * (r.final.p50 / r.actual - 1), 1)}%`].map((t) => el("td", { class: "num" }, t))))))));
  }
  const spots = [...ladder.map((p) => ({ ...p, y: p.loss, say: `${p.run} · ${format.short(p.params)} parameters · ${format.short(p.tokens)} tokens · loss ${format.loss(p.loss)}, fit ${format.loss(p.fitted)}` })),
    ...rows.map((r) => ({ ...r, y: r.actual, say: `${r.run} · predicted ${format.loss(r.final.p50)} (${interval(r.final)})${r.actual === null ? "" : ` · ended at ${format.loss(r.actual)}`}` }))].sort((a, b) => a.flops - b.flops);
  const drawn = chart(plotHost, {
    title: "Final loss against compute: the runs a law was fitted to, the fit with its interval, predictions and actual losses",
    x: spots.map((p) => p.flops), series: [{ label: "loss", values: spots.map((p) => p.y), stroke: "--actual", points: true }],
    bands: law?.line ? [{ x: law.line.flops, p05: law.line.p05, p50: law.line.p50, p95: law.line.p95 }] : [],
    dots: [
      ...ladder.map((p) => ({ x: p.flops, y: p.loss, stroke: "--second", shape: "ring" })),
      ...rows.flatMap((r) => [
        { x: r.flops, y: r.final.p50, low: r.final.p05, high: r.final.p95, stroke: "--predicted", shape: "diamond" },
        ...(r.actual === null ? [] : [{ x: r.flops, y: r.actual, stroke: "--actual", shape: "disc" }]),
      ]),
    ],
    xAxis: { log: true, label: "training compute, FLOPs", format: format.power }, yAxis: { log: true, label: "final loss, nats per token", format: lossTick },
    xPad: 1.6, height: innerWidth < 600 ? 320 : 420, rest: "Rings are runs of the ladder, diamonds predictions with their 90% interval, discs what came of them.",
    readout: (i) => spots[i].say,
  });
  return { close() { drawn.destroy(); } };
}

const hex = (digest) => String(digest ?? "").replace(/[^0-9a-f]/g, "").slice(0, 64);

/** A law in words: its form, its parameters with their errors, its range, its doubts. */
function fitted(law) {
  if (law.error) return el("p", { class: "warn" }, `The law ${hex(law.digest).slice(0, 8)} can't be drawn: ${law.error}`);
  const parameters = Object.entries(law.parameters ?? {}).filter(([, v]) => Number.isFinite(v));
  const error = (name) => law.standard_errors?.[name];
  return el("section", { class: "law" },
    el("p", {}, `Form ${law.best_form ?? law.form}, fitted to ${law.runs?.length ?? 0} runs up to ${format.power(law.line.fitted_to)} FLOPs`, law.excluded?.length ? `, ${law.excluded.length} left out` : "",
      law.identifiable === false ? el("span", { class: "warn" }, ` · not fully identified${law.why ? `: ${[law.why].flat().join("; ")}` : ""}`) : ""),
    el("p", { class: "muted small" }, parameters.map(([name, v]) => `${name} ${+v.toPrecision(4)}${Number.isFinite(error(name)) ? ` ± ${+error(name).toPrecision(2)}` : ""}`).join(" · ")));
}

/** What a finished run ended at: its last validation loss, else the mean loss of its last hundredth. */
async function ending(run) {
  const { columns } = await api.samples(run.run, { from: Math.max(0, run.step - Math.max(200, run.step / 10)) }).catch(() => ({ columns: null }));
  if (!columns?.step.length) return null;
  const val = columns.val_loss.filter(Number.isFinite);
  if (val.length) return val.at(-1);
  const tail = columns.loss.slice(-Math.max(20, Math.round(run.step / 100))).filter(Number.isFinite);
  return tail.length ? tail.reduce((sum, v) => sum + v, 0) / tail.length : null;
}
