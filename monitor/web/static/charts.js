// One line chart over uPlot: series, predicted bands with their medians, marks, points, and a readout.
// Bands, marks and points live on their own grids and are drawn on the canvas, so that a prediction of 2,000 steps
// and a run of a million need no common axis. Colours are names of CSS variables, read again at every drawing.
/* global uPlot */
import * as fingers from "./fingers.js";
import * as format from "./format.js";

export function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim() || "#888";
}

const finite = (v) => typeof v === "number" && Number.isFinite(v);

/** ys at x by linear interpolation over increasing xs; null outside. */
export function at(xs, ys, x) {
  const n = xs.length;
  if (!n || x < xs[0] || x > xs[n - 1]) return null;
  let low = 0, high = n - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= x) low = middle; else high = middle;
  }
  const span = xs[high] - xs[low];
  const share = span > 0 ? (x - xs[low]) / span : 0;
  return ys[low] + (ys[high] - ys[low]) * share;
}

/** Ticks of a log axis: powers of ten over many decades, 1-2-5 over a few, an even ladder within one. */
export function logTicks(min, max, room) {
  const decades = Math.log10(max / min);
  const ticks = [];
  if (decades < 1) {
    const rough = (max - min) / Math.max(2, Math.min(room, 6));
    const unit = 10 ** Math.floor(Math.log10(rough));
    const step = unit * ([1, 2, 2.5, 5, 10].find((m) => m * unit >= rough) ?? 10);
    for (let k = Math.ceil(min / step - 1e-9); k * step <= max * (1 + 1e-12); k++) ticks.push(+(k * step).toPrecision(12));
    return ticks;
  }
  const within = decades * 3 <= room ? [1, 2, 5] : [1];
  const stride = within.length > 1 ? 1 : Math.max(1, Math.ceil(decades / Math.max(2, room)));
  for (let e = Math.floor(Math.log10(min)); e <= Math.ceil(Math.log10(max)); e++) {
    if (e % stride) continue;
    for (const m of within) {
      const v = m * 10 ** e;
      if (v >= min * (1 - 1e-9) && v <= max * (1 + 1e-9)) ticks.push(+v.toPrecision(12));
    }
  }
  return ticks;
}

function extent(arrays, keep = () => true) {
  let low = Infinity, high = -Infinity;
  for (const values of arrays) {
    for (let i = 0; i < values.length; i++) {
      const v = values[i];
      if (finite(v) && keep(v)) { if (v < low) low = v; if (v > high) high = v; }
    }
  }
  return low <= high ? [low, high] : null;
}

/**
 * Draw a chart into `host` and keep it at its host's width.
 *
 * spec.x        increasing numbers; spec.series [{label, values, stroke, width, dash, points}] on them
 * spec.bands    [{x, p05, p50, p95, stroke, fill}]; spec.lines [{x, y, stroke, dash, width, over}], under the series or over
 * spec.marks    [{x, label, stroke, dash, side}] vertical; spec.levels [{y, stroke}] horizontal
 * spec.dots     [{x, y, stroke, shape: "ring"|"disc"|"diamond"|"cross", label, low, high}]; y null: on the lower edge
 * spec.xAxis, spec.yAxis   {log, label, format, short}; spec.yFit (u, [lo, hi] of x) -> [lo, hi] or null for automatic
 * spec.height   CSS pixels; spec.window [min, max] or null; spec.onWindow(min|null, max|null); spec.onCursor(index)
 * spec.onMove   (min|null, max|null) while the wheel turns: with Ctrl it zooms at the pointer (as a pinch on a touchpad
 *               does), with Shift or sideways it moves; a wheel alone scrolls the page. So do fingers: see fingers.js
 * spec.sync     charts of one name share the pointer; spec.roomAtEnd leaves space after the last point
 */
