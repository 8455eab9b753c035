// The whole state of a view lives in the address, so that a link shows a colleague exactly what you see.
// Values are taken from fixed lists or parsed as numbers; anything else falls back to its default.

const RUN = /^[a-z0-9][a-z0-9-]{0,62}$/;
const LISTS = {
  view: ["runs", "run", "compare", "law"],
  x: ["steps", "tokens", "time"],
  by: ["tokens", "steps", "time"],
  xs: ["linear", "log"],
  ys: ["log", "linear"],
  show: ["all", "running", "alerts", "ended"],
};
const NUMBERS = { smooth: [0, 10000], from: [-1e18, 1e18], to: [-1e18, 1e18] };

/** The state an address stands for. */
export function parse(search) {
  const query = new URLSearchParams(search);
  const state = {};
  for (const [name, values] of Object.entries(LISTS)) state[name] = values.includes(query.get(name)) ? query.get(name) : values[0];
  for (const [name, [low, high]] of Object.entries(NUMBERS)) {
    const v = Number(query.get(name));
    state[name] = query.has(name) && Number.isFinite(v) && v >= low && v <= high ? v : null;
  }
  state.run = RUN.test(query.get("run") ?? "") ? query.get("run") : null;
  state.runs = (query.get("runs") ?? "").split(",").filter((name) => RUN.test(name)).slice(0, 8);
  state.law = /^[0-9a-f]{8,64}$/.test(query.get("law") ?? "") ? query.get("law") : null;
  state.find = (query.get("find") ?? "").slice(0, 100);
  if (state.run && !query.has("view")) state.view = "run";
  if (state.view === "run" && !state.run) state.view = "runs";
  return state;
}

/** The address of a state: only what differs from the default, in a fixed order. */
export function address(state) {
  const query = new URLSearchParams();
  for (const [name, values] of Object.entries(LISTS)) {
    if (name === "view" ? !["runs", "run"].includes(state.view) : state[name] && state[name] !== values[0]) query.set(name, state[name]);
  }
  if (state.run && state.view === "run") query.set("run", state.run);
  if (state.runs?.length) query.set("runs", state.runs.join(","));
  if (state.law && state.view === "law") query.set("law", state.law);
  if (state.find) query.set("find", state.find);
  for (const name of Object.keys(NUMBERS)) if (state[name] !== null && state[name] !== undefined) query.set(name, String(+Number(state[name]).toPrecision(12)));
  const text = query.toString();
  return text ? `/?${text}` : "/";
}

/** The address of one run, with the axes that are chosen now and without the zoom. */
export function runAddress(run, state = {}) {
  return address({ x: state.x, xs: state.xs, ys: state.ys, smooth: state.smooth, view: "run", run });
}
