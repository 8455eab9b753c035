// The keyboard: ? for help, / to find, j and k to move, g then a letter to go somewhere.
import { el } from "./dom.js";

const KEYS = [
  ["?", "this list"],
  ["/", "find a run"],
  ["j k", "next, previous run"],
  ["Enter", "open the run"],
  ["g r", "go to the runs"],
  ["g c", "go to compare"],
  ["g l", "go to the law"],
  ["x", "next x axis: steps, tokens, time"],
  ["l", "logarithmic or linear x"],
  ["y", "logarithmic or linear loss"],
  ["+ -", "zoom in, zoom out"],
  ["← →", "move to earlier, later steps"],
  ["0", "the whole run"],
  ["Esc", "close, leave a field"],
];

export function bindKeys(context, tell) {
  const dialog = document.getElementById("keys");
  dialog.append(
    el("h2", {}, "Keyboard"),
    el("dl", {}, KEYS.map(([key, what]) => el("div", {}, el("dt", {}, key.split(" ").map((k) => el("kbd", {}, k))), el("dd", {}, what)))),
    el("form", { method: "dialog" }, el("button", { class: "plain" }, "close")),
  );
  const help = () => (dialog.open ? dialog.close() : dialog.showModal());
  document.getElementById("help").addEventListener("click", help);

  let going = 0;
  document.addEventListener("keydown", (event) => {
    const field = event.target.closest?.("input, textarea, select");
    if (field) {
      if (event.key === "Escape") field.blur();
      return;
    }
    if (event.metaKey || event.ctrlKey || event.altKey) return;
    if (event.key === "?") return help();
    if (dialog.open) return;
    if (going && Date.now() - going < 1500) {
      going = 0;
      const view = { r: "runs", c: "compare", l: "law" }[event.key];
      if (view) context.go({ view, run: null, from: null, to: null });
      return;
    }
    if (event.key === "g") { going = Date.now(); return; }
    if (["ArrowLeft", "ArrowRight", "+", "-"].includes(event.key) && tell(event.key)) event.preventDefault();
    if (["/", "j", "k", "x", "l", "y", "0"].includes(event.key)) {
      event.preventDefault();
      tell(event.key);
    }
  });
}
