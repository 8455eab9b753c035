// Every registered prediction against what came of it: compute across, loss up.
import * as api from "./api.js";
import { runAddress } from "./address.js";
import { lossTick } from "./axes.js";
import { chart } from "./charts.js";
import { el, link } from "./dom.js";
import * as format from "./format.js";
import { interval } from "./words.js";

const MOST = 60;

export async function open(host, context) {
  const list = (await api.runs()).filter((r) => r.predicted_final).slice(0, MOST);
  const details = (await Promise.all(list.map((r) => api.run(r.run).catch(() => null)))).filter((d) => d?.prediction);
  const ends = await Promise.all(details.map((d) => (d.phase === "ended" ? ending(d) : null)));
  const rows = details.map((d, i) => {
    const p = d.prediction;
    const flops = Number.isFinite(p.flops) ? p.flops : 6 * p.params * p.tokens;
    return { run: d.run, flops, params: p.params, tokens: p.tokens, final: p.final_loss, actual: ends[i], phase: d.phase };
  }).filter((r) => Number.isFinite(r.flops) && r.flops > 0).sort((a, b) => a.flops - b.flops);
  host.append(el("h1", {}, "Predictions and what came of them"),
    el("p", { class: "muted lede" }, "Each prediction was registered before its run started. Compute is 6 x parameters x tokens. A run ends at its last validation loss, or without one at the mean of its last steps' loss."));
  if (!rows.length) {
    host.append(el("div", { class: "empty" }, el("p", {}, "No run has registered a prediction yet. Fit a law to finished runs and name it in the next run's spec:"),
      el("pre", {}, "losscast fit points.csv -o law.json\nlosscast submit run.yaml   # with  law: law.json")));
    return { close() {} };
  }
  const ended = rows.filter((r) => r.actual !== null);
  const inside = ended.filter((r) => r.actual >= r.final.p05 && r.actual <= r.final.p95).length;
  const plotHost = el("div", { class: "plot", id: "law-chart" });
  host.append(
    ended.length ? el("p", {}, `${inside} of ${ended.length} finished ${ended.length === 1 ? "run" : "runs"} ended inside the predicted 90% interval.`) : "",
    el("div", { class: "card figure" }, plotHost),
    el("div", { class: "card scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ["Run", "Parameters", "Tokens", "FLOPs", "Predicted", "90% interval", "Ended at", "Error"].map((t, i) => el("th", { class: i ? "num" : null }, t)))),
      el("tbody", {}, rows.map((r) => el("tr", {}, el("td", {}, link(runAddress(r.run, context.state), {}, r.run)),
        ...[format.short(r.params), format.short(r.tokens), format.power(r.flops), format.loss(r.final.p50), interval(r.final), r.actual === null ? r.phase : format.loss(r.actual),
          r.actual === null ? "–" : `${format.signed(100 * (r.final.p50 / r.actual - 1), 1)}%`].map((t) => el("td", { class: "num" }, t))))))));
  const drawn = chart(plotHost, {
    title: "Predicted and actual final loss against compute",
    x: rows.map((r) => r.flops), series: [{ label: "actual", values: rows.map((r) => r.actual), stroke: "--actual", points: true }],
    dots: rows.flatMap((r) => [
      { x: r.flops, y: r.final.p50, low: r.final.p05, high: r.final.p95, stroke: "--predicted", shape: "diamond" },
      ...(r.actual === null ? [] : [{ x: r.flops, y: r.actual, stroke: "--actual", shape: "disc" }]),
    ]),
    xAxis: { log: true, label: "training compute, FLOPs", format: format.power }, yAxis: { log: true, label: "final loss, nats per token", format: lossTick },
    xPad: 1.6, height: 400, rest: "Diamonds are predictions with their 90% interval, discs what came of them.",
    readout: (i) => `${rows[i].run} · predicted ${format.loss(rows[i].final.p50)} (${interval(rows[i].final)})${rows[i].actual === null ? "" : ` · ended at ${format.loss(rows[i].actual)}`}`,
  });
  return { close() { drawn.destroy(); } };
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
