/** The server's public API. The only module that knows routes, and the only one that touches the key. */

import { Unreachable, errorOf, isCancel, streamError } from "./errors.js";
import { formOf, requestFields } from "./recipe.js";
import { readEvents } from "./stream.js";

const KEY = "oneword.key";

/** Asks a person for a key; set by the page. Gets whether a key was refused, resolves to a key or null. */
let askKey = async () => null;
let asking = null;

export function setKeyPrompt(ask) {
  askKey = ask;
}

/** Sends a request and returns an ok response. Raises ApiError, Unreachable or AbortError. */
export async function send(path, options = {}) {
  for (;;) {
    const key = storedKey();
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    let response;
    try {
      response = await fetch(new URL(path, document.baseURI), { ...options, headers });
    } catch (error) {
      throw isCancel(error) ? error : new Unreachable("The server cannot be reached.");
    }
    if (response.ok) return response;
    const error = await errorOf(response);
    if (response.status !== 401) throw error;
    await newKey(key, error);
  }
}

/** Whether a header can carry a key: printable ASCII only. */
export const isSendable = (key) => /^[ -~]+$/.test(key);

/** This tab's key, or null. One that cannot be sent is dropped. */
function storedKey() {
  const key = sessionStorage.getItem(KEY);
  if (key !== null && !isSendable(key)) sessionStorage.removeItem(KEY);
  return sessionStorage.getItem(KEY);
}

/** Gets a key other than `refused` into the session's storage, asking once however many requests want it. */
async function newKey(refused, error) {
  if (sessionStorage.getItem(KEY) !== refused) return;
  asking ??= askKey(refused !== null).finally(() => (asking = null));
  const key = await asking;
  if (!key) throw error;
  sessionStorage.setItem(KEY, key);
}

const json = async (path, options) => (await send(path, options)).json();
const word = (name) => `v1/words/${encodeURIComponent(name)}`;
const body = (value, method = "POST") => ({
  method,
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify(value),
});

export const model = (signal) => json("v1/model", { signal });
export const queue = (signal) => json("v1/queue", { signal });
export const jobs = (signal) => json("v1/jobs", { signal });
export const job = (id, signal) => json(`v1/jobs/${encodeURIComponent(id)}`, { signal });
export const cancelJob = (id) => json(`v1/jobs/${encodeURIComponent(id)}`, { method: "DELETE" });

/** All words, up to `limit`. */
export async function words(limit = 2000, signal) {
  const found = [];
  for (let after = ""; ; ) {
    const page = await json(`v1/words?limit=100&after=${encodeURIComponent(after)}`, { signal });
    found.push(...page.data);
    after = page.data.at(-1)?.name;
    if (!page.has_more || !after || found.length >= limit) return found;
  }
}

export const renameWord = (name, to) => json(word(name), body({ name: to }, "PATCH"));
export const deleteWord = (name) => send(word(name), { method: "DELETE" });
export const refineWord = (name, action, signal) => json(`${word(name)}/refine`, { ...body(action), signal });
export const wordFile = async (name) => (await send(`${word(name)}/file`)).blob();

/** Uploads a word's file. Raises ApiError with status 409 if the name is taken, unless `replace`. */
export function uploadWord(file, { name, replace = false } = {}) {
  const form = formOf(name ? { name } : {});
  form.append("file", file, "word.safetensors");
  return json(`v1/words${replace ? "?replace=true" : ""}`, { method: "POST", body: form });
}

/** Starts learning a word; returns its job. */
export const learn = (images, fields) =>
  json("v1/words/learn", { method: "POST", body: formOf(fields, { image: images }) });

/** Yields the events of a job, those of the past first. Raises ApiError or Unreachable if the server cannot read the job:
 * only an error of learning is the job's own. */
export async function* jobEvents(id, signal) {
  for await (const event of eventsOf(await send(`v1/jobs/${encodeURIComponent(id)}/events`, { signal }))) {
    if (event.type === "error" && event.data.error?.code !== "learning_failed") throw streamError(event.data);
    yield event;
  }
}

export const jobPicture = async (url, signal) => (await send(url, { signal })).blob();

/** Yields the events of a recipe's pictures, with a preview every `previews` steps. */
export async function* generate(recipe, previews, signal) {
  const fields = { ...requestFields(recipe), stream: true, previews, response_format: "b64_json", output_format: "png" };
  const { image, mask } = recipe;
  const response = image
    ? await send("v1/images/edits", { method: "POST", body: formOf(fields, { image, mask }), signal })
    : await send("v1/images/generations", { ...body(fields), signal });
  yield* eventsOf(response);
}

async function* eventsOf(response) {
  const events = readEvents(response);
  for (;;) {
    let next;
    try {
      next = await events.next();
    } catch (error) {
      throw isCancel(error) ? error : new Unreachable("The connection was lost.");
    }
    if (next.done) return;
    yield next.value;
  }
}

/** Whether the server answers that it is ready. Never raises. */
export async function ready() {
  try {
    return (await fetch(new URL("health/ready", document.baseURI), { cache: "no-store" })).ok;
  } catch {
    return false;
  }
}
