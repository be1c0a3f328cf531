/** The compare page: one prompt, several words, the same seeds. */

import { useStore } from "../hooks.js";
import { bareName, written } from "../prompt.js";
import { randomSeed } from "../recipe.js";
import { isActive } from "../run.js";
import { cancel, runs, start } from "../runs.js";
import { draft, go } from "../state.js";
import { makeStore } from "../store.js";
import { html } from "../vendor/htm-preact.js";
import { words } from "../words.js";
import { PromptBox } from "./prompt-box.js";
import { Icon } from "./icons.js";
import { Word } from "./marked.js";
import { Count, Extras } from "./settings.js";
import { Tile } from "./tile.js";

const MAX_WORDS = 6;

/** Kept while other parts are shown: `chosen` null means the first words. */
const form = makeStore({ prompt: "a photo of a {} in the snow", chosen: null, seeds: 2, shown: [] });

export function Compare() {
  const known = useStore(words);
  const state = useStore(form);
  const all = useStore(runs);
  const recipe = useStore(draft);
  const change = (values) => form.set((now) => ({ ...now, ...values }));
  if (known === null) return html`<h1 tabindex="-1" class="title">Compare words</h1><p class="panel skeleton tall" aria-busy="true"></p>`;
  if (known.length === 0) return html`<${Nothing} />`;

  const tokens = known.map(({ name }) => name);
  const chosen = (state.chosen ?? tokens.slice(0, 3)).filter((token) => tokens.includes(token));
  const shown = state.shown.map(({ token, id }) => ({ token, run: all.find((run) => run.id === id) })).filter(({ run }) => run);
  const active = shown.some(({ run }) => isActive(run));
  const hasHole = state.prompt.includes("{}");
  const toggle = (token) =>
    change({ chosen: chosen.includes(token) ? chosen.filter((other) => other !== token) : [...chosen, token].slice(-MAX_WORDS) });
  const submit = () => {
    if (!hasHole || chosen.length === 0) return;
    shown.forEach(({ run }) => cancel(run.id)); // nobody would see its pictures any more
    const { locked, image, mask, strength, prompt, ...settings } = recipe;
    const seed = locked ? settings.seed : randomSeed();
    const started = chosen.map((token) => {
      const made = { ...settings, prompt: state.prompt.replaceAll("{}", written(token)).trim(), seed, count: state.seeds };
      return { token, id: start(made, { compare: true }) };
    });
    change({ shown: started });
  };

  return html`
    <h1 tabindex="-1" class="title">Compare words</h1>
    <form class="panel composer wide" novalidate onSubmit=${(event) => (event.preventDefault(), submit())}>
      <${PromptBox} id="compare-prompt" label="One sentence, with {} where each word goes" placeholder="a photo of a {} in the snow"
        value=${state.prompt} tokens=${[]} hole onInput=${(prompt) => change({ prompt })} onSubmit=${submit} describedBy="compare-help" />
      <p id="compare-help" class=${hasHole ? "hidden" : "note"}>${hasHole ? "The seeds are the same for each word." : "Write {} where each word goes."}</p>
      <div class="chips" role="group" aria-label="Words to compare">
        ${tokens.slice(0, 40).map((token) => html`<button key=${token} type="button" class="chip toggle" aria-pressed=${chosen.includes(token) ? "true" : "false"} onClick=${() => toggle(token)}>${bareName(token)}</button>`)}
      </div>
      <${Extras} recipe=${recipe} onChange=${(values) => draft.set((now) => ({ ...now, ...values }))} />
      <div class="composer-bar">
        <${Count} value=${state.seeds} max=${6} onChange=${(seeds) => change({ seeds })} />
        <span class="quiet grow">for each of ${chosen.length} word${chosen.length === 1 ? "" : "s"}</span>
        ${active && html`<button type="button" class="button" onClick=${() => shown.forEach(({ run }) => cancel(run.id))}><${Icon} name="stop" /> Cancel</button>`}
        <button type="submit" class="button primary" aria-disabled=${hasHole && chosen.length ? "false" : "true"}>Compare</button>
      </div>
    </form>
    ${shown.length > 0 && html`<${Table} shown=${shown} />`}
  `;
}

function Table({ shown }) {
  const siblings = shown.flatMap(({ run }) => run.tiles.flatMap((tile) => (tile.picture ? [tile.picture] : [])));
  const seeds = shown[0].run.tiles.map(({ seed }) => seed);
  const notes = [...new Set(shown.flatMap(({ run }) => [run.note, ...run.tiles.map((tile) => tile.message)]).filter(Boolean))];
  return html`
    ${notes.map((note) => html`<p key=${note} class="note" role="status">${note}</p>`)}
    <div class="compare-scroll" role="region" tabindex="0" aria-label="Words side by side">
      <table class="compare" style=${{ "--columns": shown.length }}>
        <thead><tr><th scope="col"><span class="hidden">Seed</span></th>${shown.map(({ token }) => html`<th key=${token} scope="col"><${Word} name=${bareName(token)} /></th>`)}</tr></thead>
        <tbody>
          ${seeds.map(
            (seed, i) => html`<tr key=${seed}>
              <th scope="row"><span class="quiet">seed</span> ${seed}</th>
              ${shown.map(({ token, run }) => html`<td key=${token}><${Tile} tile=${run.tiles[i]} recipe=${run.recipe} siblings=${siblings} label=${bareName(token)} /></td>`)}
            </tr>`,
          )}
        </tbody>
      </table>
    </div>
  `;
}

const Nothing = () => html`
  <h1 tabindex="-1" class="title">Compare words</h1>
  <section class="empty">
    <p class="empty-title">Side by side, on the same seeds</p>
    <p class="quiet">Comparing needs at least one word.</p>
    <button class="button" onClick=${() => go("words")}>Teach a word</button>
  </section>
`;
