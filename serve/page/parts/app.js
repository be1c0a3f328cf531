/** The whole page: frame, the part that the address names, and what lies above it. */

import * as gallery from "../gallery.js";
import * as learning from "../learning.js";
import { setKeyPrompt } from "../api.js";
import { persistently } from "../connection.js";
import { isCancel } from "../errors.js";
import { useStore } from "../hooks.js";
import { leftOut, parseParameters } from "../parameters.js";
import { isPicture, isWord, parametersIn, sayRestored } from "../restore.js";
import { announcement, draft, edit, go, masked, model, notify, readModel, refined, route, viewed } from "../state.js";
import { cut } from "../upload.js";
import { html, useEffect, useRef, useState } from "../vendor/htm-preact.js";
import * as teaching from "../teaching.js";
import * as words from "../words.js";
import { Compare } from "./compare.js";
import { Create } from "./create.js";
import { Gallery } from "./gallery.js";
import { Header } from "./header.js";
import { KeyDialog } from "./key-dialog.js";
import { MaskEditor } from "./mask-editor.js";
import { Notices } from "./notices.js";
import { Refine } from "./refine.js";
import { Viewer } from "./viewer.js";
import { Words } from "./words.js";

const PARTS = { create: Create, words: Words, compare: Compare, gallery: Gallery };
const TITLES = { create: "Create", words: "Words", compare: "Compare", gallery: "Gallery" };
const UNSTORED = "The browser does not store new pictures: download those that you want to keep.";

export function App() {
  const name = useStore(route);
  const view = useStore(viewed);
  const mask = useStore(masked);
  const word = useStore(refined);
  const said = useStore(announcement);
  const [failure, setFailure] = useState("");
  const [key, setKey] = useState(null);
  const [dragging, setDragging] = useState(false);
  const main = useRef();
  const first = useRef(true);

  useEffect(() => {
    const unsubscribe = gallery.volatile.subscribe((isSet) => isSet && notify(UNSTORED, { bad: true }));
    setKeyPrompt((refused) => new Promise((resolve) => setKey({ refused, resolve: (value) => (setKey(null), resolve(value)) })));
    const controller = new AbortController();
    load(controller.signal).catch((error) => isCancel(error) || setFailure(error.message));
    return () => (controller.abort(), unsubscribe());
  }, []);

  useEffect(() => {
    document.title = `${TITLES[name]} · oneword`;
    if (!first.current) main.current.querySelector("h1")?.focus({ preventScroll: true });
    if (!first.current) window.scrollTo(0, 0);
    first.current = false;
  }, [name]);

  const Part = PARTS[name];
  const files = (event) => event.dataTransfer?.types.includes("Files");
  return html`
    <div
      class=${`page ${dragging ? "dragging" : ""}`}
      onDragEnter=${(event) => files(event) && setDragging(true)}
      onDragOver=${(event) => files(event) && event.preventDefault()}
      onDragLeave=${(event) => event.relatedTarget === null && setDragging(false)}
      onDropCapture=${() => setDragging(false)}
      onDrop=${(event) => (event.preventDefault(), take(event.dataTransfer.files))}
      onPaste=${(event) => event.clipboardData.files.length && take(event.clipboardData.files)}
    >
      <a class="skip" href="#main" onClick=${(event) => (event.preventDefault(), main.current.focus())}>Skip to content</a>
      <${Header} name=${name} />
      <main id="main" ref=${main} tabindex="-1">
        ${failure && html`<p class="note bad" role="alert">${failure} <button class="link" onClick=${() => location.reload()}>Try again</button></p>`}
        <${Part} />
      </main>
      ${view && html`<${Viewer} view=${view} />`}
      ${mask && html`<${MaskEditor} picture=${mask} />`}
      ${word && html`<${Refine} word=${word} />`}
      ${key && html`<${KeyDialog} refused=${key.refused} onKey=${key.resolve} />`}
      <${Notices} />
      <span class="hidden" role="status">${said}</span>
    </div>
  `;
}

/** Reads what the page starts with. The first word to teach is the first thing to see where there is none. */
async function load(signal) {
  await Promise.all([
    gallery.open(),
    persistently(async () => {
      await readModel(signal);
      await words.refresh(signal);
      if (model.get().learn !== false) await learning.resume({ signal });
    }, signal),
  ]);
  if (!location.hash && (learning.current.get() || words.words.get().length === 0)) go("words");
}

/** The longer side of a picture to start from: what the model draws by default. */
const startSide = ({ defaults }) => Math.max(defaults.width, defaults.height);

/** Files dropped anywhere. Pictures are for teaching on the words page, if the server learns; elsewhere one with a recipe
 * restores it, and another one is a start. A word's file is added. */
async function take(files) {
  const [file] = files;
  if (!file) return;
  if (route.get() === "words" && [...files].every(isPicture) && !learning.current.get()) {
    if (model.get()?.learn !== false) return teaching.add([...files]);
    return notify("This server cannot learn words. Drop the picture on Create to start from it.", { bad: true });
  }
  try {
    if (isWord(file)) {
      const word = await words.upload(file);
      notify(`Added ${word.name}.`);
      return go("words");
    }
    if (!isPicture(file)) return notify(`${file.name} is neither a picture nor a word’s file.`, { bad: true });
    const text = await parametersIn(file);
    const recipe = parseParameters(text);
    if (recipe) {
      const left = [...leftOut(text), ...edit({ ...recipe, count: 1 })];
      return notify(sayRestored(left), { bad: left.length > 0 });
    }
    if (!model.get()) return notify("The server has not answered yet: drop the picture again when it has.", { bad: true });
    if (model.get().edits === false) return notify("This server’s model cannot start from a picture.", { bad: true });
    const { blob, width, height } = await cut(file, model.get().size_multiple, startSide(model.get()));
    draft.set((now) => ({ ...now, image: blob, mask: undefined, strength: 0.6, width, height }));
    go("create");
    notify("This picture is now the start of your next one.");
  } catch (error) {
    notify(error.message, { bad: true });
  }
}
