/** A button that opens a small list of commands. */

import { html, useEffect, useRef, useState } from "../vendor/htm-preact.js";

export function Menu({ label, button, className = "icon-button", items }) {
  const [open, setOpen] = useState(false);
  const root = useRef();
  const trigger = useRef();
  const options = () => [...root.current.querySelectorAll('[role="menuitem"]')];
  useEffect(() => {
    if (!open) return;
    options()[0]?.focus();
    const outside = (event) => !root.current.contains(event.target) && setOpen(false);
    document.addEventListener("pointerdown", outside);
    return () => document.removeEventListener("pointerdown", outside);
  }, [open]);
  const close = () => (setOpen(false), trigger.current.focus());
  const onKeyDown = (event) => {
    if (!open) return;
    const all = options();
    const at = all.indexOf(document.activeElement);
    if (event.key === "Escape") close();
    else if (event.key === "ArrowDown") all[(at + 1) % all.length].focus();
    else if (event.key === "ArrowUp") all[(at + all.length - 1) % all.length].focus();
    else if (event.key === "Home") all[0].focus();
    else if (event.key === "End") all.at(-1).focus();
    else if (event.key === "Tab") return setOpen(false);
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  return html`
    <div class="menu" ref=${root} onKeyDown=${onKeyDown}>
      <button ref=${trigger} type="button" class=${className} aria-haspopup="menu" aria-expanded=${open ? "true" : "false"}
        aria-label=${label} title=${label} onClick=${() => setOpen(!open)}>${button}</button>
      ${open &&
      html`<div class="menu-list" role="menu" aria-label=${label}>
        ${items.map(({ text, run }) => html`<button key=${text} type="button" role="menuitem" tabindex="-1" onClick=${() => (close(), run())}>${text}</button>`)}
      </div>`}
    </div>
  `;
}
