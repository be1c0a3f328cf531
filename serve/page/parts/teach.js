/** The form that teaches a word: three to five pictures, a name, one button. */

import { useStore, useUrl } from "../hooks.js";
import { MAX_PICTURES, MIN_PICTURES, missing } from "../job.js";
import * as learning from "../learning.js";
import { announce } from "../state.js";
import * as teaching from "../teaching.js";
import { html, useState } from "../vendor/htm-preact.js";
import { isTaken, words } from "../words.js";
import { DropZone } from "./drop.js";
import { Icon } from "./icons.js";

export function Teach() {
  useStore(words);
  const { pictures, name, init, failure } = useStore(teaching.form);
  const [busy, setBusy] = useState(false);
  const todo = missing({ images: pictures.length, name, taken: isTaken(name) });

  const submit = async (event) => {
    event.preventDefault();
    if (busy) return;
    if (todo) return document.querySelector(pictures.length < MIN_PICTURES ? ".drop input" : "#name")?.focus();
    setBusy(true);
    teaching.change({ failure: "" });
    try {
      await learning.start(pictures, { name: `<${name}>`, init: init.trim() || "object" });
      teaching.clear();
      announce("Learning has started");
    } catch (error) {
      teaching.change({ failure: error.message });
      setBusy(false);
    }
  };

  return html`
    <form class="panel teach" onSubmit=${submit}>
      <div class="teach-pictures">
        ${pictures.length === 0
          ? html`<${DropZone} label="Drop 3 to 5 pictures" hint="of one thing, in different places. Or click to choose." onFiles=${teaching.add} />`
          : html`<ul class="slots" aria-label="Pictures">
              ${pictures.map((blob, i) => html`<${Slot} key=${blob} blob=${blob} index=${i} onRemove=${() => teaching.remove(blob)} />`)}
              ${pictures.length < MAX_PICTURES && html`<li class="slot"><${DropZone} compact label="Add pictures" onFiles=${teaching.add} /></li>`}
              ${Array.from({ length: Math.max(0, MAX_PICTURES - 1 - pictures.length) }, (_, i) => html`<li key=${`empty-${i}`} class="slot vacant" aria-hidden="true"></li>`)}
            </ul>`}
      </div>
      <div class="teach-fields">
        <div class="field">
          <label for="name">Name it</label>
          <input id="name" class="name" type="text" value=${name} placeholder="for example, toy" autocomplete="off" autocapitalize="none"
            spellcheck="false" maxlength="64" aria-describedby="todo" onInput=${(event) => teaching.change({ name: event.target.value.replace(/[\s<>]+/g, "-") })} />
        </div>
        <div class="field">
          <label for="init">What is it, in one plain word?</label>
          <input id="init" type="text" value=${init} placeholder="object" autocomplete="off" maxlength="64" aria-describedby="init-help" onInput=${(event) => teaching.change({ init: event.target.value })} />
          <p id="init-help" class="quiet">Learning starts from this word.</p>
        </div>
        <button class="button primary large" type="submit" aria-disabled=${todo || busy ? "true" : "false"}>${busy ? "Sending the pictures…" : "Learn it"}</button>
        <p id="todo" class="quiet" role="status">${busy ? "" : todo || "Ready"}</p>
        ${failure && html`<p class="note bad" role="alert">${failure}</p>`}
      </div>
    </form>
  `;
}

function Slot({ blob, index, onRemove }) {
  const url = useUrl(blob);
  return html`
    <li class="slot">
      ${url && html`<img src=${url} alt=${`Picture ${index + 1}`} />`}
      <button type="button" class="icon-button over" aria-label=${`Remove picture ${index + 1}`} onClick=${onRemove}><${Icon} name="close" /></button>
    </li>
  `;
}
