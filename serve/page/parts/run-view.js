/** A run on the create page: its prompt, its state, its pictures. */

import { randomSeed } from "../recipe.js";
import { isActive } from "../run.js";
import { cancel, dismiss, start } from "../runs.js";
import { edit } from "../state.js";
import { html } from "../vendor/htm-preact.js";
import { CopyMenu } from "./copy-menu.js";
import { Icon } from "./icons.js";
import { Marked } from "./marked.js";
import { Tile } from "./tile.js";

export function RunView({ run }) {
  const { recipe } = run;
  const active = isActive(run);
  const siblings = run.tiles.filter((tile) => tile.picture).map((tile) => tile.picture);
  const failure = run.tiles.find((tile) => tile.status === "failed")?.message;
  return html`
    <section class="run" aria-label=${`Pictures of: ${recipe.prompt}`} aria-busy=${active ? "true" : "false"}>
      <header class="run-head">
        <h2 class="run-prompt"><${Marked} text=${recipe.prompt} /></h2>
        <div class="run-actions">
          ${active
            ? html`<button class="button small" onClick=${() => cancel(run.id)}><${Icon} name="stop" /> Cancel</button>`
            : html`
                <button class="icon-button" title="Again, with new seeds" aria-label="Again, with new seeds"
                  onClick=${() => start({ ...recipe, seed: randomSeed() })}><${Icon} name="repeat" /></button>
                <button class="icon-button" title="Edit this prompt and its settings" aria-label="Edit this prompt and its settings"
                  onClick=${() => edit(recipe)}><${Icon} name="rename" /></button>
                <${CopyMenu} recipe=${recipe} />
                <button class="icon-button" title="Remove from this page" aria-label="Remove from this page"
                  onClick=${() => dismiss(run.id)}><${Icon} name="close" /></button>
              `}
        </div>
      </header>
      ${run.label && html`<p class="quiet run-label">${run.label}</p>`}
      ${run.note && html`<p class="note" role="status">${run.note}</p>`}
      ${failure &&
      html`<p class="note bad" role="alert">
        ${failure} <button class="link" onClick=${() => (dismiss(run.id), start(recipe))}>Try again</button>
      </p>`}
      <div class="tiles">
        ${run.tiles.map((tile) => html`<${Tile} key=${tile.index} tile=${tile} recipe=${recipe} siblings=${siblings} />`)}
      </div>
    </section>
  `;
}
