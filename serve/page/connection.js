/** Whether the server is there, and waiting until it is. */

import * as api from "./api.js";
import { Unreachable } from "./errors.js";
import { makeStore } from "./store.js";

/** "online" or "reconnecting". */
export const connection = makeStore("online");

let waiting = null;

/** Resolves when the server is ready; raises AbortError if `signal` aborts first. */
export async function whenReady(signal) {
  waiting ??= poll().finally(() => (waiting = null));
  await Promise.race([waiting, aborted(signal)]);
}

/** Runs `task` again, after the server is back, as often as it raises Unreachable. */
export async function persistently(task, signal) {
  for (;;) {
    try {
      return await task();
    } catch (error) {
      if (!(error instanceof Unreachable)) throw error;
      await whenReady(signal);
    }
  }
}

/** Resolves after some seconds; raises AbortError if `signal` aborts first. */
export const pause = (seconds, signal) =>
  Promise.race([new Promise((resolve) => setTimeout(resolve, seconds * 1000)), aborted(signal)]);

async function poll() {
  connection.set("reconnecting");
  for (let seconds = 0.5; ; seconds = Math.min(5, seconds * 1.5)) {
    await pause(seconds);
    if (await api.ready()) break;
  }
  connection.set("online");
}

function aborted(signal) {
  return new Promise((_, reject) => {
    const abort = () => reject(new DOMException("cancelled", "AbortError"));
    if (signal?.aborted) abort();
    signal?.addEventListener("abort", abort, { once: true });
  });
}
