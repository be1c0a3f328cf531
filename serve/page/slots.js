/** A limited number of slots for tasks; a task that finds none free waits for its turn, first come, first served. */

export function makeSlots(count) {
  const waiting = [];
  let free = count;

  function release() {
    if (waiting.length) waiting.shift()();
    else free += 1;
  }

  /** Resolves when the caller has a slot; raises AbortError if `signal` aborts first. */
  async function acquire(signal) {
    signal?.throwIfAborted();
    if (free > 0) {
      free -= 1;
      return;
    }
    await new Promise((resolve, reject) => {
      const enter = () => {
        signal?.removeEventListener("abort", leave);
        resolve();
      };
      const leave = () => {
        waiting.splice(waiting.indexOf(enter), 1);
        reject(signal.reason);
      };
      waiting.push(enter);
      signal?.addEventListener("abort", leave, { once: true });
    });
  }

  /** Runs a task in a slot. */
  return async function within(task, signal) {
    await acquire(signal);
    try {
      return await task();
    } finally {
      release();
    }
  };
}
