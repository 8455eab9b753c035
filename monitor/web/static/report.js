// The figures of the demo's report. The words and tables are in the HTML already; this only draws.
import * as format from "./format.js";
import * as charts from "./charts.js";

const data = JSON.parse(document.getElementById("data").textContent);
const phone = matchMedia("(max-width: 560px)").matches;
const number = (v) => (v === "NaN" || v === null || v === undefined ? NaN : v === "Infinity" ? Infinity : Number(v));
const gap = (v) => (Number.isFinite(v) ? v : null);

function law(host) {
  const { ladder, law, target } = data;
  const points = [...ladder].sort((a, b) => a.flops - b.flops);
  const x = [...points.map((p) => p.flops), target.flops];
  const predicted = target.predicted;
  const named = points.filter((p, i) => !i || (!phone && (i === points.length - 1 || p.flops / points[i - 1].flops > 1.6)));
  charts.chart(host, {
    title: "Loss against compute: the ladder, the law fitted to it with its 90% interval, the prediction and the actual loss",
    x,
    series: [{ label: "loss", values: [...points.map((p) => p.loss), gap(number(target.actual))], stroke: "--actual", points: true }],
    bands: law.line ? [{ x: law.line.flops, p05: law.line.p05, p50: law.line.p50, p95: law.line.p95 }] : [],
    dots: [
      ...points.map((p) => ({
        x: p.flops, y: p.loss, stroke: "--actual", shape: "ring", text: "--muted", side: "above",
        label: named.includes(p) ? format.short(p.params) : "",
      })),
      { x: target.flops, y: predicted.p50, low: predicted.p05, high: predicted.p95, stroke: "--predicted", shape: "diamond",
        label: `predicted ${format.loss(predicted.p50)}`, side: "left", bold: true },
      ...(target.actual === null ? [] : [{ x: target.flops, y: number(target.actual), stroke: "--actual", shape: "disc", size: 5.5,
        label: phone ? format.loss(number(target.actual)) : `actual ${format.loss(number(target.actual))}`, side: "right", bold: true }]),
    ],
    xAxis: { log: true, label: "training compute, FLOPs", format: format.power },
    yAxis: { log: true, label: "validation loss, nats per token", format: (v) => String(+v.toPrecision(4)) },
    xPad: phone ? 2.2 : 1.9,
    height: phone ? 320 : 430,
    rest: phone ? "" : "Point at a run to read it.",
    readout: (i) => {
      const p = i < points.length ? points[i] : { ...target, loss: number(target.actual) };
      return `${p.run} · ${format.short(p.params)} parameters · ${format.short(p.tokens)} tokens · ${format.power(p.flops)} FLOPs · loss ${format.loss(p.loss)}`;
    },
  });
}

function split(samples) {
  const x = [], loss = [], lost = [];
  for (const [step, value] of samples) {
    const v = number(value);
    x.push(step);
    loss.push(gap(v));
    if (!Number.isFinite(v)) lost.push(step);
  }
  return { x, loss, lost };
}

function target(host, log) {
  const { x, loss } = split(data.target.samples);
  const curve = data.target.curve;
  const bands = curve?.step ? [{ x: curve.step, p05: curve.p05, p50: curve.p50, p95: curve.p95 }] : [];
  const smoothed = charts.smooth(loss, Math.max(5, loss.length / 60));
  const from = Math.max(1, x.find((v) => v > 0) ?? 1);
  return charts.chart(host, {
    title: "The target's training loss inside the band predicted before it started",
    x, bands,
    series: [
      { label: "loss", values: loss, stroke: "--raw", width: 1 },
      { label: "smoothed", values: smoothed, stroke: "--actual", width: 2 },
    ],
    window: log ? [from, Math.max(x.at(-1) ?? 1, curve?.step?.at(-1) ?? 1)] : null,
    xAxis: { log, label: "step", format: (v) => (v < 1e5 ? format.count(v) : format.short(v, 6)) },
    yAxis: { log, label: "loss, nats per token", format: (v) => String(+v.toPrecision(4)) },
    yFit: log ? undefined : charts.settled(x, [loss], bands, { share: 0.06 }),
    height: phone ? 300 : 380,
    rest: phone ? "" : "Point at the curve to read it.",
    readout: (i) => `step ${format.count(x[i])} · loss ${format.loss(loss[i])} · smoothed ${format.loss(smoothed[i])}`
      + (bands.length ? ` · predicted ${charts.bandText(bands[0], x[i])}` : ""),
  });
}

/** One drill, close up: the steps around the fault, where the healthy line and the call can be told apart. */
function drill(host, d) {
  const { x, loss, lost } = split(d.samples);
  const called = d.called_step ?? null, paged = d.paged_step ?? null;
  const reach = Math.max(60, 1.3 * ((paged ?? d.fault_step) - d.fault_step), 5 * Math.abs((called ?? d.fault_step) - d.fault_step));
  const end = Math.min(x.at(-1) ?? d.fault_step, d.fault_step + 2 * reach);
  const from = Math.max(x[0] ?? 0, d.fault_step - Math.max(reach, 2.2 * reach - (end - d.fault_step)));
  const curve = data.target.curve;
  const bands = curve?.step ? [{ x: curve.step, p05: curve.p05, p50: curve.p50, p95: curve.p95 }] : [];
  const missing = new Set(lost);
  const crosses = [];
  for (const step of lost) if (!crosses.length || step - crosses.at(-1) >= (end - from) / 26) crosses.push(step);
  const together = called === d.fault_step;
  const named = (word, step) => (phone ? word : `${word}, step ${format.count(step)}`);
  charts.chart(host, {
    title: `${d.name}: loss, with the step of the fault and the step at which it was called`,
    x, bands,
    series: [{ label: "loss", values: loss, stroke: "--actual", width: 1.5 }],
    marks: [
      { x: d.fault_step, label: named(`fault${together ? " and call" : ""}`, d.fault_step), stroke: "--bad", side: "left",
        dash: together ? [] : [5, 4], width: together ? 2 : 1.25 },
      ...(called === null || together ? [] : [{ x: called, label: named("called", called), stroke: d.severity === "critical" ? "--bad" : "--warn", width: 2 }]),
      ...(paged === null || paged === called ? [] : [{ x: paged, label: named("paged", paged), stroke: "--bad", width: 2 }]),
    ],
    dots: crosses.slice(0, 200).map((step) => ({ x: step, y: null, stroke: "--bad", shape: "cross", size: 4 })),
    window: [from, end + Math.max(2, (end - from) * 0.02)],
    xAxis: { label: "step", format: format.count },
    yAxis: { log: true, label: "loss", format: (v) => String(+v.toPrecision(4)) },
    height: 250,
    readout: (i) => `step ${format.count(x[i])} · loss ${missing.has(x[i]) ? "not a number" : format.loss(loss[i])}`
      + (bands.length ? ` · predicted ${charts.bandText(bands[0], x[i])}` : ""),
  });
}

law(document.getElementById("law"));
const host = document.getElementById("target");
let shown = target(host, false);
for (const button of document.querySelectorAll("[data-scale]")) {
  button.addEventListener("click", () => {
    for (const other of document.querySelectorAll("[data-scale]")) other.setAttribute("aria-pressed", String(other === button));
    shown.destroy();
    shown = target(host, button.dataset.scale === "log");
  });
}
data.drills.forEach((d, i) => drill(document.getElementById(`drill-${i}`), d));
