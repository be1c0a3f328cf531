/**
 * A recipe: all that makes a grid of pictures. Pure.
 *
 *   {prompt, negative, seed, count, steps, sampler, spacing, method, guidance, embedded, width, height, clipSkip, eta,
 *    rescale, interval, image, mask, strength}
 *
 * Undefined means the server's default. `image` and `mask` are Blobs; transparent pixels of a mask are repainted.
 * Picture i of a recipe has the seed `seed + i`.
 */

export const MAX_COUNT = 10;
const SEEDS = 1_000_000; // short enough to read out

export const randomSeed = () => Math.floor(Math.random() * SEEDS);

/** The recipe of picture `index` alone, without what is left to the server. */
export const single = (recipe, index) => defined({ ...recipe, seed: recipe.seed + index, count: 1 });

const EXTRAS = {
  spacing: "Spacing",
  method: "Kind of guidance",
  rescale: "Guidance rescale",
  interval: "Guidance interval",
  eta: "Eta",
  clipSkip: "Text layers skipped",
};

/** The settings `{name, label, value}` that have no field on the page: only a restored recipe has them. */
export const extras = (recipe) =>
  Object.entries(EXTRAS).flatMap(([name, label]) => {
    const value = recipe[name];
    return value ? [{ name, label, value: Array.isArray(value) ? value.join(" to ") : String(value) }] : [];
  });

/** A recipe without what a model does not have, and what that was, in words: `{recipe, left}`. */
export function fit(recipe, { samplers, spacings, guidance, defaults }) {
  const missing = {
    sampler: recipe.sampler && !samplers.includes(recipe.sampler) && `Sampler ${recipe.sampler}`,
    method: recipe.method && !guidance.includes(recipe.method) && `${EXTRAS.method} ${recipe.method}`,
    embedded: recipe.embedded !== undefined && defaults.embedded_guidance === null && `Distilled guidance ${recipe.embedded}`,
  };
  const spaced = !missing.sampler && spacings.includes(recipe.spacing);
  missing.spacing = recipe.spacing && !spaced && `${EXTRAS.spacing} ${recipe.spacing}`;
  const kept = Object.entries(recipe).filter(([name]) => !missing[name]);
  return { recipe: Object.fromEntries(kept), left: Object.values(missing).filter(Boolean) };
}

/** The fields of a request for the server's images API, by name. */
export function requestFields(recipe) {
  const { width, height, interval } = recipe;
  const fields = {
    prompt: recipe.prompt,
    n: recipe.count,
    seed: recipe.seed,
    size: width && height ? `${width}x${height}` : undefined,
    negative_prompt: recipe.negative || undefined,
    num_inference_steps: recipe.steps,
    sampler: recipe.sampler || undefined,
    spacing: recipe.spacing || undefined,
    guidance: recipe.method || undefined,
    guidance_scale: recipe.guidance,
    embedded_guidance: recipe.embedded,
    guidance_rescale: recipe.rescale || undefined,
    guidance_interval: interval,
    clip_skip: recipe.clipSkip || undefined,
    eta: recipe.eta || undefined,
    strength: recipe.image ? recipe.strength : undefined,
  };
  return defined(fields);
}

const defined = (fields) => Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== undefined));

/** A multipart form: numbers in a list are joined by commas, and several files of one name are sent as `name[]`. */
export function formOf(fields, files = {}) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) {
    form.append(name, String(value));
  }
  for (const [name, value] of Object.entries(files)) {
    if (Array.isArray(value)) for (const item of value) form.append(`${name}[]`, item);
    else if (value) form.append(name, value, `${name}.png`);
  }
  return form;
}

/** Neighbouring indexes grouped into runs `{first, count}`: what is left to ask for after a connection was lost. */
export function missingRuns(indexes) {
  const runs = [];
  for (const index of [...indexes].sort((a, b) => a - b)) {
    const last = runs.at(-1);
    if (last && last.first + last.count === index) last.count += 1;
    else runs.push({ first: index, count: 1 });
  }
  return runs;
}
