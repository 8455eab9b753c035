// A view as files: PNG of what is drawn, CSV of every sample in view.
import * as api from "./api.js";
import { css } from "./charts.js";

function save(blob, name) {
  const a = document.createElement("a");
  a.href = URL.createObjectURL(blob);
  a.download = name;
  a.click();
  setTimeout(() => URL.revokeObjectURL(a.href), 10000);
}

/** The charts under one another, with a title, on the page's own background. */
export function savePng(plots, title, name) {
  const r = devicePixelRatio;
  const pad = 18 * r, head = 44 * r;
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(...plots.map((p) => p.ctx.canvas.width)) + 2 * pad;
  canvas.height = plots.reduce((sum, p) => sum + p.ctx.canvas.height, 0) + head + pad;
  const ctx = canvas.getContext("2d");
  ctx.fillStyle = css("--card");
  ctx.fillRect(0, 0, canvas.width, canvas.height);
  ctx.fillStyle = css("--ink");
  ctx.font = `600 ${16 * r}px ${css("--sans")}`;
  ctx.textBaseline = "middle";
  ctx.fillText(title, pad, head / 2 + 2 * r);
  let y = head;
  for (const p of plots) { ctx.drawImage(p.ctx.canvas, pad, y); y += p.ctx.canvas.height; }
  canvas.toBlob((blob) => save(blob, name), "image/png");
}

const COLUMNS = ["step", "loss", "tokens", "time", "attempt", "val_loss", "lr", "grad_norm", "tokens_per_s", "expected", "lower", "upper", "gap_sigma"];

/** Every sample from one step to another; losscast's own curve format, so that `losscast replay` reads it. */
export async function saveCsv(run, from, to) {
  const { columns } = await api.samples(run, { from, to });
  const lines = [["run", ...COLUMNS].join(",")];
  columns.step.forEach((_, i) => lines.push([run, ...COLUMNS.map((c) => columns[c][i] ?? "")].join(",")));
  save(new Blob([lines.join("\n"), "\n"], { type: "text/csv" }), `${run}.csv`);
}
