// Runs side by side, aligned by tokens, steps or time, and each one's difference from the first.
import * as api from "./api.js";
import { AXES, lossTick, mapping } from "./axes.js";
import { at, chart, settled, smooth } from "./charts.js";
import { choice, el, link } from "./dom.js";
import * as format from "./format.js";
import { runAddress } from "./address.js";

const COLORS = ["--actual", "--predicted", "--bad", "--third", "--second", "--fourth", "--muted", "--predicted"];
const DASHES = [[], [], [], [], [], [], [], [7, 3]];
const MOST = 8;

export async function open(host, context) {
  const all = (await api.runs()).sort((a, b) => (b.last_time ?? 0) - (a.last_time ?? 0));
  const cache = new Map();
  let charts = [];
  let closed = false;
  const tools = el("div", { class: "tools" }), list = el("fieldset", { class: "picks" });
  const lossHost = el("div", { class: "plot", id: "compare-chart" }), gapHost = el("div", { class: "plot" });
  const gapTitle = el("h3", { class: "panel" });
  host.append(el("h1", {}, "Compare"), list, el("div", { class: "card figure" }, tools, lossHost, gapTitle, gapHost));

  function picks() {
    const chosen = context.state.runs;
    list.replaceChildren(el("legend", {}, `Runs, up to ${MOST}`), ...[...all.filter((r) => chosen.includes(r.run)), ...all.filter((r) => !chosen.includes(r.run)).slice(0, 200)].map((r) => {
      const k = chosen.indexOf(r.run);
      return el("label", { class: `pick p${k}` },
        el("input", {
          type: "checkbox", checked: k >= 0, disabled: k < 0 && chosen.length >= MOST,
          onchange: (e) => {
            const runs = e.target.checked ? [...context.state.runs, r.run] : context.state.runs.filter((name) => name !== r.run);
            context.go({ runs: runs.slice(0, MOST) }, { quiet: true, replace: true });
            picks();
            draw();
          },
        }), k >= 0 ? el("i", { class: `swatch s${k}` }) : null, r.run);
    }));
  }

  const load = (name) => {
    if (!cache.has(name)) cache.set(name, Promise.all([api.run(name), api.samples(name, { max: 2000 })]).then(([run, s]) => ({ run, columns: s.columns })));
    return cache.get(name);
  };

  let asked = 0;
  async function draw() {
    const mine = ++asked;
    const names = context.state.runs;
    const got = await Promise.all(names.map((name) => load(name).catch((error) => { context.fail(error); return null; })));
    if (mine !== asked || closed) return;
    for (const c of charts) c.destroy();
    charts = [];
    const { by: kind, xs, ys } = context.state;
    const set = (change) => { context.go(change, { quiet: true, replace: true }); draw(); };
    tools.replaceChildren(
      choice("aligned by", [["tokens"], ["steps"], ["time"]], kind, (v) => set({ by: v })),
      choice("x scale", [["linear"], ["log"]], xs, (v) => set({ xs: v })),
      choice("loss scale", [["log", "log loss"], ["linear", "linear loss"]], ys, (v) => set({ ys: v })));
    const log = xs === "log";
    const lines = got.map((g, k) => {
      const map = g && mapping(kind, g.columns, g.run.prediction?.curve, g.run.started_time);
      if (!map) return null;
      const keep = g.columns.step.map((_, i) => i).filter((i) => !log || map.to(g.columns.step[i]) > 0);
      const raw = keep.map((i) => [g.columns.mean[i], g.columns.loss[i]].find(Number.isFinite) ?? null);
      return { name: names[k], x: keep.map((i) => map.to(g.columns.step[i])), y: smooth(raw, Math.max(10, raw.length / 60)), stroke: COLORS[k], dash: DASHES[k], width: 1.75 };
    }).filter((l) => l?.x.length);
    if (!lines.length) {
      lossHost.replaceChildren(el("p", { class: "empty" }, names.length ? "Nothing to draw on this axis." : "Choose runs above."));
      gapTitle.textContent = "";
      gapHost.replaceChildren();
      return;
    }
    const x = [...new Set(lines.flatMap((l) => l.x))].sort((a, b) => a - b);
    const axis = { ...AXES[kind], log };
    const none = [{ label: "", values: x.map(() => null), stroke: "--muted" }];
    const read = (list, say) => (i) => `${axis.say(x[i])} · ${list.map((l) => [l.name, at(l.x, l.y, x[i])]).filter(([, v]) => v !== null).map(([n, v]) => `${n} ${say(v)}`).join(" · ")}`;
    const fits = lines.map((l) => settled(l.x, [l.y], [], { positive: ys === "log" }));
    charts.push(chart(lossHost, {
      title: `Loss of ${lines.map((l) => l.name).join(", ")}`, x, series: none, lines, sync: "compare",
      xAxis: axis, yAxis: { log: ys === "log", label: "smoothed loss, nats per token", format: lossTick, size: 60 },
      yFit: log ? undefined : (range) => union(fits.map((f) => f(range))),
      height: innerWidth < 600 ? 320 : 420, readout: read(lines, format.loss), rest: "Point at the curves to read them.",
    }));
    const [base, ...others] = lines;
    gapTitle.textContent = others.length ? `Difference from ${base.name}` : "";
    gapHost.replaceChildren();
    if (others.length) {
      const apart = others.map((l) => ({ ...l, y: l.x.map((v, i) => { const b = at(base.x, base.y, v); return b === null || l.y[i] === null ? null : l.y[i] - b; }) }));
      const apartFits = apart.map((l) => settled(l.x, [l.y]));
      charts.push(chart(gapHost, {
        title: `Difference from ${base.name}`, x, series: none, lines: apart, sync: "compare", levels: [{ y: 0, stroke: "--line" }],
        xAxis: { ...axis, label: "" }, yAxis: { log: false, label: "nats per token", format: (v) => (v === 0 ? "0" : format.signed(v, 6).replace(/0+$/, "")), size: 60 },
        yFit: (range) => union([...apartFits.map((f) => f(range)), [0, 0]]), height: 190, readout: read(apart, (v) => format.signed(v, 4)),
      }));
    }
    tools.append(el("span", { class: "grow" }), ...lines.map((l) => link(runAddress(l.name), { class: "small" }, l.name)));
  }

  if (!context.state.runs.length) {
    const latest = all.filter((r) => r.step > 0).slice(0, 3);
    context.go({ runs: latest.map((r) => r.run) }, { quiet: true, replace: true });
  }
  picks();
  await draw();
  return {
    key(pressed) {
      const cycle = (list, value) => list[(list.indexOf(value) + 1) % list.length];
      const { by, xs, ys } = context.state;
      const change = { x: { by: cycle(["tokens", "steps", "time"], by) }, l: { xs: cycle(["linear", "log"], xs) }, y: { ys: cycle(["log", "linear"], ys) } }[pressed];
      if (change) { context.go(change, { quiet: true, replace: true }); draw(); }
    },
    close() { closed = true; for (const c of charts) c.destroy(); },
  };
}

function union(ranges) {
  const known = ranges.filter(Boolean);
  return known.length ? [Math.min(...known.map((r) => r[0])), Math.max(...known.map((r) => r[1]))] : null;
}
