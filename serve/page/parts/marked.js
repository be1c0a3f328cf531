/** A prompt with its learned words marked, as with a highlighter. */

import { pieces } from "../prompt.js";
import { html } from "../vendor/htm-preact.js";

export const Marked = ({ text }) =>
  pieces(text).map(({ text, name }) => (name ? html`<mark class="word">${name}</mark>` : text));

/** A word on its own. */
export const Word = ({ name }) => html`<mark class="word">${name}</mark>`;
