/** This person's words. */

import * as api from "./api.js";
import { bareName } from "./prompt.js";
import { makeStore } from "./store.js";

/** Words as the server lists them; null until they are read. */
export const words = makeStore(null);

export const tokens = () => (words.get() ?? []).map(({ name }) => name);
export const isTaken = (name) => tokens().some((token) => bareName(token) === bareName(name));

export async function refresh(signal) {
  words.set(await api.words(undefined, signal));
}

export async function rename(word, name) {
  await api.renameWord(word.name, name);
  await refresh();
}

export async function remove(word) {
  await api.deleteWord(word.name);
  words.set((all) => all.filter(({ name }) => name !== word.name));
}

export async function upload(file, options) {
  const word = await api.uploadWord(file, options);
  await refresh();
  return word;
}
