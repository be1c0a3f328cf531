/** The settings of a recipe beside its prompt. Empty fields mean the model's defaults. */

import { MAX_COUNT, extras, randomSeed } from "../recipe.js";
import { html, useLayoutEffect, useRef, useState } from "../vendor/htm-preact.js";
import { Icon } from "./icons.js";

export function Settings({ recipe, onChange, model }) {
  const defaults = model?.defaults ?? {};
  const multiple = model?.size_multiple ?? 8;
  const set = (name) => (value) => onChange({ [name]: value });
  return html`
    <div class="settings">
      <div class="field wide">
        <label for="negative">Leave out</label>
        <input
          id="negative"
          type="text"
          value=${recipe.negative}
          placeholder="What the pictures should not show"
          onInput=${(event) => onChange({ negative: event.target.value })}
        />
      </div>
      <${NumberField} id="steps" label="Steps" value=${recipe.steps} fallback=${defaults.steps} min="1" max="1000" onChange=${set("steps")} />
      <${NumberField} id="guidance" label="Guidance" value=${recipe.guidance} fallback=${defaults.guidance_scale} min="0" max="100" step="any" onChange=${set("guidance")} />
      ${(defaults.embedded_guidance ?? recipe.embedded ?? null) !== null && html`
        <${NumberField} id="embedded" label="Distilled guidance" value=${recipe.embedded} fallback=${defaults.embedded_guidance} min="0" max="50" step="any" onChange=${set("embedded")} />`}
      <div class="field">
        <label for="sampler">Sampler</label>
        <select id="sampler" value=${recipe.sampler ?? ""} onChange=${(event) => onChange({ sampler: event.target.value || undefined, spacing: undefined })}>
          <option value="">${defaults.sampler ? `${defaults.sampler} (default)` : "Default"}</option>
          ${(model?.samplers ?? []).map((name) => html`<option key=${name} value=${name}>${name}</option>`)}
        </select>
      </div>
      <${NumberField} id="width" label="Width" value=${recipe.width} fallback=${defaults.width} min=${multiple} max=${model?.max_side} step=${multiple}
        onChange=${(width) => onChange({ width, height: recipe.height ?? (width && defaults.height) })} />
      <${NumberField} id="height" label="Height" value=${recipe.height} fallback=${defaults.height} min=${multiple} max=${model?.max_side} step=${multiple}
        onChange=${(height) => onChange({ height, width: recipe.width ?? (height && defaults.width) })} />
      <div class="field">
        <label for="seed">Seed</label>
        <${NumberInput} id="seed" inputmode="numeric" value=${recipe.seed} min="0"
          onChange=${(seed) => seed !== undefined && onChange({ seed: Math.max(0, Math.floor(seed)), locked: true })}>
          <button
            type="button"
            class="icon-button"
            aria-pressed=${recipe.locked ? "true" : "false"}
            aria-label="Keep this seed"
            title=${recipe.locked ? "The seed is kept" : "A new seed for each run"}
            onClick=${() => onChange(recipe.locked ? { locked: false, seed: randomSeed() } : { locked: true })}
          >
            <${Icon} name=${recipe.locked ? "lock" : "unlock"} />
          </button>
        <//>
      </div>
      <${Extras} recipe=${recipe} onChange=${onChange} />
    </div>
  `;
}

/** The settings that have no field, each with a button that removes it. */
export function Extras({ recipe, onChange }) {
  const found = extras(recipe);
  if (found.length === 0) return null;
  const remove = (name, { nextElementSibling, previousElementSibling }) => {
    (nextElementSibling ?? previousElementSibling)?.focus();
    onChange({ [name]: undefined });
  };
  return html`
    <div class="field wide">
      <span class="field-label" id="extras">From the restored picture</span>
      <div class="chips" role="group" aria-labelledby="extras">
        ${found.map(({ name, label, value }) => html`<button key=${name} type="button" class="chip setting" aria-label=${`Remove ${label} ${value}`}
          title="Remove" onClick=${(event) => remove(name, event.currentTarget)}><span>${label} <strong>${value}</strong></span><${Icon} name="close" /></button>`)}
      </div>
    </div>
  `;
}

function NumberField({ id, label, fallback, ...input }) {
  return html`
    <div class="field">
      <label for=${id}>${label}</label>
      <${NumberInput} id=${id} inputmode="decimal" placeholder=${fallback ?? ""} ...${input} />
    </div>
  `;
}

/**
 * An optional number: empty is undefined. What is typed stays as it is, so that 7. can become 7.5. If it is no number, as
 * 12e is, the last number still counts, and the field says so until it is corrected. `children` follow the field.
 */
function NumberInput({ id, value, onChange, children, ...attributes }) {
  const field = useRef();
  const [unreadable, setUnreadable] = useState(false);
  const check = () => setUnreadable(field.current.validity.badInput);
  const typed = () => (field.current.value === "" ? undefined : Number(field.current.value));
  const show = () => {
    field.current.value = value ?? "";
    check();
  };
  const read = () => {
    check();
    if (!field.current.validity.badInput) onChange(typed());
  };
  useLayoutEffect(() => {
    if (typed() !== value) show();
  }, [value]);
  return html`
    <div class="joined">
      <input ref=${field} id=${id} type="number" aria-invalid=${unreadable ? "true" : "false"} aria-describedby=${unreadable ? `${id}-error` : undefined}
        onInput=${read} onBlur=${() => field.current.validity.badInput || show()} ...${attributes} />
      ${children}
    </div>
    ${unreadable && html`<p id=${`${id}-error`} class="field-error">This is not a number.</p>`}
  `;
}

/** The first number field in a form whose text is not a number, or undefined. */
export const unreadableField = (form) => [...form.elements].find((field) => field.validity?.badInput);

/** How many pictures: minus, number, plus. */
export function Count({ value, onChange, max = MAX_COUNT }) {
  const say = `${value} picture${value > 1 ? "s" : ""}`;
  return html`
    <div class="stepper" role="group" aria-label="Number of pictures">
      <button type="button" aria-label="Fewer pictures" disabled=${value <= 1} onClick=${() => onChange(value - 1)}>−</button>
      <output aria-live="polite">${say}</output>
      <button type="button" aria-label="More pictures" disabled=${value >= max} onClick=${() => onChange(value + 1)}>+</button>
    </div>
  `;
}
