/** The form that teaches a word: its pictures, name and start, kept while other parts of the page are shown. */

import { MAX_PICTURES } from "./job.js";
import { makeStore } from "./store.js";
import { announce, notify } from "./state.js";
import { prepared } from "./upload.js";

const EMPTY = { pictures: [], name: "", init: "object", failure: "" };

export const form = makeStore(EMPTY);

export const change = (values) => form.set((now) => ({ ...now, ...values }));
export const clear = () => form.set(EMPTY);

/** Adds pictures, as many as there is room for. */
export async function add(files) {
  change({ failure: "" });
  const room = MAX_PICTURES - form.get().pictures.length;
  for (const file of files.slice(0, room)) {
    try {
      const picture = await prepared(file);
      form.set((now) => ({ ...now, pictures: [...now.pictures, picture].slice(0, MAX_PICTURES) }));
    } catch (error) {
      change({ failure: error.message });
    }
  }
  if (files.length > room) notify(`Five pictures are enough; ${files.length - room} left out.`);
  announce(`${form.get().pictures.length} pictures`);
}

export const remove = (picture) => form.set((now) => ({ ...now, pictures: now.pictures.filter((other) => other !== picture) }));
