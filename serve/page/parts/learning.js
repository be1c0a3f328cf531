/** A word being learned: the same prompts again and again, from its first step to its last. */

import { isEnded, nameOf, progress, sheet } from "../job.js";
import * as learning from "../learning.js";
import { bareName } from "../prompt.js";
import { draft, go } from "../state.js";
import { duration } from "../time.js";
import { html } from "../vendor/htm-preact.js";
import { useFocus } from "../hooks.js";
import { Icon } from "./icons.js";
import { Marked, Word } from "./marked.js";

export function Learning({ job }) {
  const name = bareName(nameOf(job));
  return html`
    <section class="panel learning" aria-label=${`Learning ${name}`}>
      <header class="learning-head">
        <h2>${heading(job, name)}</h2>
        ${isEnded(job)
          ? html`<div class="row wrap ready">
              <button class="button plain" onClick=${learning.dismiss}>Teach another</button>
              ${job.status === "succeeded" && html`<${Use} name=${name} />`}
            </div>`
          : html`<button class="button small" onClick=${learning.cancel}><${Icon} name="stop" /> Cancel</button>`}
      </header>
      ${!isEnded(job) &&
      html`<div class="learning-state">
        <progress max="1" value=${job.step ? progress(job) : undefined} aria-label="Steps learned"></progress>
        <p class="quiet">${sayState(job)}</p>
      </div>`}
      ${job.status === "failed" && html`<p class="note bad" role="alert">${job.error?.message ?? "It could not be learned."}</p>`}
      ${job.notes.map((text) => html`<p key=${text} class="note">${text}</p>`)}
      <${Sheet} job=${job} />
      <${Losses} losses=${job.losses} />
    </section>
  `;
}

function heading(job, name) {
  const word = html`<${Word} name=${name} />`;
  if (job.status === "succeeded") return html`${word} is ready`;
  if (job.status === "failed") return html`${word} was not learned`;
  if (job.status === "cancelled") return html`Cancelled ${word}`;
  return html`Learning ${word}`;
}

function sayState(job) {
  if (job.status === "queued") return job.position ? `Place ${job.position} in the queue` : "Waiting to begin";
  if (!job.step) return "Reading the pictures";
  const left = duration(job.seconds_left);
  return `Step ${job.step} of ${job.steps}${left ? `, about ${left} left` : ""}`;
}

function Use({ name }) {
  const ref = useFocus();
  const use = () => {
    draft.set((now) => ({ ...now, prompt: `a photo of a <${name}>`, image: undefined, mask: undefined }));
    learning.dismiss();
    go("create");
  };
  return html`<button ref=${ref} class="button primary large" onClick=${use}>Use ${name}</button>`;
}

/** The pictures as a table: a row per prompt, a column per step. */
function Sheet({ job }) {
  const { steps, rows } = sheet(job);
  const latest = Math.max(-1, ...job.pictures.map(({ step }) => step));
  const shown = rows.length ? rows : [{ prompt: "", cells: steps.map(() => null) }];
  return html`
    <div class="sheet-scroll" tabindex="0" role="region" aria-label="Pictures during learning">
      <table class="sheet">
        <caption class="hidden">The same prompts, drawn with the word as it was after each step</caption>
        <thead>
          <tr><th scope="col"><span class="hidden">Prompt</span></th>
            ${steps.map((step) => html`<th key=${step} scope="col" class=${step === latest ? "latest" : ""}>${step === 0 ? "Start" : `Step ${step}`}</th>`)}</tr>
        </thead>
        <tbody>
          ${shown.map(
            ({ prompt, cells }, i) => html`<tr key=${i}>
              <th scope="row"><${Marked} text=${prompt} /></th>
              ${cells.map((cell, j) => html`<td key=${steps[j]}>${cell?.src
                ? html`<img src=${cell.src} alt=${`After step ${steps[j]}`} />`
                : html`<span class=${`blank ${isEnded(job) ? "" : "hoping"}`}><span class="hidden">not drawn yet</span></span>`}</td>`)}
            </tr>`,
          )}
        </tbody>
      </table>
    </div>
  `;
}

/** The loss as a small line. */
function Losses({ losses }) {
  if (losses.length < 3) return null;
  const values = losses.map(({ loss }) => loss);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const points = values.map((value, i) => `${((i / (values.length - 1)) * 200).toFixed(1)},${(38 - ((value - low) / (high - low || 1)) * 36).toFixed(1)}`);
  const say = `Loss: ${values[0].toPrecision(3)} at first, ${values.at(-1).toPrecision(3)} now`;
  return html`
    <figure class="losses">
      <svg viewBox="0 0 200 40" preserveAspectRatio="none" role="img" aria-label=${say}><polyline points=${points.join(" ")} /></svg>
      <figcaption class="quiet">${say}</figcaption>
    </figure>
  `;
}
