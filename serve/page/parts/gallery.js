/** The gallery: what was made in this browser, and a place to drop a picture to get its settings back. */

import * as gallery from "../gallery.js";
import { useStore } from "../hooks.js";
import { go } from "../state.js";
import { size } from "../time.js";
import { html, useState } from "../vendor/htm-preact.js";
import { Dialog } from "./dialog.js";
import { Icon } from "./icons.js";
import { DoneTile } from "./tile.js";

const PAGE = 60;

export function Gallery() {
  const all = useStore(gallery.pictures);
  const fleeting = useStore(gallery.volatile);
  const [search, setSearch] = useState("");
  const [limit, setLimit] = useState(PAGE);
  const [asking, setAsking] = useState(false);
  const found = (all ?? []).filter(({ recipe }) => recipe.prompt.toLowerCase().includes(search.toLowerCase()));
  const bytes = (all ?? []).reduce((sum, picture) => sum + gallery.bytesOf(picture), 0);
  return html`
    <header class="section-head">
      <h1 tabindex="-1" class="title">Gallery</h1>
      ${all?.length > 0 &&
      html`<div class="row">
        <input type="search" class="search" aria-label="Search prompts" placeholder="Search prompts" value=${search} onInput=${(event) => setSearch(event.target.value)} />
        <button class="icon-button" aria-label="Empty the gallery" title="Empty the gallery" onClick=${() => setAsking(true)}><${Icon} name="trash" /></button>
      </div>`}
    </header>
    ${fleeting && html`<p class="note">The browser does not store new pictures. They last until you close this page: download those that you want to keep.</p>`}
    ${all === null && html`<div class="tiles" aria-busy="true">${[0, 1, 2, 3].map((i) => html`<div key=${i} class="tile skeleton"></div>`)}</div>`}
    ${all?.length === 0 &&
    html`<section class="empty">
      <p class="empty-title">Nothing here yet</p>
      <p class="quiet">Every picture you make is kept in this browser, with its prompt and settings. Drop one anywhere on this page to get its settings back.</p>
      <button class="button" onClick=${() => go("create")}>Make a picture</button>
    </section>`}
    ${all?.length > 0 && found.length === 0 && html`<p class="quiet empty-line">No prompt contains “${search}”.</p>`}
    <div class="tiles small">
      ${found.slice(0, limit).map((picture) => html`<${DoneTile} key=${picture.id} picture=${picture} siblings=${found} lazy name=${`${picture.recipe.prompt}, seed ${picture.recipe.seed}`}
        ratio=${{ aspectRatio: `${picture.recipe.width ?? 1} / ${picture.recipe.height ?? 1}` }} />`)}
    </div>
    ${found.length > limit && html`<p class="center"><button class="button" onClick=${() => setLimit(limit + PAGE)}>Show more</button></p>`}
    ${all?.length > 0 && html`<p class="quiet center">${all.length} of at most ${gallery.MAX_PICTURES} pictures, ${size(bytes)}, in this browser only</p>`}
    ${asking &&
    html`<${Dialog} title="Empty the gallery?" className="narrow" onClose=${() => setAsking(false)}>
      <p>All ${all.length} pictures are deleted from this browser.</p>
      <div class="row end">
        <button class="button" onClick=${() => setAsking(false)}>Keep them</button>
        <button class="button primary" onClick=${() => (setAsking(false), gallery.clear())}>Delete all</button>
      </div>
    <//>`}
  `;
}