export function chart(host, spec) {
  let now = { bands: [], lines: [], marks: [], levels: [], dots: [], window: null, ...spec };

  const xExtent = () => {
    const positive = now.xAxis.log ? (v) => v > 0 : undefined;
    return extent([now.x, ...now.bands.map((b) => b.x), ...now.lines.map((l) => l.x), now.dots.map((d) => d.x)], positive);
  };
  const xRange = () => {
    if (now.window) return now.window;
    const [low, high] = xExtent() ?? [now.xAxis.log ? 1 : 0, 10];
    if (now.roomAtEnd && low < high) return [low, now.xAxis.log ? high * (high / low) ** 0.015 : high + (high - low) * 0.015];
    if (now.xPad) return now.xAxis.log ? [low / now.xPad, high * now.xPad] : [low - now.xPad, high + now.xPad];
    return low === high ? (now.xAxis.log ? [low / 2, low * 2] : [low - 1, low + 1]) : [low, high];
  };
  const yRange = () => {
    const [from, to] = xRange();
    const fitted = now.yFit?.([from, to]);
    let low = Infinity, high = -Infinity;
    const see = (x, v) => {
      if (x >= from && x <= to && finite(v) && (!now.yAxis.log || v > 0)) { if (v < low) low = v; if (v > high) high = v; }
    };
    if (fitted && !(now.yAxis.log && fitted[0] <= 0)) [low, high] = fitted;
    else {
      for (const s of now.series) for (let i = 0; i < now.x.length; i++) see(now.x[i], s.values[i]);
      for (const b of now.bands) for (let i = 0; i < b.x.length; i++) { see(b.x[i], b.p05[i]); see(b.x[i], b.p95[i]); }
      for (const l of now.lines) for (let i = 0; i < l.x.length; i++) see(l.x[i], l.y[i]);
      for (const d of now.dots) { see(d.x, d.y); see(d.x, d.low); see(d.x, d.high); }
    }
    if (!(low <= high)) return now.yAxis.log ? [1, 10] : [0, 1];
    if (now.yAxis.log) {
      const pad = Math.max(Math.pow(high / low, 0.06), 1.002);
      return [low / pad, high * pad];
    }
    const pad = Math.max((high - low) * 0.06, Math.abs(high) * 1e-4, 1e-9);
    return [low - pad, high + pad];
  };

  const data = () => [now.x, ...now.series.map((s) => s.values)];
  const axis = (which, size) => ({
    scale: which,
    stroke: () => css("--muted"),
    font: `12px ${css("--sans")}`,
    labelFont: `12px ${css("--sans")}`,
    label: now[`${which}Axis`].label,
    labelSize: now[`${which}Axis`].label ? (which === "x" ? 20 : 18) : 0,
    size,
    gap: 6,
    ticks: { stroke: () => css("--line"), width: 1, size: 4 },
    grid: { stroke: () => css("--grid"), width: 1 },
    values: (u, ticks) => ticks.map((v) => (v === null ? "" : now[`${which}Axis`].format(v))),
    space: which === "x" ? (u, index, low, high, width) => (width < 420 * devicePixelRatio ? 60 : 84) : now.height < 220 ? 26 : 44,
    ...(now[`${which}Axis`].log && {
      incrs: (u, index, min, max) => [Math.max(5, max - min)], // a step uPlot takes over any range: the ticks are ours, from `splits`
      splits: (u, index, min, max) => logTicks(min, max, which === "x" ? u.bbox.width / devicePixelRatio / 76 : u.bbox.height / devicePixelRatio / 40),
      filter: (u, ticks) => ticks,
    }),
  });

  const paint = {
    under(u) {
      const { ctx } = u;
      clipped(u, () => {
        for (const b of now.bands) {
          if (!b.x.length) continue;
          const px = b.x.map((v) => u.valToPos(v, "x", true));
          const trace = (values, back) => {
            for (let k = 0; k < px.length; k++) {
              const i = back ? px.length - 1 - k : k;
              if (finite(px[i]) && finite(values[i])) ctx.lineTo(px[i], u.valToPos(values[i], "y", true));
            }
          };
          ctx.beginPath();
          trace(b.p95, false);
          trace(b.p05, true);
          ctx.closePath();
          ctx.fillStyle = css(b.fill ?? "--predicted-fill");
          ctx.fill();
          stroke(ctx, () => trace(b.p50, false), b.stroke ?? "--predicted", b.width ?? 1.5, b.dash ?? [6, 4]);
        }
        for (const l of now.lines) if (!l.over) line(u, l);
        for (const v of now.levels) {
          const y = u.valToPos(v.y, "y", true);
          stroke(ctx, () => { ctx.moveTo(u.bbox.left, y); ctx.lineTo(u.bbox.left + u.bbox.width, y); }, v.stroke ?? "--line", 1, v.dash);
        }
      });
    },
    over(u) {
      clipped(u, () => {
        for (const l of now.lines) if (l.over) line(u, l);
        for (const d of now.dots) dot(u, d);
      });
      marks(u, now.marks);
      for (const d of now.dots) if (d.label) dotLabel(u, d);
    },
  };

  const readout = document.createElement("div");
  readout.className = "readout";
  readout.setAttribute("aria-live", "off");
  const box = document.createElement("div");
  box.className = "chart";
  box.setAttribute("role", "img");
  if (now.title) box.setAttribute("aria-label", now.title);
  host.replaceChildren(readout, box);

  const opts = {
    width: Math.max(200, host.clientWidth),
    height: now.height,
    padding: [now.padTop ?? 10, 14, 0, 0],
    legend: { show: false },
    focus: { alpha: 1 },
    cursor: {
      y: false,
      points: { size: 7, width: 1.5, fill: () => css("--card") },
      drag: { x: true, y: false, setScale: false, uni: 12 },
      bind: { dblclick: () => () => { now.onWindow?.(null, null); return null; } },
      ...(now.sync && { sync: { key: now.sync, scales: ["x", null] } }),
    },
    scales: {
      x: { time: false, distr: now.xAxis.log ? 3 : 1, range: xRange },
      y: { distr: now.yAxis.log ? 3 : 1, range: yRange },
    },
    axes: [axis("x", 34), axis("y", now.yAxis.size ?? 52)],
    series: [{}, ...now.series.map((s) => ({
      scale: "y",
      stroke: () => css(s.stroke),
      width: s.width ?? 1.5,
      dash: s.dash,
      points: { show: s.points ?? false },
      spanGaps: false,
      ...(s.points && { paths: () => null }),
    }))],
    hooks: {
      drawAxes: [paint.under],
      draw: [paint.over],
      setCursor: [(u) => {
        const index = u.cursor.idx;
        readout.textContent = index === null || index === undefined || !now.readout ? (now.rest ?? "") : now.readout(index);
        now.onCursor?.(index);
      }],
      setSelect: [(u) => {
        if (u.select.width > 8) {
          const low = u.posToVal(u.select.left, "x"), high = u.posToVal(u.select.left + u.select.width, "x");
          u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
          now.onWindow?.(low, high);
        }
      }],
    },
  };
  if (!now.onWindow) opts.cursor.drag = { x: false, y: false };
  readout.textContent = now.rest ?? "";
  const plot = new uPlot(opts, data(), box);

  const flat = (v) => (now.xAxis.log ? Math.log(v) : v), back = (v) => (now.xAxis.log ? Math.exp(v) : v);
  /** Put a range of the even scale in view; past either end of all there is it stops there, and is as wide as it was. */
  const show = (from, to) => {
    const all = xExtent();
    if (!all) return;
    const [start, end] = all.map(flat);
    if (to - from >= (end - start) * 0.999) return now.onMove(null, null);
    const by = Math.max(0, start - from) + Math.min(0, end - to);
    now.onMove(back(from + by), back(to + by));
  };

  plot.over.addEventListener("wheel", (event) => {
    const pinch = event.ctrlKey || event.metaKey;
    const sideways = event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY);
    if (!now.onMove || !(pinch || (sideways && now.window))) return;
    event.preventDefault();
    const [low, high] = xRange().map(flat);
    const turned = (event.deltaX || event.deltaY) * (event.deltaMode ? 24 : 1);
    const width = plot.over.clientWidth || 1;
    if (pinch) {
      const factor = Math.exp(Math.max(-240, Math.min(240, turned)) / 240);
      const here = low + (high - low) * Math.max(0, Math.min(1, (event.clientX - plot.over.getBoundingClientRect().left) / width));
      show(here - (here - low) * factor, here + (high - here) * factor);
    } else {
      const by = (turned / width) * (high - low);
      show(low + by, high + by);
    }
  }, { passive: false });
  if (now.onMove) {
    fingers.listen(plot.over, {
      range: () => (xExtent() ? xRange().map(flat) : null),
      zoomed: () => Boolean(now.window),
      show,
      whole: () => now.onWindow?.(null, null),
      read: (share) => plot.setCursor({ left: share * plot.over.clientWidth, top: plot.over.clientHeight / 2 }),
    });
  }

  const observer = new ResizeObserver(() => {
    const width = Math.max(200, box.clientWidth);
    if (width !== plot.width) plot.setSize({ width, height: now.height });
  });
  observer.observe(box);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const repaint = () => plot.redraw(false, true);
  dark.addEventListener("change", repaint);

  return {
    plot,
    /** Replace the data and whatever else of the spec is given; the axes' kinds stay. */
    update(change) {
      now = { ...now, ...change };
      plot.setData(data());
      if (plot.cursor.idx === null || plot.cursor.idx === undefined) readout.textContent = now.rest ?? "";
    },
    destroy() {
      observer.disconnect();
      dark.removeEventListener("change", repaint);
      plot.destroy();
      host.replaceChildren();
    },
  };
}

