// Elements, made one way only: names and text. Nothing here parses HTML, so nothing a client sent can become any.

/** el("p", {class: "muted", onclick: f}, "text", child, null) */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat().filter((c) => c !== null && c !== undefined && c !== false).map((c) => (c instanceof Node ? c : String(c))));
  return node;
}

/** Put text into a node only where it changed, so that live updates move nothing that stayed. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** A link inside the page: the address of a view, which a new tab can open too. */
export function link(href, attributes, ...children) {
  return el("a", { href, "data-link": true, ...attributes }, ...children);
}

/** A row of buttons of which one is pressed. */
export function choice(label, options, chosen, pick) {
  return el("div", { class: "buttons", role: "group", "aria-label": label },
    options.map(([value, name]) => el("button", {
      type: "button", "aria-pressed": String(value === chosen), onclick: () => pick(value),
    }, name ?? value)));
}
