/** "Copy as": curl, Python or ti-run for the same pictures. */

import { curl, python, tiRun } from "../snippets.js";
import { notify } from "../state.js";
import { html } from "../vendor/htm-preact.js";
import { Icon } from "./icons.js";
import { Menu } from "./menu.js";

export function CopyMenu({ recipe, className, withText = false }) {
  const origin = new URL(".", document.baseURI).href.replace(/\/$/, "");
  const items = [
    { text: "curl", run: () => copy(curl(recipe, origin), "curl") },
    { text: "Python (openai)", run: () => copy(python(recipe, origin), "Python") },
    { text: "ti-run", run: () => copy(tiRun(recipe), "ti-run") },
    { text: "Prompt", run: () => copy(recipe.prompt, "the prompt") },
  ];
  return html`<${Menu} label="Copy as" className=${className} items=${items}
    button=${html`<${Icon} name="copy" />${withText && html`<span>Copy as</span>`}`} />`;
}

/** Copies where the browser allows it; over plain HTTP it may only allow the old way. */
async function copy(text, name) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = document.createElement("textarea");
    field.value = text;
    (document.querySelector("dialog[open]") ?? document.body).append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    if (!done) return notify("This browser does not allow copying here.", { bad: true });
  }
  notify(`Copied ${name}.`);
}
