/** Refines a word by likes and dislikes, round by round. */

import { refined } from "../state.js";
import { html } from "../vendor/htm-preact.js";
import { Dialog } from "./dialog.js";

export function Refine({ word }) {
  return html`<${Dialog} title=${`Refine ${word.name}`} onClose=${() => refined.set(null)}><p>…</p><//>`;
}
