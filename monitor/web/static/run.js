// One run: its loss in the predicted band, how far off it is in sigmas, what the judge said and what it advises.
import * as api from "./api.js";
import { AXES, lossTick, mapping } from "./axes.js";
import { bandText, chart, settled, smooth } from "./charts.js";
import { choice, el, link } from "./dom.js";
import { saveCsv, savePng } from "./download.js";
import * as format from "./format.js";
import { aside, facts, heading } from "./run_words.js";

const POINTS = 3000;
const TOUCH = matchMedia("(pointer: coarse)").matches;
const PINCH = /Mac/.test(navigator.platform) ? "⌘+wheel" : "Ctrl+wheel";
const SMOOTH = [[0, "raw"], [10, "10"], [50, "50"], [200, "200"], [1000, "1000"]];

export async function open(host, context) {
  const name = context.state.run;
  const zoomed = near();
  let [run, got, close] = await Promise.all([api.run(name), api.samples(name, { max: POINTS }), zoomed && api.samples(name, zoomed)]);
  let whole = got.columns;
  let thinned = got.thinned;
  let detail = null;
  let superseded = [];
  const drawn = new Map();
  let detailThinned = false;
  let closed = false;

  const head = el("div"), figures = el("div"), side = el("aside"), tools = el("div", { class: "tools" });
  const lossHost = el("div", { class: "plot", id: "loss-chart" });
  const gapHost = el("div", { class: "plot", id: "gap-chart" });
  const note = el("p", { class: "muted small" });
  const gapTitle = el("h3", { class: "panel" });
  const key = el("ul", { class: "key" });
  host.append(link("/", { class: "back" }, "← Runs"), head, figures,
    el("div", { class: "columns" },
      el("div", { class: "card figure" }, tools, lossHost, key, gapTitle, gapHost, note),
      side));

  const curve = () => run.prediction?.curve ?? null;
  const usable = (kind) => mapping(kind, whole, curve(), run.started_time);

  function words() {
    head.replaceChildren(heading(run));
    figures.replaceChildren(facts(run, whole));
    gapTitle.textContent = !whole.step.length ? "" : `Distance from ${run.source === "own_past" ? "its own past" : "the line"}, in sigmas`;
    side.replaceChildren(aside(run, act));
  }

  async function act(what, ...given) {
    try {
      await api[what](...given);
      run = await api.run(name);
      if (!closed) words();
    } catch (error) {
      context.fail(error);
    }
  }

  function setTools() {
    const { x, xs, ys, smooth: width } = context.state;
    const set = (change) => { context.go(change, { quiet: true, replace: true }); setTools(); draw(); };
    tools.replaceChildren(...[
      choice("x axis", Object.keys(AXES).filter((kind) => kind === "steps" || usable(kind)).map((kind) => [kind]), x, (v) => set({ x: v })),
      choice("x scale", [["linear"], ["log"]], xs, (v) => set({ xs: v })),
      positive() ? choice("loss scale", [["log", "log loss"], ["linear", "linear loss"]], ys, (v) => set({ ys: v })) : null,
      el("label", { class: "field" }, "smooth over ", el("select", { onchange: (e) => set({ smooth: Number(e.target.value) }) },
        SMOOTH.map(([v, text]) => el("option", { value: v, selected: v === (width ?? automatic()) }, text)))),
      context.state.from === null ? null : el("button", { class: "plain", type: "button", onclick: () => zoom(null, null) }, "zoom out"),
      el("span", { class: "grow" }),
      el("button", { class: "plain", type: "button", onclick: () => savePng([...drawn.values()].map((c) => c.chart.plot), `${name}, ${run.phase ?? ""}`, `${name}.png`) }, "PNG"),
      el("button", { class: "plain", type: "button", onclick: () => saveCsv(name, context.state.from, context.state.to).catch(context.fail) }, "CSV"),
    ].filter(Boolean));
  }

  /** Whether a logarithm can show every loss there is. */
  const positive = () => whole.loss.every((v) => v === null || !Number.isFinite(v) || v > 0);

  const automatic = () => {
    const { from, to } = context.state;
    const { step } = shown();
    const n = from === null ? step.length : step.filter((s) => s >= from && s <= to).length;
    return SMOOTH.map(([v]) => v).filter((v) => v <= Math.max(10, n / 25)).at(-1);
  };

  /** Bring a chart up to date in place, so that the pointer and its readout stay; another kind of chart is a new one. */
  function put(where, kind, spec) {
    const have = drawn.get(where);
    if (have?.kind === kind && spec) return have.chart.update(spec);
    have?.chart.destroy();
    drawn.delete(where);
    if (spec) drawn.set(where, { kind, chart: chart(where, spec) });
  }

  function draw() {
    const { xs, from, to } = context.state;
    const ys = positive() ? context.state.ys : "linear";
    const kind = usable(context.state.x) ? context.state.x : "steps";
    const map = usable(kind);
    const log = xs === "log";
    const axis = { ...AXES[kind], log };
    const seen = shown();
    const data = columnsFor(seen.step.length ? seen : ahead(seen), map, log);
    const width = context.state.smooth ?? automatic();
    const soft = smooth(data.mean, width);
    const bands = band(curve(), map, log);
    const window = near() && [map.to(from), map.to(to)];
    if (window && log) window[0] = Math.max(window[0], data.x[0] ?? 1);
    const both = {
      x: data.x, window, sync: `run-${name}`, roomAtEnd: true,
      onWindow: (low, high) => (low === null ? zoom(null, null) : zoom(map.from(low), map.from(high))),
      onMove: (low, high) => (low === null ? move(null, null) : move(map.from(low), map.from(high))),
    };
    const live = curve() === null ? expectedBand(data) : [];
    const lost = thin(data.x.filter((_, i) => data.lost[i]), 300);
    if (!data.x.length) { // no sample, and no prediction that could be drawn meanwhile
      put(lossHost, "", null);
      put(gapHost, "", null);
      lossHost.replaceChildren(el("p", { class: "empty" }, "No sample yet."));
      gapHost.replaceChildren();
      key.replaceChildren();
      tools.replaceChildren();
      return;
    }
    put(lossHost, [kind, xs, ys, width > 1].join(), {
      ...both,
      title: `Loss of ${name} against ${axis.label}, with the predicted band`,
      series: [
        { label: "loss", values: data.loss, stroke: width > 1 ? "--raw" : "--actual", width: 1 },
        { label: "smoothed", values: width > 1 ? soft : data.loss.map(() => null), stroke: "--actual", width: 2 },
      ],
      bands: [...bands, ...live],
      lines: superseded.map((s) => ({ x: s.step.map(map.to), y: smooth(s.loss, Math.max(10, width)), stroke: "--second", width: 2, dash: [2, 3], over: true })),
      marks: marksFor(run, map),
      dots: [
        ...lost.map((x) => ({ x, y: null, stroke: "--bad", shape: "cross", size: 3.5 })),
        ...data.val.map(([x, y]) => ({ x, y, stroke: "--second", shape: "ring", size: 3 })),
        ...(data.x.length < 4 ? data.x.map((x, i) => ({ x, y: data.loss[i], stroke: "--actual", shape: "disc", size: 3 })).filter((d) => d.y !== null) : []),
        ...endPoint(run, curve(), map),
      ],
      xAxis: axis,
      yAxis: { log: ys === "log", label: "loss, nats per token", format: lossTick },
      yFit: log ? undefined : settled(seen.step.length ? data.x : [], [data.loss], [...bands, ...live], { positive: ys === "log" }),
      levels: Number.isFinite(run.target_loss) ? [{ y: run.target_loss, stroke: "--good", dash: [3, 3] }] : [],
      height: innerWidth < 600 ? 320 : 440,
      rest: !seen.step.length ? "No sample yet: this is what was predicted." : TOUCH ? (from === null ? "Touch the curve to read it, pinch to zoom." : "Pinch to zoom, drag to move, tap twice for the whole.")
        : `Drag or ${PINCH} to zoom${from === null ? "" : ", Shift+wheel to move"}, double-click to zoom out.`,
      readout: (i) => `${axis.say(data.x[i])}${kind === "steps" ? "" : `, step ${format.count(data.step[i])}`} · loss ${data.lost[i] ? "not a number" : format.loss(data.loss[i])}`
        + (width > 1 ? ` · smoothed ${format.loss(soft[i])}` : "")
        + (bands.length ? ` · predicted ${bandText(bands[0], data.x[i])}` : data.expected[i] === null ? "" : ` · expected ${format.loss(data.expected[i])}`),
    });
    key.replaceChildren(...[
      !seen.step.length ? null : width > 1 ? ["k-raw", "loss"] : null,
      !seen.step.length ? null : ["k-actual", width > 1 ? "smoothed" : "loss"],
      lost.length ? ["k-lost", "not a number"] : null,
      bands.length ? ["k-median", "predicted"] : live.length ? ["k-median", "expected from its past"] : null,
      bands.length ? ["k-band", "90% interval"] : live.length ? ["k-band", "usual range"] : null,
      data.val.length ? ["k-val", "validation loss"] : null,
      Number.isFinite(run.target_loss) ? ["k-target", "target"] : null,
      superseded.length ? ["k-superseded", "superseded attempt"] : null,
    ].filter(Boolean).map(([kind, text]) => el("li", {}, el("i", { class: kind }), text)));
    if (data.gap.some((v) => v !== null)) {
      const clipped = data.gap.map((v) => (v === null ? null : Math.max(-20, Math.min(20, v))));
      const softGap = smooth(clipped, Math.max(10, width));
      put(gapHost, [kind, xs].join(), {
        ...both,
        title: `Distance of ${name} from its line in standard deviations`,
        series: [
          { label: "gap", values: clipped, stroke: "--raw", width: 1 },
          { label: "smoothed", values: softGap, stroke: "--actual", width: 1.75 },
        ],
        marks: marksFor(run, map).map((m) => ({ ...m, label: "" })),
        levels: [{ y: 0, stroke: "--predicted" }],
        lines: bands.length ? [{ x: extentOf(bands[0].x), y: [0, 0], stroke: "--predicted" }] : [],
        xAxis: { ...axis, label: "" },
        yAxis: { log: false, label: "sigmas", format: (v) => String(+v.toPrecision(3)) },
        yFit: (range) => {
          const [low, high] = settled(data.x, [clipped])(range) ?? [0, 0];
          return [Math.min(-4, low), Math.max(4, high)];
        },
        height: 170,
        readout: (i) => (data.gap[i] === null ? "" : `${format.signed(data.gap[i], 2)} sigmas · smoothed ${format.signed(softGap[i], 2)}`),
      });
    } else {
      put(gapHost, "", null);
      gapHost.replaceChildren(el("p", { class: "muted small" }, !seen.step.length ? "" : data.lost.every(Boolean) ? "No finite loss to compare." : "Not yet: how much single steps scatter is known after a few."));
    }
    note.textContent = (detail ? detailThinned : thinned) ? `Thinned for drawing: each bucket keeps its lowest and highest sample${
      seen.mean.some(Number.isFinite) ? "; the smoothed line follows the bucket's mean" : ", and the smoothed line runs between them"}. Zoom in to see every step.` : "";
  }

  /** Empty columns over the steps that the prediction knows: something to draw its band on before the first sample. */
  function ahead(empty) {
    const step = [...(curve()?.step ?? [])];
    return { ...Object.fromEntries(Object.keys(empty).map((f) => [f, step.map(() => null)])), step };
  }

  /** Every sample at hand: those near the window in detail, the others as the whole run has them. */
  function shown() {
    if (!detail || context.state.from === null) return whole;
    const first = detail.step[0], last = detail.step.at(-1);
    const before = whole.step.findIndex((s) => s >= first), after = whole.step.findIndex((s) => s > last);
    return Object.fromEntries(Object.keys(whole).map((f) => [f, [
      ...(before < 0 ? whole[f] : whole[f].slice(0, before)), ...detail[f], ...(after < 0 ? [] : whole[f].slice(after))]]));
  }

  /** The window and half as much on either side, so that a small move shows every step at once. */
  function near() {
    const { from, to } = context.state;
    if (from === null || to === null || !(to > from)) return null;
    const more = (to - from) / 2;
    return { from: Math.max(0, Math.floor(from - more)), to: Math.ceil(to + more), max: 2 * POINTS };
  }

  async function zoom(from, to, replace = false) {
    clearTimeout(resting);
    context.go({ from: from === null ? null : Math.max(0, Math.floor(from)), to: to === null ? null : Math.ceil(to) }, { quiet: true, replace });
    await look();
  }

  /** While the wheel or fingers move it: drawn at once from what is at hand, whose buckets keep their extremes, and asked for at rest. */
  let resting = null, due = 0;
  function move(from, to) {
    if (from !== null && to - from < 8) return;
    asked += 1;
    context.go({ from, to }, { quiet: true, address: false });
    due ||= requestAnimationFrame(() => { due = 0; if (!closed) draw(); });
    clearTimeout(resting);
    resting = setTimeout(() => { if (!closed) zoom(from, to, true); }, 150);
  }

  let asked = 0;
  async function look() {
    const mine = ++asked;
    const wanted = near();
    if (!wanted) detail = null;
    else if (thinned) {
      const answer = await api.samples(name, wanted).catch((error) => { context.fail(error); return null; });
      if (mine !== asked || closed) return;
      take(answer);
    }
    setTools();
    draw();
  }

  function take(answer) {
    detail = answer?.columns.step.length ? answer.columns : null;
    detailThinned = answer?.thinned ?? false;
  }

  async function older() {
    const attempts = run.attempts ?? [];
    superseded = (await Promise.all(attempts.slice(0, -1).slice(-4).map((a, i) => {
      const next = attempts[attempts.indexOf(a) + 1];
      return api.samples(name, { attempt: a.attempt, from: next.resume_step + 1, max: 500 }).then((s) => s.columns, () => null);
    }))).filter((s) => s?.step.length);
  }

  words();
  if (close && thinned) take(close);

  /** The arrows move the window by a quarter; plus and minus halve and double it. Whether the key was one of them. */
  function turn(pressed) {
    const by = { ArrowLeft: [-0.25, -0.25], ArrowRight: [0.25, 0.25], "+": [0.25, -0.25], "-": [-0.5, 0.5] }[pressed];
    const end = Math.max(whole.step.at(-1) ?? 0, curve()?.step?.at(-1) ?? 0);
    const [from, to] = context.state.from === null ? [whole.step[0] ?? 0, end] : [context.state.from, context.state.to];
    if (!by || (context.state.from === null && pressed !== "+")) return false;
    const width = to - from;
    let low = from + by[0] * width, high = to + by[1] * width;
    if (by[0] === by[1]) [low, high] = low < 0 ? [0, width] : high > end ? [end - width, end] : [low, high];
    if (high - low >= end) move(null, null);
    else move(Math.max(0, low), Math.min(end, high));
    return true;
  }

  let fetching = false, missed = null;
  let attempt = run.attempt; // whose samples are drawn as the run's own
  async function follow(summary) {
    const alerted = (summary.alerts ?? []).length !== (run.alerts ?? []).filter((a) => (a.resolved_step ?? null) === null).length;
    const { alerts: _, ...rest } = summary;
    run = { ...run, ...rest };
    words();
    const restarted = run.attempt !== attempt;
    const moved = (run.step ?? -1) > (whole.step.at(-1) ?? -1);
    if (!(restarted || alerted || moved)) return;
    if (fetching) {
      missed = summary;
      return;
    }
    fetching = true;
    try {
      if (restarted || alerted) run = await api.run(name);
      if (restarted || whole.step.length > 4 * POINTS) {
        const again = await api.samples(name, { max: POINTS });
        whole = again.columns;
        thinned = again.thinned;
        if (restarted) await older();
        attempt = run.attempt;
      } else {
        const more = await api.samples(name, { from: (whole.step.at(-1) ?? -1) + 1, max: POINTS });
        whole = api.extend(whole, more.columns);
        thinned ||= more.thinned; // as after a night's sleep
      }
      if (closed) return;
      words();
      if (context.state.from === null) draw();
    } catch (error) {
      if (!closed) context.fail(error);
    } finally {
      setTimeout(() => {
        fetching = false;
        const last = missed;
        missed = null;
        if (last && !closed) follow(last);
      }, 900);
    }
  }

  return {
    /** The view is in the document: its charts know how wide they are. What was superseded comes after the first picture. */
    shown() {
      setTools();
      draw();
      if ((run.attempts ?? []).length > 1) older().then(() => { if (!closed && superseded.length) draw(); });
    },
    hear(summary) { if (summary.run === name) follow(summary); },
    key(pressed) {
      const cycle = (list, value) => list[(list.indexOf(value) + 1) % list.length];
      const { x, xs, ys } = context.state;
      const change = { x: { x: cycle(Object.keys(AXES).filter(usable), x) }, l: { xs: cycle(["linear", "log"], xs) }, y: { ys: cycle(["log", "linear"], ys) } }[pressed];
      if (change) { context.go(change, { quiet: true, replace: true }); setTools(); draw(); }
      if (pressed === "0") zoom(null, null);
      return turn(pressed);
    },
    close() { closed = true; clearTimeout(resting); for (const c of drawn.values()) c.chart.destroy(); },
  };
}

