/** The words page: teach a word, watch it being learned, and all words there are. */

import { useStore } from "../hooks.js";
import * as learning from "../learning.js";
import { model } from "../state.js";
import { html } from "../vendor/htm-preact.js";
import { Learning } from "./learning.js";
import { Teach } from "./teach.js";
import { WordList } from "./word-list.js";

export function Words() {
  const job = useStore(learning.current);
  const info = useStore(model);
  const teaches = !job && info?.learn !== false;
  return html`
    <h1 tabindex="-1" class=${job ? "hidden" : "title"}>${teaches ? "Teach it a word" : "Words"}</h1>
    ${teaches && html`<p class="lede">A few pictures and a name. Then use the word in any sentence.</p>`}
    ${job ? html`<${Learning} job=${job} />` : teaches ? html`<${Teach} />` : html`<${NoLearning} />`}
    <${WordList} />
  `;
}

const NoLearning = () => html`
  <p class="note">
    This server uses words but cannot learn them. For that it needs PyTorch
    (<code>pip install -c constraints.txt -e '.[train]'</code> in a checkout of oneword) and <code>ti-serve --model</code>. You can add a word’s file below.
  </p>
`;
