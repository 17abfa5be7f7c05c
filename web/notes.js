/* Notes of a node that runs: one short line on it, however many there are; all of them on hover and on click. */

import { mount } from "./graph.js";

const NAME = "self_forcing_notes";
const HEIGHT = 22;
const STYLE = `
.self-forcing-note { display: block; flex: none !important; width: 100%; height: ${HEIGHT}px; padding: 0 6px;
  border: 0; border-radius: 4px; background: #0004; color: var(--input-text, #ddd); font: 11px sans-serif;
  text-align: left; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; cursor: pointer; }
.self-forcing-notes { position: fixed; margin: 0; max-width: 420px; padding: 8px 12px; border: 1px solid #666;
  border-radius: 6px; background: #222; color: #ddd; font: 12px sans-serif; white-space: pre-line; }`;

const create = (tag, properties) => Object.assign(document.createElement(tag), properties);

/** Shows notes on a node of that name, in place of those before. */
export function showNotes(node, name, text) {
  const widget = node.widgets?.find((other) => other.name === NAME) ?? addWidget(node);
  const lines = text.split("\n");
  widget.element.textContent = lines.length > 1 ? `${lines.length} notes: ${lines[0]}` : lines[0];
  widget.element.title = text;
  mount(widget.element, name);
  node.setDirtyCanvas?.(true, true);
}

function addWidget(node) {
  const id = "self-forcing-notes-style";
  document.getElementById(id) ?? document.head.append(create("style", { id, textContent: STYLE }));
  const element = create("button", { type: "button", className: "self-forcing-note" });
  element.addEventListener("click", () => open(element));
  const widget = node.addDOMWidget(NAME, NAME, element, {
    serialize: false, hideInPanel: true, hideOnZoom: false, margin: 4,
  });
  widget.serialize = false;
  widget.computeLayoutSize = undefined; // it would share what room there is with the others
  widget.computeSize = (width) => [width, HEIGHT + 8];
  return widget;
}

/** All of the notes, above everything; the next click elsewhere, or Escape, closes them. */
function open(element) {
  const all = create("div", { className: "self-forcing-notes", popover: "auto", textContent: element.title });
  const escape = ({ key }) => key === "Escape" && all.hidePopover();
  document.addEventListener("keydown", escape, { capture: true }); // the graph's canvas may keep it to itself
  all.addEventListener("toggle", ({ newState }) => {
    if (newState !== "closed") return;
    document.removeEventListener("keydown", escape, { capture: true });
    all.remove();
  });
  document.body.append(all);
  const { left, bottom } = element.getBoundingClientRect();
  all.showPopover();
  all.style.left = `${Math.min(left, innerWidth - all.offsetWidth - 8)}px`;
  all.style.top = `${Math.min(bottom + 4, innerHeight - all.offsetHeight - 8)}px`;
}
