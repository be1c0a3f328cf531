/** All words: use, refine, rename, download, delete, and adding a file. */

import * as api from "../api.js";
import { useStore } from "../hooks.js";
import { validName } from "../job.js";
import { bareName } from "../prompt.js";
import { isWord } from "../restore.js";
import { wordFileName } from "../snippets.js";
import { draft, go, model, notify, refined } from "../state.js";
import { day, size } from "../time.js";
import { html, useState } from "../vendor/htm-preact.js";
import { remove, rename, upload, words } from "../words.js";
import { Dialog } from "./dialog.js";
import { Icon } from "./icons.js";
import { Word } from "./marked.js";
import { Menu } from "./menu.js";

export function WordList() {
  const known = useStore(words);
  const info = useStore(model);
  const [asked, setAsked] = useState(null);
  const add = async (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    if (!file) return;
    try {
      if (!isWord(file)) throw new Error("A word’s file ends in .safetensors. Others can be converted: ti-concept convert");
      notify(`Added ${(await upload(file)).name}.`);
    } catch (error) {
      if (error.status === 409) setAsked({ kind: "replace", file, message: error.message });
      else notify(error.message, { bad: true });
    }
  };
  return html`
    <section class="word-list" aria-labelledby="your-words">
      <header class="section-head">
        <h2 id="your-words">Your words</h2>
        <label class="button small file-button"><${Icon} name="upload" /> Add a file<input class="hidden" type="file" accept=".safetensors" onChange=${add} /></label>
      </header>
      ${known === null && html`<ul class="cards" aria-busy="true">${[0, 1, 2].map((i) => html`<li key=${i} class="card skeleton"></li>`)}</ul>`}
      ${known?.length === 0 && html`<p class="quiet empty-line">No words yet. Three pictures are enough for the first one.</p>`}
      <ul class="cards">
        ${known?.map((word) => html`<${Card} key=${word.name} word=${word} canRefine=${Boolean(info?.refine)} onAsk=${setAsked} />`)}
      </ul>
      ${asked && html`<${Question} asked=${asked} onClose=${() => setAsked(null)} />`}
    </section>
  `;
}

function Card({ word, canRefine, onAsk }) {
  const name = bareName(word.name);
  const use = () => {
    draft.set((now) => ({ ...now, prompt: `${now.prompt.trim() || "a photo of a"} <${name}>` }));
    go("create");
  };
  const vectors = Math.max(...Object.values(word.vectors ?? { one: 1 }));
  const items = [
    ...(canRefine ? [{ text: "Refine by likes", run: () => refined.set(word) }] : []),
    { text: "Rename", run: () => onAsk({ kind: "rename", word }) },
    { text: "Download", run: () => download(word) },
    { text: "Delete", run: () => onAsk({ kind: "delete", word }) },
  ];
  return html`
    <li class="card">
      <h3><${Word} name=${name} /></h3>
      <p class="quiet">${[vectors > 1 && `${vectors} vectors`, word.bytes && size(word.bytes), word.created && day(word.created)].filter(Boolean).join(" · ")}</p>
      <div class="card-actions">
        <button class="button small" onClick=${use} aria-label=${`Use ${name}`}>Use</button>
        <${Menu} label=${`More about ${name}`} button=${html`<${Icon} name="more" />`} items=${items} />
      </div>
    </li>
  `;
}

async function download(word) {
  try {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await api.wordFile(word.name));
    link.download = wordFileName(word.name);
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  } catch (error) {
    notify(error.message, { bad: true });
  }
}

function Question({ asked, onClose }) {
  const { kind, word, file } = asked;
  const [name, setName] = useState(word ? bareName(word.name) : "");
  const [failure, setFailure] = useState("");
  const act = async (event) => {
    event.preventDefault();
    try {
      if (kind === "rename") await rename(word, word.name.startsWith("<") ? `<${name}>` : name);
      if (kind === "delete") await remove(word);
      if (kind === "replace") await upload(file, { replace: true });
      onClose();
    } catch (error) {
      setFailure(error.message);
    }
  };
  const shown = word && bareName(word.name);
  const title = { rename: `Rename ${shown}`, delete: `Delete ${shown}?`, replace: "Replace your word?" }[kind];
  const say = { delete: "Pictures made with it stay. The word cannot be brought back.", replace: asked.message, rename: "" }[kind];
  const button = { rename: "Rename", delete: "Delete", replace: "Replace" }[kind];
  return html`
    <${Dialog} title=${title} className="narrow" onClose=${onClose}>
      <form class="stack" onSubmit=${act}>
        ${say && html`<p>${say}</p>`}
        ${kind === "rename" &&
        html`<div class="field">
          <label for="new-name">New name</label>
          <input id="new-name" type="text" value=${name} autocomplete="off" autofocus maxlength="64" onInput=${(event) => setName(event.target.value.replace(/[\s<>]+/g, "-"))} />
        </div>`}
        ${failure && html`<p class="note bad" role="alert">${failure}</p>`}
        <div class="row end">
          <button type="button" class="button" onClick=${onClose}>Keep it</button>
          <button type="submit" class="button primary" disabled=${kind === "rename" && !validName(name)}>${button}</button>
        </div>
      </form>
    <//>
  `;
}
