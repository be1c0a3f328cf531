/** All runs of this page: starts them, follows their streams, survives the server's restarts, keeps what they made. */

import * as api from "./api.js";
import { pause, whenReady } from "./connection.js";
import { ApiError, Unreachable, isCancel, streamError } from "./errors.js";
import * as gallery from "./gallery.js";
import { missingRuns, single } from "./recipe.js";
import { recipeIn } from "./restore.js";
import { afterEvent, closed, isActive, newRun, openIndexes, restarted } from "./run.js";
import { makeSlots } from "./slots.js";
import { makeStore } from "./store.js";

const PREVIEWS = 1; // steps between previews
const MAX_RUNS = 30; // older ones are in the gallery
const MAX_STREAMS = 3; // a browser opens six connections per host over HTTP/1.1, and the rest of the page needs some

const withinStream = makeSlots(MAX_STREAMS);

/** Newest first. */
export const runs = makeStore([]);

const controllers = new Map();
let count = 0;

/** Starts a recipe and returns its run's id. `extra` is kept with the run. */
export function start(recipe, extra = {}) {
  const id = `run-${(count += 1)}`;
  const controller = new AbortController();
  controllers.set(id, controller);
  runs.set((all) => [newRun(id, recipe, extra), ...all].filter((run, i) => i < MAX_RUNS || isActive(run)));
  follow(id, controller.signal).finally(() => controllers.delete(id));
  return id;
}

export const runOf = (id) => runs.get().find((run) => run.id === id);
export const cancel = (id) => controllers.get(id)?.abort();
export const cancelAll = () => controllers.forEach((controller) => controller.abort());

/** Forgets a run on the page; its pictures stay in the gallery. */
export function dismiss(id) {
  cancel(id);
  runs.set((all) => all.filter((run) => run.id !== id));
}

function change(id, next) {
  runs.set((all) => all.map((run) => (run.id === id ? next(run) : run)));
}

async function follow(id, signal) {
  for (;;) {
    try {
      for (const { first, count } of missingRuns(openIndexes(runOf(id)))) {
        await withinStream(() => followPart(id, first, count, signal), signal);
      }
      change(id, (run) => closed(run, "failed", "The server ended the stream early."));
      return;
    } catch (error) {
      if (isCancel(error) || !runOf(id)) return change(id, (run) => closed(run, "cancelled"));
      try {
        if (!(await recovered(id, error, signal))) {
          return change(id, (run) => closed(run, "failed", error.message));
        }
      } catch {
        return change(id, (run) => closed(run, "cancelled"));
      }
    }
  }
}

/** Waits where waiting helps: until the server is back, or as long as a busy one asks for. */
async function recovered(id, error, signal) {
  if (error instanceof Unreachable) {
    change(id, (run) => ({ ...restarted(run), note: "Waiting for the server. The pictures will continue by themselves." }));
    await whenReady(signal);
    change(id, (run) => ({ ...run, note: "" }));
    return true;
  }
  if (error instanceof ApiError && error.status === 429) {
    const seconds = Math.ceil(error.retryAfter ?? 2);
    change(id, (run) => ({ ...restarted(run), note: `The server is busy. Trying again in ${seconds} s.` }));
    await pause(seconds, signal);
    change(id, (run) => ({ ...run, note: "" }));
    return true;
  }
  return false;
}

async function followPart(id, first, count, signal) {
  const { recipe } = runOf(id);
  const part = { ...recipe, seed: recipe.seed + first, count };
  let left = count;
  for await (const event of api.generate(part, PREVIEWS, signal)) {
    if (event.type === "error") throw streamError(event.data);
    const done = event.type.endsWith(".completed");
    const blob = done ? await blobOf(event.data) : null;
    const index = done ? indexOf(id, first, event.data) : 0;
    const picture = done ? await gallery.keep(blob, { ...(await recipeIn(blob)), ...single(recipe, index) }) : null;
    change(id, (run) => afterEvent(run, first, event, picture));
    if (done && (left -= 1) === 0) return;
  }
  if (isActive(runOf(id))) throw new Unreachable("The connection was lost.");
}

const indexOf = (id, first, data) => (data.index === undefined ? openIndexes(runOf(id))[0] : first + data.index);

/** A picture as a Blob of the server's bytes, parameters included. */
async function blobOf(data) {
  const bytes = Uint8Array.from(atob(data.b64_json), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: `image/${data.output_format ?? "png"}` });
}