function clipped(u, draw) {
  const { ctx, bbox } = u;
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
  ctx.clip();
  draw();
  ctx.restore();
}

/** A line on its own grid; gaps where y is missing. */
function line(u, l) {
  stroke(u.ctx, () => {
    let pen = false;
    for (let i = 0; i < l.x.length; i++) {
      if (!finite(l.y[i])) { pen = false; continue; }
      const x = u.valToPos(l.x[i], "x", true), y = u.valToPos(l.y[i], "y", true);
      if (pen) u.ctx.lineTo(x, y); else u.ctx.moveTo(x, y);
      pen = true;
    }
  }, l.stroke, l.width ?? 1, l.dash);
}

function stroke(ctx, trace, color, width, dash) {
  ctx.beginPath();
  trace();
  ctx.strokeStyle = css(color);
  ctx.lineWidth = width * devicePixelRatio;
  ctx.lineJoin = "round";
  ctx.setLineDash((dash ?? []).map((v) => v * devicePixelRatio));
  ctx.stroke();
  ctx.setLineDash([]);
}

function dot(u, d) {
  const { ctx, bbox } = u;
  const r = devicePixelRatio;
  const x = u.valToPos(d.x, "x", true);
  const y = finite(d.y) ? u.valToPos(d.y, "y", true) : bbox.top + bbox.height - 9 * r;
  if (!finite(x) || !finite(y)) return;
  if (finite(d.low) && finite(d.high)) {
    const top = u.valToPos(d.high, "y", true), bottom = u.valToPos(d.low, "y", true);
    stroke(ctx, () => {
      ctx.moveTo(x, top); ctx.lineTo(x, bottom);
      for (const edge of [top, bottom]) { ctx.moveTo(x - 5 * r, edge); ctx.lineTo(x + 5 * r, edge); }
    }, d.stroke, 1.75);
  }
  const size = (d.size ?? 4.5) * r;
  ctx.beginPath();
  if (d.shape === "cross") {
    stroke(ctx, () => {
      ctx.moveTo(x - size, y - size); ctx.lineTo(x + size, y + size);
      ctx.moveTo(x - size, y + size); ctx.lineTo(x + size, y - size);
    }, d.stroke, 2);
    return;
  }
  if (d.shape === "diamond") {
    ctx.moveTo(x, y - size * 1.3); ctx.lineTo(x + size * 1.3, y); ctx.lineTo(x, y + size * 1.3); ctx.lineTo(x - size * 1.3, y);
    ctx.closePath();
  } else ctx.arc(x, y, size, 0, 2 * Math.PI);
  ctx.fillStyle = css(d.shape === "disc" ? d.stroke : "--card");
  ctx.fill();
  ctx.strokeStyle = css(d.shape === "disc" ? "--card" : d.stroke);
  ctx.lineWidth = (d.shape === "disc" ? 1.5 : 2) * r;
  ctx.stroke();
}

