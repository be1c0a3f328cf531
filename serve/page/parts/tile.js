/** One picture of a run: waiting, drawing with a live preview, done, failed or cancelled. */

import { viewed } from "../state.js";
import { html } from "../vendor/htm-preact.js";
import { Icon } from "./icons.js";

export function Tile({ tile, recipe, siblings, label = "" }) {
  const ratio = { aspectRatio: `${recipe.width ?? 1} / ${recipe.height ?? 1}` };
  const name = `${label ? `${label}, ` : ""}seed ${tile.seed}`;
  if (tile.status === "done") return html`<${DoneTile} picture=${tile.picture} name=${name} siblings=${siblings} ratio=${ratio} />`;
  return html`
    <figure class=${`tile ${tile.status}`} style=${ratio} aria-label=${`Picture with ${name}: ${describe(tile)}`}>
      ${tile.preview && html`<img class="preview" src=${tile.preview} alt="" />`}
      <${Cover} tile=${tile} />
    </figure>
  `;
}

export function DoneTile({ picture, name, siblings, ratio, lazy = false }) {
  const open = () => viewed.set({ picture, siblings: siblings ?? [picture] });
  return html`
    <figure class="tile done" style=${ratio}>
      <button class="tile-open" aria-label=${`Open the picture with ${name}`} onClick=${open}>
        <img src=${picture.url} alt=${picture.recipe.prompt} loading=${lazy ? "lazy" : undefined} />
      </button>
    </figure>
  `;
}

function Cover({ tile }) {
  if (tile.status === "running") {
    return html`<progress class="tile-progress" max=${tile.steps || 1} value=${tile.step} aria-label="Steps done"></progress>`;
  }
  const icon = { waiting: null, failed: "close", cancelled: "stop" }[tile.status];
  return html`<figcaption class="tile-note">${icon && html`<${Icon} name=${icon} />`}<span>${describe(tile)}</span></figcaption>`;
}

function describe(tile) {
  if (tile.status === "running") return `step ${tile.step} of ${tile.steps}`;
  return { waiting: "Waiting", failed: "Failed", cancelled: "Cancelled", done: "Ready" }[tile.status];
}