/** Columns on the chosen axis: increasing x, loss with gaps where it is missing or not finite. */
function columnsFor(c, map, log) {
  const out = { x: [], step: [], loss: [], lost: [], gap: [], expected: [], lower: [], upper: [], val: [], mean: [] };
  const finite = (v) => (Number.isFinite(v) ? v : null);
  for (let i = 0; i < c.step.length; i++) {
    const x = map.to(c.step[i]);
    if (!Number.isFinite(x) || (log && x <= 0) || (out.x.length && x < out.x.at(-1))) continue;
    out.x.push(x);
    out.step.push(c.step[i]);
    out.loss.push(finite(c.loss[i]));
    out.mean.push(finite(c.mean[i]) ?? finite(c.loss[i]));
    out.lost.push(c.loss[i] !== null && !Number.isFinite(c.loss[i]));
    out.gap.push(finite(c.gap_sigma[i]));
    for (const f of ["expected", "lower", "upper"]) out[f].push(finite(c[f][i]));
    if (Number.isFinite(c.val_loss[i])) out.val.push([x, c.val_loss[i]]);
  }
  return out;
}

function band(curve, map, log) {
  if (!curve?.step?.length) return [];
  const x = curve.step.map(map.to);
  const keep = x.map((v, i) => i).filter((i) => Number.isFinite(x[i]) && (!log || x[i] > 0));
  const pick = (values) => keep.map((i) => values[i]);
  return [{ x: pick(x), p05: pick(curve.p05), p50: pick(curve.p50), p95: pick(curve.p95) }];
}