function dotLabel(u, d) {
  const { ctx, bbox } = u;
  const r = devicePixelRatio;
  const x = u.valToPos(d.x, "x", true);
  const y = finite(d.y) ? u.valToPos(d.y, "y", true) : bbox.top + bbox.height - 9 * r;
  ctx.save();
  ctx.font = `${d.bold ? 600 : 400} ${12 * r}px ${css("--sans")}`;
  const width = ctx.measureText(d.label).width;
  const side = d.side ?? (x + width + 14 * r > bbox.left + bbox.width ? "left" : "right");
  ctx.textAlign = side === "left" ? "right" : side === "right" ? "left" : "center";
  ctx.textBaseline = side === "above" ? "bottom" : side === "below" ? "top" : "middle";
  const dx = side === "left" ? -11 * r : side === "right" ? 11 * r : 0;
  const dy = side === "above" ? -10 * r : side === "below" ? 10 * r : 0;
  ctx.lineWidth = 4 * r;
  ctx.lineJoin = "round";
  ctx.strokeStyle = css("--card");
  ctx.strokeText(d.label, x + dx, y + dy);
  ctx.fillStyle = css(d.text ?? d.stroke);
  ctx.fillText(d.label, x + dx, y + dy);
  ctx.restore();
}

/** Vertical marks; a label that would run into the one before it drops a row. */
function marks(u, list) {
  const { ctx, bbox } = u;
  const r = devicePixelRatio;
  const rows = [];
  ctx.save();
  const shown = [...list].sort((a, b) => a.x - b.x).map((m) => [m, u.valToPos(m.x, "x", true)])
    .filter(([, x]) => finite(x) && x >= bbox.left - 1 && x <= bbox.left + bbox.width + 1);
  for (const [m, x] of shown) {
    stroke(ctx, () => { ctx.moveTo(x, bbox.top); ctx.lineTo(x, bbox.top + bbox.height); }, m.stroke ?? "--muted", m.width ?? 1.25, m.dash);
  }
  for (const [m, x] of shown) {
    if (!m.label) continue;
    ctx.font = `600 ${11.5 * r}px ${css("--sans")}`;
    const width = ctx.measureText(m.label).width;
    const flip = m.side === "left" ? x - width - 6 * r > bbox.left : x + width + 8 * r > bbox.left + bbox.width;
    const left = flip ? x - width - 6 * r : x + 6 * r;
    let row = rows.findIndex((end) => end < left);
    if (row < 0) row = rows.length;
    rows[row] = left + width + 8 * r;
    const y = bbox.top + (6 + row * 16) * r;
    ctx.textAlign = "left";
    ctx.textBaseline = "top";
    ctx.lineWidth = 4 * r;
    ctx.lineJoin = "round";
    ctx.strokeStyle = css("--card");
    ctx.strokeText(m.label, left, y);
    ctx.fillStyle = css(m.stroke ?? "--muted");
    ctx.fillText(m.label, left, y);
  }
  ctx.restore();
}

