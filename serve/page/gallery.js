/** The pictures made in this browser, in IndexedDB: bounded, newest first, each with its recipe. */

import { makeStore } from "./store.js";

export const MAX_PICTURES = 400;
export const MAX_BYTES = 200 << 20;

/** Records `{id, created, blob, recipe, url}`, newest first; null until they are read. */
export const pictures = makeStore(null);

/** Set when the browser keeps nothing, as in some private windows: pictures then last as long as the page. */
export const volatile = makeStore(false);

let database = null;
let fallback = 0;

export async function open() {
  try {
    database = await opened();
    const records = await finished(store("readonly").getAll());
    pictures.set(records.reverse().map(withUrl));
  } catch {
    volatile.set(true);
    pictures.set([]);
  }
}

/** Keeps a picture and returns its record. Old pictures make room for it. */
export async function keep(blob, recipe) {
  const record = { created: Date.now(), blob, recipe };
  try {
    record.id = await finished(store("readwrite").add(record));
  } catch {
    record.id = `memory-${(fallback += 1)}`;
  }
  const kept = withUrl(record);
  pictures.set((all) => [kept, ...(all ?? [])]);
  for (const old of surplus(pictures.get(), MAX_PICTURES, MAX_BYTES)) await remove(old.id);
  return kept;
}

export async function remove(id) {
  const record = pictures.get()?.find((picture) => picture.id === id);
  pictures.set((all) => (all ?? []).filter((picture) => picture.id !== id));
  if (database && typeof id === "number") await finished(store("readwrite").delete(id)).catch(() => {});
  // Tiles of the page may still show it, so its address is not revoked.
  return record;
}

export async function clear() {
  pictures.set([]);
  if (database) await finished(store("readwrite").clear()).catch(() => {});
}

/** The oldest records beyond either bound. `records` is newest first; the newest is always kept. */
export function surplus(records, maxPictures, maxBytes) {
  let bytes = 0;
  return records.filter((record, i) => {
    bytes += record.blob.size;
    return i > 0 && (i >= maxPictures || bytes > maxBytes);
  });
}

const withUrl = (record) => ({ ...record, url: URL.createObjectURL(record.blob) });
const store = (mode) => database.transaction("pictures", mode).objectStore("pictures");

function opened() {
  const request = indexedDB.open("oneword", 1);
  request.onupgradeneeded = () => request.result.createObjectStore("pictures", { keyPath: "id", autoIncrement: true });
  return finished(request);
}

function finished(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("blocked"));
  });
}
