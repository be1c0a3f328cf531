/** What the parts of the page share: the model, the recipe being written, the route, notices, the open picture. */

import * as api from "./api.js";
import { fit, randomSeed } from "./recipe.js";
import { makeStore } from "./store.js";

/** What the server says about its model; null until it has. */
export const model = makeStore(null);

/** The recipe being written. Its seed changes with each run unless `locked`. */
export const draft = makeStore({ prompt: "", negative: "", count: 4, seed: randomSeed(), locked: false });

/** The part of the page that is shown: create, words, compare or gallery. */
export const route = makeStore(routeOf(globalThis.location?.hash));

/** Short messages `{id, text, bad}` that go away. */
export const notices = makeStore([]);

/** The open picture `{picture, siblings}` and the picture whose mask is being painted, or null. */
export const viewed = makeStore(null);
export const masked = makeStore(null);

/** The word that is being refined, or null. */
export const refined = makeStore(null);

/** What a screen reader should say. */
export const announcement = makeStore("");

export const announce = (text) => announcement.set(text);

export async function readModel(signal) {
  model.set(await api.model(signal));
}

export function go(name) {
  location.hash = `#/${name}`;
}

/** Puts a recipe into the prompt box, and returns what the model does not have of it, in words. */
export function edit(recipe) {
  const { recipe: fitting, left } = model.get() ? fit(recipe, model.get()) : { recipe, left: [] };
  draft.set((now) => ({ count: now.count, negative: "", locked: recipe.seed !== undefined, seed: now.seed, ...fitting }));
  go("create");
  return left;
}

let count = 0;

export function notify(text, { bad = false } = {}) {
  const id = (count += 1);
  notices.set((all) => [...all.slice(-2), { id, text, bad }]);
  setTimeout(() => dismiss(id), bad ? 12000 : 5000);
}

export const dismiss = (id) => notices.set((all) => all.filter((notice) => notice.id !== id));

function routeOf(hash) {
  const name = (hash ?? "").replace(/^#\//, "");
  return ["create", "words", "compare", "gallery"].includes(name) ? name : "create";
}

globalThis.addEventListener?.("hashchange", () => route.set(routeOf(location.hash)));
