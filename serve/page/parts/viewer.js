/** One picture, large, with what made it and what can be done with it. */

import * as gallery from "../gallery.js";
import { extras, randomSeed } from "../recipe.js";
import { sayRestored } from "../restore.js";
import { start } from "../runs.js";
import { draft, edit, go, masked, model, notify, viewed } from "../state.js";
import { html, useState } from "../vendor/htm-preact.js";
import { useStore } from "../hooks.js";
import { CopyMenu } from "./copy-menu.js";
import { Dialog } from "./dialog.js";
import { Icon } from "./icons.js";
import { Marked } from "./marked.js";

const CLOSENESS = { Close: 0.35, Similar: 0.55, Loose: 0.75 };

export function Viewer({ view }) {
  const { picture, siblings } = view;
  const info = useStore(model);
  const [closeness, setCloseness] = useState("Similar");
  const at = siblings.findIndex(({ id }) => id === picture.id);
  const close = () => viewed.set(null);
  const move = (by) => {
    const next = siblings[at + by];
    if (next) viewed.set({ picture: next, siblings });
  };
  const onKeyDown = (event) => {
    if (event.target.matches("input, select, textarea")) return;
    if (event.key === "ArrowLeft") move(-1);
    if (event.key === "ArrowRight") move(1);
  };
  const { recipe } = picture;
  const act = (action) => () => (close(), action());
  const more = act(() => {
    const { mask, ...rest } = recipe;
    const strength = CLOSENESS[closeness];
    start({ ...rest, image: picture.blob, strength, count: 4, seed: randomSeed() }, { label: `More like seed ${recipe.seed}` });
    go("create");
  });
  const seeds = act(() => {
    start({ ...recipe, count: 4, seed: recipe.seed + 1 }, { label: `The next seeds after ${recipe.seed}` });
    go("create");
  });
  const from = act(() => {
    draft.set((now) => ({ ...now, image: picture.blob, mask: undefined, strength: 0.6, prompt: now.prompt || recipe.prompt, width: recipe.width, height: recipe.height }));
    go("create");
  });
  const restore = act(() => {
    const left = edit({ ...recipe, count: 1 });
    if (left.length) notify(sayRestored(left), { bad: true });
  });
  const remove = act(async () => {
    await gallery.remove(picture.id);
    notify("Removed the picture.");
  });
  const editable = info?.edits !== false;

  return html`
    <${Dialog} title="Picture" className="viewer" onClose=${close} onKeyDown=${onKeyDown}>
      <div class="viewer-body">
        <div class="viewer-stage">
          <img src=${picture.url} alt=${recipe.prompt} />
          ${siblings.length > 1 &&
          html`<div class="viewer-steps">
            <button class="icon-button" aria-label="Previous picture" disabled=${at <= 0} onClick=${() => move(-1)}><${Icon} name="back" /></button>
            <span>${at + 1} of ${siblings.length}</span>
            <button class="icon-button" aria-label="Next picture" disabled=${at >= siblings.length - 1} onClick=${() => move(1)}><${Icon} name="next" /></button>
          </div>`}
        </div>
        <div class="viewer-side">
          <p class="viewer-prompt"><${Marked} text=${recipe.prompt} /></p>
          <dl class="facts">${facts(recipe).map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>
          ${editable &&
          html`<div class="more-like">
            <button class="button primary" onClick=${more}>More like this</button>
            <div class="segments" role="group" aria-label="How close">
              ${Object.keys(CLOSENESS).map((name) => html`<button key=${name} type="button" aria-pressed=${name === closeness ? "true" : "false"} onClick=${() => setCloseness(name)}>${name}</button>`)}
            </div>
          </div>`}
          <div class="viewer-actions">
            ${editable && html`<button class="button" onClick=${act(() => masked.set({ blob: picture.blob, recipe }))}><${Icon} name="brush" /> Repaint a part</button>`}
            ${editable && html`<button class="button" onClick=${from}><${Icon} name="picture" /> Start from this</button>`}
            <button class="button" onClick=${seeds}><${Icon} name="repeat" /> Next seeds</button>
            <button class="button" onClick=${restore}><${Icon} name="settings" /> Use settings</button>
            <${CopyMenu} recipe=${recipe} className="button" withText />
            <a class="button" href=${picture.url} download=${fileName(recipe)}><${Icon} name="download" /> Download</a>
            <button class="button" onClick=${remove}><${Icon} name="trash" /> Remove</button>
          </div>
        </div>
      </div>
    <//>
  `;
}

function facts(recipe) {
  return [
    ["Seed", recipe.seed],
    ["Steps", recipe.steps],
    ["Sampler", recipe.sampler],
    ["Guidance", recipe.guidance],
    ["Distilled guidance", recipe.embedded],
    ["Size", recipe.width && recipe.height && `${recipe.width} × ${recipe.height}`],
    ["Changed", recipe.image && recipe.strength && `${Math.round(recipe.strength * 100)} %`],
    ...extras(recipe).map(({ label, value }) => [label, value]),
    ["Leave out", recipe.negative],
  ].filter(([, value]) => value !== undefined && value !== "" && value !== null);
}

const fileName = (recipe) => `${recipe.prompt.replace(/[^\w]+/g, "-").replace(/^-|-$/g, "").slice(0, 40) || "picture"}-${recipe.seed}.png`;
