/** What this person waits for: place, seconds left, progress, and a way to stop it. */

import * as api from "../api.js";
import { connection, pause } from "../connection.js";
import { Unreachable } from "../errors.js";
import { useStore } from "../hooks.js";
import { isEnded, nameOf, progress as learned } from "../job.js";
import * as learning from "../learning.js";
import { bareName } from "../prompt.js";
import { isActive, progress } from "../run.js";
import { cancel, cancelAll, runs } from "../runs.js";
import { duration } from "../time.js";
import { html, useEffect, useRef, useState } from "../vendor/htm-preact.js";
import { Icon } from "./icons.js";
import { Marked, Word } from "./marked.js";

const SECONDS = 1; // between two looks

export function Queue() {
  const active = useStore(runs).filter(isActive);
  const job = useStore(learning.current);
  const teaching = job && !isEnded(job) ? job : null;
  const online = useStore(connection) === "online";
  const [entries, setEntries] = useState([]);
  const [open, setOpen] = useState(false);
  const root = useRef();
  const busy = active.length > 0;

  useEffect(() => {
    if (!busy || !online) return setEntries([]);
    const controller = new AbortController();
    watch(setEntries, controller.signal).catch(() => {});
    return () => controller.abort();
  }, [busy, online]);

  useEffect(() => {
    if (!open) return;
    const outside = (event) => !root.current.contains(event.target) && setOpen(false);
    document.addEventListener("pointerdown", outside);
    return () => document.removeEventListener("pointerdown", outside);
  }, [open]);

  const count = active.length + (teaching ? 1 : 0);
  const seconds = Math.max(0, ...entries.map((entry) => entry.seconds_left ?? 0));
  const isWhole = entries.length >= active.length; // the server does not know of runs that wait for a stream
  const place = Math.max(0, ...entries.map((entry) => entry.position ?? 0));
  return html`
    <div class="queue" ref=${root} onKeyDown=${(event) => event.key === "Escape" && setOpen(false)}>
      <button class=${`queue-button ${count ? "busy" : ""}`} aria-expanded=${open ? "true" : "false"} aria-controls="queue"
        aria-label=${count ? `Queue: ${count} in progress` : "Queue: nothing is in progress"} onClick=${() => setOpen(!open)}>
        <span class=${count ? "pulse" : "dot"} aria-hidden="true"></span>
        <span class="queue-text">${count ? (busy && seconds && isWhole ? `${duration(seconds)} left` : `${count} in progress`) : "Idle"}</span>
      </button>
      ${open &&
      html`<section id="queue" class="queue-list" aria-label="Queue">
        ${count === 0 && html`<p class="quiet">Nothing is waiting.</p>`}
        ${place > 0 && html`<p class="quiet">${place} picture${place > 1 ? "s are" : " is"} ahead of yours${seconds ? `, about ${duration(seconds)} left` : ""}.</p>`}
        ${teaching &&
        html`<div class="queue-entry">
          <span>Learning <${Word} name=${bareName(nameOf(teaching))} /></span>
          <progress max="1" value=${learned(teaching)} aria-label="Learned"></progress>
          <button class="icon-button" aria-label="Cancel learning" onClick=${learning.cancel}><${Icon} name="stop" /></button>
        </div>`}
        ${active.map(
          (run) => html`<div key=${run.id} class="queue-entry">
            <span class="cut"><${Marked} text=${run.recipe.prompt} /></span>
            <progress max="1" value=${progress(run)} aria-label="Drawn"></progress>
            <button class="icon-button" aria-label=${`Cancel ${run.recipe.prompt}`} onClick=${() => cancel(run.id)}><${Icon} name="stop" /></button>
          </div>`,
        )}
        ${active.length > 1 && html`<button class="button small" onClick=${cancelAll}>Cancel all pictures</button>`}
      </section>`}
    </div>
  `;
}

/** Shows the requests in progress, none while the server does not say, until `signal` aborts or it refuses to say. */
export async function watch(show, signal) {
  for (;;) {
    try {
      show((await api.queue(signal)).data);
    } catch (error) {
      show([]);
      if (!(error instanceof Unreachable)) throw error;
    }
    await pause(SECONDS, signal);
  }
}
