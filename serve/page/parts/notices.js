/** Short messages at the bottom. */

import { dismiss, notices } from "../state.js";
import { html } from "../vendor/htm-preact.js";
import { useStore } from "../hooks.js";
import { Icon } from "./icons.js";

export function Notices() {
  return html`
    <div class="notices" role="status">
      ${useStore(notices).map(
        ({ id, text, bad }) => html`<p key=${id} class=${`notice ${bad ? "bad" : ""}`}>
          <span>${text}</span>
          <button class="icon-button" aria-label="Dismiss" onClick=${() => dismiss(id)}><${Icon} name="close" /></button>
        </p>`,
      )}
    </div>
  `;
}
