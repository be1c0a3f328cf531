/** The frame's head: name, parts, queue, and whether the server is there. */

import { connection } from "../connection.js";
import { useStore } from "../hooks.js";
import { html } from "../vendor/htm-preact.js";
import { Icon } from "./icons.js";
import { Queue } from "./queue.js";

const PARTS = { create: "Create", words: "Words", compare: "Compare", gallery: "Gallery" };

export function Header({ name }) {
  const state = useStore(connection);
  return html`
    <header class="head">
      <a class="logo" href="#/create" aria-label="oneword, start">one<span class="word">word</span></a>
      <nav class="nav" aria-label="Parts">
        ${Object.entries(PARTS).map(
          ([part, label]) => html`<a key=${part} href=${`#/${part}`} aria-current=${part === name ? "page" : undefined}><${Icon} name=${part} /><span>${label}</span></a>`,
        )}
      </nav>
      <${Queue} />
    </header>
    <div role="status" class="connection">
      ${state === "reconnecting" && html`<p><span class="pulse" aria-hidden="true"></span> Waiting for the server. Everything continues when it is back.</p>`}
    </div>
  `;
}
