/* Notes of a node that runs: one short line on it, however many there are; all of them on hover and on click. */

const NAME = "self_forcing_notes";
const HEIGHT = 22;
const STYLE = `
.self-forcing-note { display: block; width: 100%; height: ${HEIGHT}px; min-height: ${HEIGHT}px; padding: 0 6px;
  border: 0; border-radius: 4px; background: #0004; color: var(--input-text, #ddd); font: 11px sans-serif;
  text-align: left; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; cursor: pointer; }
.self-forcing-notes { position: fixed; margin: 0; max-width: 420px; padding: 8px 12px; border: 1px solid #666;
  border-radius: 6px; background: #222; color: #ddd; font: 12px sans-serif; white-space: pre-line; }`;

const create = (tag, properties) => Object.assign(document.createElement(tag), properties);

/** Shows notes on a node, in place of those before. */
export function showNotes(node, text) {
  const widget = node.widgets?.find(({ name }) => name === NAME) ?? addWidget(node);
  const [first, ...rest] = text.split("\n");
  widget.element.textContent = rest.length ? `${first} (+${rest.length})` : first;
  widget.element.title = text;
  node.setDirtyCanvas?.(true, true);
}

function addWidget(node) {
  const id = "self-forcing-notes-style";
  document.getElementById(id) ?? document.head.append(create("style", { id, textContent: STYLE }));
  const element = create("button", { type: "button", className: "self-forcing-note" });
  element.addEventListener("click", () => open(element));
  const widget = node.addDOMWidget(NAME, NAME, element, {
    serialize: false, hideInPanel: true, hideOnZoom: false, margin: 4,
    getMinHeight: () => HEIGHT + 8, getMaxHeight: () => HEIGHT + 8,
  });
  widget.serialize = false;
  return widget;
}

/** All of the notes, above everything; the next click elsewhere, or Escape, closes them. */
function open(element) {
  const all = create("div", { className: "self-forcing-notes", popover: "auto", textContent: element.title });
  all.addEventListener("toggle", ({ newState }) => newState === "closed" && all.remove());
  document.body.append(all);
  const { left, bottom } = element.getBoundingClientRect();
  all.showPopover();
  all.style.left = `${Math.min(left, innerWidth - all.offsetWidth - 8)}px`;
  all.style.top = `${Math.min(bottom + 4, innerHeight - all.offsetHeight - 8)}px`;
}