/** Without a prediction, the judge's own expectation serves as the band. */
function expectedBand(data) {
  const keep = data.x.map((_, i) => i).filter((i) => data.expected[i] !== null && data.lower[i] !== null && data.upper[i] !== null);
  const pick = (values) => keep.map((i) => values[i]);
  return keep.length > 1 ? [{ x: pick(data.x), p05: pick(data.lower), p50: pick(data.expected), p95: pick(data.upper) }] : [];
}

function marksFor(run, map) {
  const tone = { critical: "--bad", warning: "--warn", info: "--predicted" };
  const attempts = (run.attempts ?? []).slice(1).map((a) => ({
    x: map.to(a.resume_step), label: `attempt ${a.attempt}`, stroke: "--muted", dash: [2, 3],
  }));
  const alerts = (run.alerts ?? []).slice(-12).map((a) => ({
    x: map.to(a.step), label: a.alert, stroke: tone[a.severity] ?? "--muted", width: a.severity === "critical" ? 2 : 1.25,
    dash: (a.resolved_step ?? null) === null ? [] : [5, 4],
  }));
  return [...attempts, ...alerts].filter((m) => Number.isFinite(m.x));
}

/** The predicted end of the run, where the curve says it is. */
function endPoint(run, curve, map) {
  const final = run.predicted_final ?? run.prediction?.final_loss;
  const end = curve?.step?.at(-1);
  if (!final || end === undefined) return [];
  return [{ x: map.to(end), y: final.p50, low: final.p05, high: final.p95, stroke: "--predicted", shape: "diamond", label: format.loss(final.p50), bold: true, side: "left" }];
}

const extentOf = (x) => [x[0], x.at(-1)];
const thin = (list, most) => (list.length <= most ? list : list.filter((_, i) => i % Math.ceil(list.length / most) === 0));
