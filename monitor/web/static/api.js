// The service, as the page asks it. A 401 anywhere means: sign in.

export class SignedOut extends Error {}

const spelled = { NaN: NaN, Infinity: Infinity, "-Infinity": -Infinity };

/** The number behind a JSON number, one of the wire's spellings, or null. */
export function number(v) {
  return v === null || v === undefined ? null : typeof v === "string" ? (spelled[v] ?? null) : v;
}

async function ask(path, options) {
  const answer = await fetch(path, { credentials: "same-origin", headers: { Accept: "application/json" }, ...options });
  if (answer.status === 401) throw new SignedOut();
  if (!answer.ok) {
    const said = await answer.json().catch(() => null);
    throw new Error(said?.error ?? `the service answered ${answer.status} to ${path.split("?")[0]}`);
  }
  return answer.status === 204 ? null : answer.json();
}

export const runs = async () => (await ask("/v1/runs")).runs;
export const run = (name) => ask(`/v1/runs/${encodeURIComponent(name)}`);

/**
 * Samples of a run as columns; `from` and `to` are steps. Non-finite losses are numbers again. Where samples are
 * thinned, `mean` is the mean loss of the bucket a sample stands for, if the service says it.
 */
export async function samples(name, { from, to, max, attempt } = {}) {
  const query = new URLSearchParams();
  for (const [key, v] of Object.entries({ from, to, max, attempt })) {
    if (v !== null && v !== undefined && Number.isFinite(v)) query.set(key, String(Math.round(v)));
  }
  const answer = await ask(`/v1/runs/${encodeURIComponent(name)}/samples?${query}`);
  return { thinned: Boolean(answer.thinned), columns: columns(answer.samples) };
}

const FIELDS = ["step", "loss", "tokens", "time", "attempt", "val_loss", "lr", "grad_norm", "tokens_per_s", "expected", "lower", "upper", "gap_sigma", "mean"];

export function columns(list) {
  const out = Object.fromEntries(FIELDS.map((f) => [f, new Array(list.length)]));
  list.forEach((s, i) => { for (const f of FIELDS) out[f][i] = number(s[f]); });
  return out;
}

/** Append columns whose steps come after what is there. */
export function extend(have, more) {
  const last = have.step.at(-1) ?? -Infinity;
  const start = more.step.findIndex((step) => step > last);
  if (start < 0) return have;
  return Object.fromEntries(FIELDS.map((f) => [f, have[f].concat(more[f].slice(start))]));
}

async function tell(method, path, body) {
  const answer = await fetch(path, {
    method, credentials: "same-origin", headers: { "Content-Type": "application/json" }, body: body ? JSON.stringify(body) : undefined,
  });
  if (answer.status === 401) throw new SignedOut();
  if (answer.status === 403) throw new Error("This token may look and not touch: `losscast monitor token create --store DIR --scope read,operate` makes one that may.");
  if (!answer.ok) throw new Error(((await answer.json().catch(() => null)) ?? {}).error ?? `the service answered ${answer.status}`);
}

const of = (name) => `/v1/runs/${encodeURIComponent(name)}`;
/** Silence a run's alerts for so many seconds; null lets them sound again. */
export const mute = (name, for_s) => (for_s === null ? tell("DELETE", `${of(name)}/mute`) : tell("POST", `${of(name)}/mute`, { for_s }));
/** Acknowledge the advice, for so many seconds or, with null, until it changes; `take` takes it back. */
export const see = (name, for_s, take = false) => (take ? tell("DELETE", `${of(name)}/advice`) : tell("POST", `${of(name)}/advice`, for_s === null ? {} : { for_s }));
export const laws = async () => (await ask("/v1/laws")).laws;

export async function signIn(token) {
  const answer = await fetch("/session", {
    method: "POST", credentials: "same-origin", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ token }),
  });
  if (answer.status === 401 || answer.status === 403) return false;
  if (!answer.ok) throw new Error(`the service answered ${answer.status}`);
  return true;
}

export const signOut = () => fetch("/session", { method: "DELETE", credentials: "same-origin" });

/**
 * Run summaries as they change. `hear(summary)`, `state("live" | "waiting" | "signed out")`. Returns a function that ends it.
 * A stream that breaks is opened again by the browser; one that is answered with anything but 200 (a session that is over, too many
 * streams, a proxy whose monitor restarts) it gives up for good, and then that is done here.
 */
export function listen(hear, state) {
  let source = null, again = 0, wait = 1000, ended = false;
  async function reopen() {
    try {
      await ask("/v1/openapi.json"); // whatever wants a session and costs nothing
    } catch (error) {
      if (error instanceof SignedOut) return ended || state("signed out");
    }
    if (!ended) open();
  }
  function open() {
    source = new EventSource("/v1/stream");
    source.onopen = () => { wait = 1000; state("live"); };
    source.onerror = () => {
      state("waiting");
      if (ended || source.readyState !== EventSource.CLOSED) return;
      again = setTimeout(reopen, wait * (1 + Math.random()));
      wait = Math.min(2 * wait, 30000);
    };
    source.onmessage = take;
    for (const name of ["run", "runs", "summary"]) source.addEventListener(name, take);
  }
  const take = (event) => {
    try {
      const said = JSON.parse(event.data);
      for (const summary of Array.isArray(said.runs) ? said.runs : [said]) if (summary.run) hear(summary);
    } catch { /* a line that is no summary is passed over */ }
  };
  open();
  return () => { ended = true; clearTimeout(again); source.close(); };
}
