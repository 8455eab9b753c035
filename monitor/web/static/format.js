// Numbers as people read them. Every function takes null, undefined or NaN and answers with a dash.

const missing = (v) => v === null || v === undefined || (typeof v === "number" && Number.isNaN(v));

/** A loss in nats per token, to four digits after the point where it is small. */
export function loss(v) {
  if (missing(v)) return "–";
  if (typeof v === "string") return v;
  if (!Number.isFinite(v)) return v > 0 ? "Infinity" : "-Infinity";
  const size = Math.abs(v);
  return size >= 1000 ? v.toExponential(2) : v.toFixed(size >= 100 ? 1 : size >= 10 ? 3 : 4);
}

/** A whole count with separators: 12,345. */
export function count(v) {
  return missing(v) ? "–" : Math.round(v).toLocaleString("en-US");
}

/** A large count with its letter: 1.2k, 3.4M, 2.5B. Ticks of an axis that is zoomed in need more digits. */
export function short(v, digits = 3) {
  if (missing(v)) return "–";
  const size = Math.abs(v);
  if (size < 1000) return String(+v.toPrecision(digits));
  for (const [unit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= unit * 0.9995) return size >= unit * 1e3 ? power(v) : `${+(v / unit).toPrecision(digits)}${letter}`;
  }
  return power(v);
}

const raised = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };

/** A number as a power of ten: 3×10¹². */
export function power(v) {
  if (missing(v)) return "–";
  const [digits, exponent] = v.toExponential(2).split("e");
  const tens = "10" + [...String(Number(exponent))].map((c) => raised[c]).join("");
  return Number(digits) === 1 ? tens : `${Number(digits)}×${tens}`;
}

/** Seconds as two of days, hours, minutes and seconds. */
export function duration(s) {
  if (missing(s)) return "–";
  const v = Math.abs(s);
  if (v < 1) return s === 0 ? "0 s" : `${Math.round(v * 1000)} ms`;
  if (v < 90) return `${+v.toPrecision(v < 10 ? 2 : 3)} s`;
  const parts = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const at = parts.findIndex(([, unit]) => v >= unit);
  const [big, bigUnit] = parts[at];
  const whole = Math.floor(v / bigUnit);
  const rest = parts[at + 1] ? Math.floor((v - whole * bigUnit) / parts[at + 1][1]) : 0;
  return rest ? `${whole} ${big} ${rest} ${parts[at + 1][0]}` : `${whole} ${big}`;
}

/** How long ago a moment was; seconds since the epoch. */
export function ago(time, now = Date.now() / 1000) {
  if (missing(time)) return "–";
  const s = now - time;
  if (s < -60) return `in ${duration(-s)}`;
  return s < 5 ? "now" : `${duration(s < 90 ? Math.floor(s) : 60 * Math.floor(s / 60))} ago`;
}

/** A share from 0 to 1 as a percentage. */
export function percent(v) {
  if (missing(v)) return "–";
  const p = v * 100;
  return `${p > 0 && p < 1 ? "<1" : p < 100 && p > 99 ? ">99" : Math.round(p)}%`;
}

export function money(v) {
  return missing(v) ? "–" : `$${v < 100 ? v.toFixed(2) : count(v)}`;
}

/** A signed difference. */
export function signed(v, digits = 1) {
  if (missing(v) || typeof v === "string") return v ?? "–";
  const size = Math.abs(v);
  return `${v > 0 ? "+" : v < 0 ? "−" : ""}${size >= 1e6 ? size.toExponential(1) : size.toFixed(digits)}`;
}
