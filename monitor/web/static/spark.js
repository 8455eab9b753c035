// A run's loss in 132 by 32 pixels: enough to see whether it falls, flattens or blows up. Drawn when it comes into view.
import * as api from "./api.js";
import { css } from "./charts.js";
import { el } from "./dom.js";

const WIDTH = 132, HEIGHT = 32, AT_ONCE = 3;
const known = new Map();
const waiting = [];
let busy = 0;

const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    seen.unobserve(entry.target);
    waiting.push(entry.target);
  }
  next();
});

function next() {
  while (busy < AT_ONCE && waiting.length) {
    const canvas = waiting.shift();
    if (!canvas.isConnected) continue;
    busy += 1;
    const name = canvas.dataset.spark;
    api.samples(name, { max: 160 })
      .then(({ columns }) => { known.set(name, { columns, step: Number(canvas.dataset.step), time: Date.now() }); paint(canvas, columns); }, () => {})
      .finally(() => { busy -= 1; next(); });
  }
}

/** The run's picture; asked for again when it is half a minute old and the run has moved. */
export function spark(run) {
  const canvas = el("canvas", { class: "spark", width: WIDTH * devicePixelRatio, height: HEIGHT * devicePixelRatio, "data-spark": run.run, "data-step": run.step ?? 0, "aria-hidden": true });
  const have = known.get(run.run);
  if (have) paint(canvas, have.columns);
  if (run.step > 0 && (!have || (have.step !== run.step && Date.now() - have.time > 30000))) seen.observe(canvas);
  return canvas;
}

function paint(canvas, { step, loss, expected }) {
  const ctx = canvas.getContext("2d");
  const r = devicePixelRatio;
  ctx.clearRect(0, 0, canvas.width, canvas.height);
  const start = step[0], end = step.at(-1);
  const from = start + (end - start) * 0.04;
  const values = loss.filter((v, i) => Number.isFinite(v) && v > 0 && step[i] >= from).map(Math.log);
  if (values.length < 2) return;
  const low = Math.min(...values), high = Math.max(...values);
  const x = (s) => 2 * r + ((s - start) / (end - start || 1)) * (canvas.width - 4 * r);
  const y = (v) => canvas.height - 3 * r - ((Math.log(v) - low) / (high - low || 1)) * (canvas.height - 6 * r);
  const trace = (list, color, width) => {
    let pen = false;
    ctx.beginPath();
    list.forEach((v, i) => {
      if (!Number.isFinite(v) || v <= 0 || step[i] < from) { pen = false; return; }
      if (pen) ctx.lineTo(x(step[i]), y(v)); else ctx.moveTo(x(step[i]), y(v));
      pen = true;
    });
    ctx.strokeStyle = css(color);
    ctx.lineWidth = width * r;
    ctx.lineJoin = "round";
    ctx.stroke();
  };
  trace(expected, "--predicted", 1);
  trace(loss, "--actual", 1.25);
  ctx.fillStyle = css("--bad");
  loss.forEach((v, i) => { if (v !== null && !Number.isFinite(v)) ctx.fillRect(x(step[i]) - r, canvas.height - 5 * r, 2 * r, 5 * r); });
}