/**
 * A running mean over the last `width` points; gaps stay gaps. It looks back only, so that nothing shows before it
 * happened, and no further than an eighth of the way to the start, so that it does not lag behind the first plunge.
 */
export function smooth(values, width) {
  if (!(width > 1)) return values;
  let mean = 0, seen = 0;
  return values.map((v) => {
    if (!finite(v)) return null;
    seen += 1;
    const share = 2 / (Math.min(width, Math.max(1, seen / 8)) + 1);
    mean = seen === 1 ? v : mean + share * (v - mean);
    return mean;
  });
}

/**
 * The range of losses worth looking at: everything after the first `share` of the run, so that the plunge of the first
 * steps does not flatten the rest; of a run that is younger than that, most of what it has. A spike or a divergence comes
 * later and is always inside. `positive`: for an axis that is logarithmic.
 */
export function settled(x, lists, bands = [], { share = 0.04, positive = false } = {}) {
  return ([from, to]) => {
    const [start, end] = extent([x, ...bands.map((b) => b.x)]) ?? [0, 0];
    const young = x.length ? x[0] + (x.at(-1) - x[0]) * 0.3 : Infinity;
    const after = Math.max(from, Math.min(start + (end - start) * share, from + (to - from) * 0.5, young));
    let low = Infinity, high = -Infinity;
    const see = (xs, ys) => {
      for (let i = 0; i < xs.length; i++) {
        const v = ys[i];
        if (xs[i] >= after && xs[i] <= to && finite(v) && (!positive || v > 0)) { if (v < low) low = v; if (v > high) high = v; }
      }
    };
    for (const values of lists) see(x, values);
    for (const b of bands) { see(b.x, b.p05); see(b.x, b.p95); }
    return low <= high ? [low, high] : null;
  };
}

/** "2.41 (2.30 to 2.52)": a band's median and edges at x. */
export function bandText(band, x) {
  const middle = at(band.x, band.p50, x);
  if (middle === null) return "";
  return `${format.loss(middle)} (${format.loss(at(band.x, band.p05, x))} to ${format.loss(at(band.x, band.p95, x))})`;
}
