/** Asks for the server's key, after it refused a request without one. */

import { isSendable } from "../api.js";
import { html, useState } from "../vendor/htm-preact.js";
import { Dialog } from "./dialog.js";

export function KeyDialog({ refused, onKey }) {
  const [value, setValue] = useState("");
  const [failure, setFailure] = useState(refused ? "The server does not know this key." : "");
  const submit = (event) => {
    event.preventDefault();
    const key = value.trim();
    if (key && !isSendable(key)) return setFailure(sayUnsendable(key));
    if (key) onKey(key);
  };
  return html`
    <${Dialog} title="This server asks for a key" className="narrow" onClose=${() => onKey(null)}>
      <form class="stack" onSubmit=${submit}>
        <p class="quiet">It is kept until you close this tab, and goes nowhere else.</p>
        <div class="field">
          <label for="key">Key</label>
          <input id="key" type="password" autocomplete="off" autofocus value=${value} aria-invalid=${failure ? "true" : "false"}
            aria-describedby="key-note" onInput=${(event) => setValue(event.target.value)} />
        </div>
        <p id="key-note" class=${failure ? "note bad" : "hidden"} role=${failure ? "alert" : undefined}>${failure}</p>
        <button class="button primary" type="submit" aria-disabled=${value.trim() ? "false" : "true"}>Continue</button>
      </form>
    <//>
  `;
}

function sayUnsendable(key) {
  const [character] = key.match(/[^ -~]/u);
  const shown = /[\p{L}\p{N}\p{P}\p{S}]/u.test(character) ? character : "an invisible character";
  return `A key has only plain ASCII characters; this one contains ${shown}. Copy it again as it was issued.`;
}
