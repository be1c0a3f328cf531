/** The pictures made in this browser, in IndexedDB: bounded, newest first, each with its recipe. */

import { makeStore } from "./store.js";

export const MAX_PICTURES = 400;
export const MAX_BYTES = 200 << 20;

/** Records `{id, created, blob, recipe, url}`, newest first; null until they are read. */
export const pictures = makeStore(null);

/** Set when the browser does not store a picture, as with a full disk: it then lasts as long as the page. */
export const volatile = makeStore(false);

let database = null;
let fallback = 0;

export async function open() {
  try {
    database = await opened();
    const records = await transacted("readonly", (store) => store.getAll());
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
    record.id = await transacted("readwrite", (store) => store.add(record));
  } catch {
    record.id = `memory-${(fallback += 1)}`;
    if (!volatile.get()) volatile.set(true);
  }
  const kept = withUrl(record);
  pictures.set((all) => [kept, ...(all ?? [])]);
  for (const old of surplus(pictures.get(), MAX_PICTURES, MAX_BYTES)) await remove(old.id);
  return kept;
}

export async function remove(id) {
  const record = pictures.get()?.find((picture) => picture.id === id);
  pictures.set((all) => (all ?? []).filter((picture) => picture.id !== id));
  if (typeof id === "number") await transacted("readwrite", (store) => store.delete(id)).catch(() => {});
  // Tiles of the page may still show it, so its address is not revoked.
  return record;
}

export async function clear() {
  pictures.set([]);
  if (!database) return;
  volatile.set(false);
  await transacted("readwrite", (store) => store.clear()).catch(() => {});
}

/** What a record takes up: its picture, and the picture and mask that it was made from. */
export const bytesOf = ({ blob, recipe: { image, mask } }) => blob.size + (image?.size ?? 0) + (mask?.size ?? 0);

/** The oldest records beyond either bound. `records` is newest first; the newest is always kept. */
export function surplus(records, maxPictures, maxBytes) {
  let bytes = 0;
  return records.filter((record, i) => {
    bytes += bytesOf(record);
    return i > 0 && (i >= maxPictures || bytes > maxBytes);
  });
}

const withUrl = (record) => ({ ...record, url: URL.createObjectURL(record.blob) });

/** The result of a request, when its transaction is complete: storage that is full aborts it after the request. */
async function transacted(mode, request) {
  const transaction = database.transaction("pictures", mode);
  const { result } = await new Promise((resolve, reject) => {
    const made = request(transaction.objectStore("pictures"));
    transaction.oncomplete = () => resolve(made);
    transaction.onabort = transaction.onerror = ({ target }) => reject(target.error);
  });
  return result;
}

function opened() {
  const request = indexedDB.open("oneword", 1);
  request.onupgradeneeded = () => request.result.createObjectStore("pictures", { keyPath: "id", autoIncrement: true });
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("blocked"));
  });
}
