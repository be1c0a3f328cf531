/** Refines a word by likes and dislikes, round by round. */

import * as api from "../api.js";
import { persistently } from "../connection.js";
import { bareName } from "../prompt.js";
import { isJudged, judged, judgement, newRound, question, undoing } from "../refinement.js";
import { announce, notify, refined } from "../state.js";
import { html, useEffect, useRef, useState } from "../vendor/htm-preact.js";
import { refresh } from "../words.js";
import { Dialog } from "./dialog.js";
import { Icon } from "./icons.js";

const PLACES = 6;

export function Refine({ word }) {
  const name = bareName(word.name);
  const [round, setRound] = useState(null);
  const [failure, setFailure] = useState("");
  const closed = useRef(new AbortController());
  const act = async (action) => {
    const { signal } = closed.current;
    setFailure("");
    setRound(null);
    try {
      const until = action.action === "start" ? signal : undefined; // what was judged is kept when the dialog is closed
      const answer = newRound(await persistently(() => api.refineWord(word.name, action, until), signal));
      setRound(answer);
      announce(`Round ${answer.round}`);
    } catch (error) {
      if (!signal.aborted) setFailure(error.message);
    }
  };
  const finish = async () => {
    setFailure("");
    setRound(null); // there is nothing to press twice
    try {
      await api.refineWord(word.name, { action: "finish" });
      await refresh();
      refined.set(null);
      notify(`Refined ${name}.`);
    } catch (error) {
      setRound(round);
      setFailure(error.message);
    }
  };
  useEffect(() => {
    act({ action: "start" });
    return () => closed.current.abort();
  }, []);

  return html`
    <${Dialog} title=${`Refine ${name}`} className="viewer" onClose=${() => refined.set(null)}>
      <div class="stack">
        <p class="quiet">${round ? `Round ${round.round}. ` : ""}${question(round)}</p>
        ${failure && html`<p class="note bad" role="alert">${failure} <button class="link" onClick=${() => act({ action: "start" })}>Try again</button></p>`}
        <ul class="candidates" aria-busy=${round ? "false" : "true"}>
          ${round
            ? round.candidates.map((candidate, i) => html`<${Candidate} key=${`${round.round}-${i}`} candidate=${candidate} index=${i} round=${round} onJudge=${(verdict) => setRound(judged(round, i, verdict))} />`)
            : !failure && Array.from({ length: PLACES }, (_, i) => html`<li key=${i} class="tile skeleton"></li>`)}
        </ul>
        <div class="row end wrap sticky">
          <button class="button plain" disabled=${!round || round.round <= 1} onClick=${() => act(undoing(round))}><${Icon} name="undo" /> Undo the last round</button>
          <button class="button" disabled=${!round || round.round <= 1} onClick=${finish}>Keep the word as it is now</button>
          <button class="button primary" disabled=${!round || !isJudged(round)} onClick=${() => act(judgement(round))}>Next round</button>
        </div>
      </div>
    <//>
  `;
}

function Candidate({ candidate, index, round, onJudge }) {
  const state = round.likes.includes(index) ? "liked" : round.dislikes.includes(index) ? "disliked" : "";
  const press = (list, verdict, label) => html`
    <button class="icon-button" aria-pressed=${list.includes(index) ? "true" : "false"} aria-label=${`${label} picture ${index + 1}`} onClick=${() => onJudge(verdict)}>
      <${Icon} name=${label.toLowerCase()} />
    </button>`;
  return html`
    <li class="candidate">
      <div class=${`tile ${state}`}><img src=${`data:image/${candidate.output_format ?? "png"};base64,${candidate.b64_json}`} alt=${`Candidate ${index + 1}`} /></div>
      <div class="verdict">${press(round.likes, "likes", "Like")} ${press(round.dislikes, "dislikes", "Dislike")}</div>
    </li>
  `;
}
