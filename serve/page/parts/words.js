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
  return html`
    <h1 tabindex="-1" class="title">${job ? "Words" : "Teach it a word"}</h1>
    ${!job && html`<p class="lede">A few pictures and a name. Then use the word in any sentence.</p>`}
    ${job ? html`<${Learning} job=${job} />` : info?.learn === false ? html`<${NoLearning} />` : html`<${Teach} />`}
    <${WordList} />
  `;
}

const NoLearning = () => html`
  <p class="panel note">
    This server draws words but cannot learn them. Install its learning part with <code>pip install 'oneword[train]'</code>, or add a word’s file below.
  </p>
`;
