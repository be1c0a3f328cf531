/** A place for files: dropping, choosing, pasting, and the keyboard. Not what happens to them. */

import { html, useRef, useState } from "../vendor/htm-preact.js";
import { Icon } from "./icons.js";

export function DropZone({ label, hint, accept = "image/png,image/jpeg,image/webp,image/*", multiple = true, onFiles, compact }) {
  const input = useRef();
  const [over, setOver] = useState(false);
  const take = (files) => files?.length && onFiles([...files]);
  return html`
    <div
      class=${`drop ${over ? "over" : ""} ${compact ? "compact" : ""}`}
      onDragOver=${(event) => (event.preventDefault(), setOver(true))}
      onDragLeave=${() => setOver(false)}
      onDrop=${(event) => {
        event.preventDefault();
        event.stopPropagation();
        setOver(false);
        take(event.dataTransfer.files);
      }}
    >
      <input
        ref=${input}
        type="file"
        class="hidden"
        accept=${accept}
        multiple=${multiple}
        aria-label=${label}
        onChange=${() => {
          take(input.current.files);
          input.current.value = "";
        }}
      />
      <span class="drop-icon"><${Icon} name="upload" /></span>
      <strong aria-hidden="true">${label}</strong>
      ${hint && html`<span class="quiet">${hint}</span>`}
    </div>
  `;
}
