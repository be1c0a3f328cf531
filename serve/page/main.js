/** Starts the page. */

import { App } from "./parts/app.js";
import { html, render } from "./vendor/htm-preact.js";

const SMALL = 128; // pixels a side

// Small pictures are enlarged with hard edges, so that each of their pixels can be seen. Load events do not bubble.
document.addEventListener(
  "load",
  ({ target }) => target instanceof HTMLImageElement && target.classList.toggle("crisp", target.naturalWidth <= SMALL),
  true,
);

const root = document.getElementById("app");
root.replaceChildren();
render(html`<${App} />`, root);
