/** Asks for the server's key, after it refused a request without one. */

import { html, useState } from "../vendor/htm-preact.js";
import { Dialog } from "./dialog.js";

export function KeyDialog({ refused, onKey }) {
  const [value, setValue] = useState("");
  const submit = (event) => (event.preventDefault(), value.trim() && onKey(value.trim()));
  return html`
    <${Dialog} title="This server asks for a key" className="narrow" onClose=${() => onKey(null)}>
      <form class="stack" onSubmit=${submit}>
        <p class="quiet">It is kept until you close this tab, and goes nowhere else.</p>
        <div class="field">
          <label for="key">Key</label>
          <input id="key" type="password" autocomplete="off" autofocus value=${value} aria-invalid=${refused ? "true" : "false"}
            aria-describedby="key-note" onInput=${(event) => setValue(event.target.value)} />
        </div>
        <p id="key-note" class=${refused ? "note bad" : "hidden"} role=${refused ? "alert" : undefined}>${refused ? "The server does not know this key." : ""}</p>
        <button class="button primary" type="submit" aria-disabled=${value.trim() ? "false" : "true"}>Continue</button>
      </form>
    <//>
  `;
}
