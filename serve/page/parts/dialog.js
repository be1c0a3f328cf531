/** A modal dialog: the browser's own, which keeps the focus inside and gives it back. */

import { html, useEffect, useRef } from "../vendor/htm-preact.js";
import { Icon } from "./icons.js";

export function Dialog({ title, onClose, className = "", onKeyDown, children }) {
  const ref = useRef();
  useEffect(() => {
    const before = document.activeElement;
    ref.current.showModal();
    return () => before?.isConnected && before.focus({ preventScroll: true });
  }, []);
  const pressed = useRef(false); // a press that began inside, as when text is selected, may end outside
  const onPress = (event) => (pressed.current = event.target === ref.current);
  const onBackdrop = (event) => pressed.current && event.target === ref.current && onClose();
  return html`
    <dialog
      ref=${ref}
      class=${`dialog ${className}`}
      aria-label=${title}
      onPointerDown=${onPress}
      onClick=${onBackdrop}
      onKeyDown=${onKeyDown}
      onCancel=${(event) => (event.preventDefault(), onClose())}
    >
      <div class="dialog-inside">
        <div class="dialog-head">
          <h2>${title}</h2>
          <button class="icon-button" aria-label="Close" onClick=${onClose}><${Icon} name="close" /></button>
        </div>
        ${children}
      </div>
    </dialog>
  `;
}
