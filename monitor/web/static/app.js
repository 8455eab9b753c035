// The page: one header, one view at a time, live by server-sent events. Views are modules with
// `open(host, context)` that return {shown(), hear(summary), close(), key(name)}; all but close() may be left out.
import * as api from "./api.js";
import { address, parse } from "./address.js";
import { el, link, say } from "./dom.js";
import { bindKeys } from "./keys.js";
import * as compare from "./compare.js";
import * as law from "./law.js";
import * as run from "./run.js";
import * as runs from "./runs.js";

const VIEWS = { runs, run, compare, law };
const main = document.getElementById("main");
const live = document.getElementById("live");
const leave = document.getElementById("leave");

let state = parse(location.search);
let view = null;
let opened = 0;
let hush = null;

const context = {
  get state() { return state; },
  /** Change the state and with it the address, unless that is to wait; `quiet` keeps the view that stands. */
  go(change, { quiet = false, replace = false, address: written = true } = {}) {
    state = { ...state, ...change };
    if (written) history[replace ? "replaceState" : "pushState"](null, "", address(state));
    if (!quiet) show();
  },
  fail(error) {
    if (error instanceof api.SignedOut) return signIn();
    say(live, `trouble: ${error.message}`);
    live.className = "live bad";
  },
};

function navigation() {
  const nav = document.getElementById("nav");
  nav.replaceChildren(...[["runs", "Runs"], ["compare", "Compare"], ["law", "Law"]].map(([name, text]) =>
    link(address({ view: name, runs: state.runs }), { "aria-current": state.view === name || (name === "runs" && state.view === "run") ? "page" : null }, text)));
}

async function show() {
  const mine = ++opened;
  view?.close();
  view = null;
  navigation();
  document.title = state.view === "run" ? `${state.run} · losscast` : "losscast";
  const host = el("div", { class: `view view-${state.view}` });
  try {
    const next = await VIEWS[state.view].open(host, context);
    if (mine !== opened) return next.close();
    view = next;
    main.replaceChildren(host);
    next.shown?.();
    leave.hidden = false;
    hush ??= api.listen((summary) => view?.hear?.(summary), (now) => {
      if (now === "signed out") return signIn();
      say(live, now === "live" ? "live" : "reconnecting");
      live.className = `live ${now === "live" ? "good" : "warn"}`;
    });
  } catch (error) {
    if (mine !== opened) return;
    if (error instanceof api.SignedOut) return signIn();
    main.replaceChildren(el("p", { class: "empty" }, `This could not be read: ${error.message}`,
      el("br"), el("button", { class: "plain", type: "button", onclick: show }, "try again")));
  }
}

function signIn() {
  opened++;
  view?.close();
  view = null;
  hush?.();
  hush = null;
  say(live, "");
  leave.hidden = true;
  document.getElementById("nav").replaceChildren();
  const token = el("input", { id: "token", type: "password", autocomplete: "current-password", spellcheck: "false", required: true });
  const said = el("p", { class: "bad", role: "alert" });
  const form = el("form", {
    class: "card signin",
    onsubmit: async (event) => {
      event.preventDefault();
      try {
        if (await api.signIn(token.value.trim())) return show();
        say(said, "The service does not know this token. Was it revoked, or cut off when it was copied?");
      } catch (error) {
        say(said, `The service could not be reached: ${error.message}`);
      }
      token.select();
    },
  },
  el("h1", {}, "Sign in"),
  el("p", { class: "muted" }, "With a token that may read. Whoever runs the monitor makes one with"),
  el("pre", {}, "losscast monitor token create --store DIR --scope read"),
  el("label", { for: "token" }, "Token"), token, said,
  el("button", { class: "primary", type: "submit" }, "Sign in"));
  main.replaceChildren(form);
  token.focus();
}

document.addEventListener("click", (event) => {
  const a = event.target.closest?.("a[data-link]");
  if (!a || event.defaultPrevented || event.button || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
  event.preventDefault();
  state = parse(new URL(a.href).search);
  history.pushState(null, "", a.getAttribute("href"));
  scrollTo(0, 0);
  show();
});
addEventListener("popstate", () => { state = parse(location.search); show(); });
leave.addEventListener("click", async () => { await api.signOut(); signIn(); });
bindKeys(context, (name) => view?.key?.(name));
show();
