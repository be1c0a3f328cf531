/** Starts the page. */

import { App } from "./parts/app.js";
import { html, render } from "./vendor/htm-preact.js";

const root = document.getElementById("app");
root.replaceChildren();
render(html`<${App} />`, root);
