/** The create page: a prompt, its settings, and the runs. */

import { randomSeed } from "../recipe.js";
import { unknownNames, bareName } from "../prompt.js";
import { isActive } from "../run.js";
import { runs, start } from "../runs.js";
import { draft, go, masked, model } from "../state.js";
import { html, useRef, useState } from "../vendor/htm-preact.js";
import { words } from "../words.js";
import { useStore, useUrl } from "../hooks.js";
import { Icon } from "./icons.js";
import { PromptBox } from "./prompt-box.js";
import { RunView } from "./run-view.js";
import { Count, Settings, unreadableField } from "./settings.js";

const IDEAS = ["a photo of a {} in the snow", "a painting of a {}", "a {} by the sea at sunset", "an icon of a {}"];

export function Create() {
  const recipe = useStore(draft);
  const info = useStore(model);
  const known = useStore(words);
  const all = useStore(runs).filter((run) => !run.compare);
  const [open, setOpen] = useState(false);
  const form = useRef();
  const tokens = (known ?? []).map(({ name }) => name);
  const change = (values) => draft.set((now) => ({ ...now, ...values }));
  const unknown = known ? unknownNames(recipe.prompt, tokens) : [];
  const prompt = recipe.prompt.trim();

  const submit = () => {
    if (!prompt) return document.getElementById("prompt").focus();
    const field = unreadableField(form.current);
    if (field) {
      setOpen(true);
      return setTimeout(() => field.focus());
    }
    const { locked, ...made } = recipe;
    start({ ...made, prompt });
    if (!locked) change({ seed: randomSeed() });
    setTimeout(() => document.querySelector(".run")?.scrollIntoView({ block: "nearest", behavior: "smooth" }));
  };

  return html`
    <h1 class="hidden" tabindex="-1">Create</h1>
    <form ref=${form} class="panel composer" novalidate onSubmit=${(event) => (event.preventDefault(), submit())}>
      <${PromptBox}
        id="prompt"
        label="Describe a picture"
        placeholder=${tokens.length ? `a photo of a <${bareName(tokens[0])}> in the snow` : "a photo of a red star in the snow"}
        value=${recipe.prompt}
        tokens=${tokens}
        describedBy="prompt-help"
        onInput=${(text) => change({ prompt: text })}
        onSubmit=${submit}
      />
      <p id="prompt-help" class=${unknown.length ? "note" : "hidden"}>
        ${unknown.length
          ? html`No word is called ${unknown.map((name, i) => html`${i > 0 && ", "}<strong>${name}</strong>`)}. <a href="#/words">Teach it?</a>`
          : "Type < to insert a learned word. Ctrl+Enter starts."}
      </p>
      ${recipe.image && html`<${Source} recipe=${recipe} onChange=${change} />`}
      <div class="composer-bar">
        <${Count} value=${recipe.count} onChange=${(count) => change({ count })} />
        <button type="button" class="button plain" aria-expanded=${open ? "true" : "false"} aria-controls="settings" onClick=${() => setOpen(!open)}>
          <${Icon} name="settings" /> Settings
        </button>
        <button type="submit" class="button primary" aria-disabled=${prompt ? "false" : "true"}>Create</button>
      </div>
      <div id="settings" hidden=${!open}><${Settings} recipe=${recipe} onChange=${change} model=${info} /></div>
    </form>
    ${all.length === 0 && html`<${Empty} tokens=${tokens} loaded=${known !== null} onIdea=${(text) => change({ prompt: text })} />`}
    <div class="runs">${all.map((run) => html`<${RunView} key=${run.id} run=${run} />`)}</div>
    <span class="hidden" role="status">${sayRuns(all)}</span>
  `;
}

function sayRuns(all) {
  const run = all[0];
  if (!run) return "";
  if (isActive(run)) return "Drawing";
  const done = run.tiles.filter((tile) => tile.status === "done").length;
  return `${done} of ${run.tiles.length} pictures are ready`;
}

/** The picture that a recipe starts from. */
function Source({ recipe, onChange }) {
  const url = useUrl(recipe.image);
  const strength = recipe.strength ?? 0.6;
  return html`
    <div class="source">
      ${url && html`<img src=${url} alt="The picture to start from" />`}
      <div class="field grow">
        <label for="strength">Change the picture <strong>${Math.round(strength * 100)} %</strong></label>
        <input id="strength" type="range" min="0.05" max="1" step="0.05" value=${strength} onInput=${(event) => onChange({ strength: Number(event.target.value) })} />
      </div>
      <button type="button" class="button small" onClick=${() => masked.set({ blob: recipe.image, recipe })}>
        <${Icon} name="brush" /> ${recipe.mask ? "Mask" : "Repaint a part"}
      </button>
      <button type="button" class="icon-button" aria-label="Remove the picture" onClick=${() => onChange({ image: undefined, mask: undefined, strength: undefined })}>
        <${Icon} name="close" />
      </button>
    </div>
  `;
}

function Empty({ tokens, loaded, onIdea }) {
  if (!loaded) return null;
  if (tokens.length === 0) {
    return html`
      <section class="empty">
        <p class="empty-title">Make it know <mark class="word">your thing</mark></p>
        <p class="quiet">Teach a word from three to five pictures. Then use it in any sentence.</p>
        <button class="button" onClick=${() => go("words")}>Teach a word</button>
      </section>
    `;
  }
  return html`
    <section class="empty">
      <p class="quiet">Try one of these, or drop a picture anywhere.</p>
      <div class="ideas">
        ${IDEAS.map((idea, i) => {
          const text = idea.replace("{}", `<${bareName(tokens[i % tokens.length])}>`);
          const [before, after] = idea.split("{}");
          return html`<button key=${idea} class="idea" onClick=${() => onIdea(text)}>
            ${before}<mark class="word">${bareName(tokens[i % tokens.length])}</mark>${after}
          </button>`;
        })}
      </div>
    </section>
  `;
}
