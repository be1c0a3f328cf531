/** The learning jobs of this person: starts them, follows them, finds them again after a reload or a restart. */

import * as api from "./api.js";
import { pause, persistently } from "./connection.js";
import { Unreachable, isCancel } from "./errors.js";
import { afterEvent, found, isEnded, nameOf, newJob, withPictures } from "./job.js";
import { notify } from "./state.js";
import { makeStore } from "./store.js";
import * as words from "./words.js";

/** The job that the page shows, or null. */
export const current = makeStore(null);

const ROUNDING_SECONDS = 2; // the times of answers and of jobs are whole seconds

let follower = null;

/** What was sent when the server could not be reached, and when: `{images, name, since}`. Its job may begin later. */
let unanswered = null;

/**
 * Starts learning. If the server's answer was lost, shows the job that runs: that of this try, not one of the same name
 * that began before it, with other pictures. Raises ApiError or Unreachable.
 */
export async function start(images, fields) {
  const { name } = fields;
  const isRepeated = unanswered?.images === images && unanswered.name === name;
  const since = isRepeated ? unanswered.since : performance.now();
  unanswered = null;
  try {
    show(await api.learn(images, fields));
  } catch (error) {
    const isLost = error instanceof Unreachable;
    if (!isLost && error.code !== "word_exists") throw error;
    const after = isLost ? 0 : error.date - (performance.now() - since) / 1000 - ROUNDING_SECONDS;
    if (await persistently(() => resume({ name, after }))) return;
    if (isLost) unanswered = { images, name, since };
    await words.refresh().catch(() => {}); // it may have been learned by now
    throw error;
  }
}

/** Shows a job that is still running, of any name or of one, created after a time. Returns whether there is one. */
export async function resume({ name, after = 0, signal } = {}) {
  const { data } = await api.jobs(signal);
  const isWanted = (job) => job.kind === "learn" && !isEnded(job) && (!name || (nameOf(job) === name && job.created >= after));
  const running = data.find(isWanted);
  if (running) show(running);
  return Boolean(running);
}

export async function cancel() {
  const { id } = current.get(); // it may be another one, or none, when the server is back
  try {
    const { status } = await persistently(() => api.cancelJob(id));
    if (status !== "cancelled" || current.get()?.id !== id) return; // its last event says how it ended, or will
    follower?.abort();
    update(id, (job) => ({ ...job, status: "cancelled" }));
  } catch (error) {
    notify(error.message, { bad: true });
  }
}

export function dismiss() {
  follower?.abort();
  current.set(null);
}

function show(data) {
  follower?.abort();
  follower = new AbortController();
  current.set(newJob(data));
  follow(data.id, follower.signal).catch((error) => {
    if (!isCancel(error)) update(data.id, (job) => ({ ...job, status: "failed", error: { message: error.message } }));
  });
}

/** Reads a job's events until it ends, over as many connections as it takes. */
async function follow(id, signal) {
  await persistently(async () => {
    const known = await api.job(id, signal);
    update(id, (job) => ({ ...job, ...known, pictures: job.pictures }));
    if (!isEnded(known)) for await (const event of api.jobEvents(id, signal)) update(id, (job) => afterEvent(job, event));
    if (current.get()?.id === id && !isEnded(current.get())) throw new Unreachable("The connection was lost.");
    const { previews } = await api.job(id, signal); // those that no event brought are drawn now
    update(id, (job) => previews.reduce(withPictures, job));
    loadPictures(id, signal);
  }, signal);
  if (current.get()?.status === "succeeded") await persistently(() => words.refresh(signal), signal);
}

function update(id, next) {
  current.set((job) => (job?.id === id ? next(job) : job));
}

/** Loads pictures that were only named: an <img> could not send the key. */
function loadPictures(id, signal) {
  for (const { src, url, step, index } of current.get()?.pictures ?? []) {
    if (src || !url) continue;
    loaded(url, signal).then(
      (blob) => update(id, (job) => withPictures(job, { ...found(job, step, index), src: URL.createObjectURL(blob) })),
      () => {}, // its place stays empty
    );
  }
}

/** A picture of a job, asked for again while the server has too much to do. */
async function loaded(url, signal) {
  for (;;) {
    try {
      return await persistently(() => api.jobPicture(url, signal), signal);
    } catch (error) {
      if (error.status !== 429) throw error;
      await pause(error.retryAfter ?? 1, signal);
    }
  }
}
