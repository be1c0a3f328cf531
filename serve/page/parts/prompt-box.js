/** A prompt: text with its words marked, completion after `<`, and a chip for each word. */

import { bareName, completion, pieces, withWord, written } from "../prompt.js";
import { html, useLayoutEffect, useRef, useState } from "../vendor/htm-preact.js";

export function PromptBox({ id, label, value, onInput, onSubmit, tokens, placeholder, hole = false, describedBy }) {
  const field = useRef();
  const caretAfter = useRef(null);
  const [open, setOpen] = useState(null);
  const [active, setActive] = useState(0);

  useLayoutEffect(() => {
    if (caretAfter.current === null) return;
    field.current.focus();
    field.current.setSelectionRange(caretAfter.current, caretAfter.current);
    caretAfter.current = null;
  }, [value]);

  const look = () => {
    const { value: text, selectionStart, selectionEnd } = field.current;
    const found = selectionStart === selectionEnd ? completion(text, selectionStart, tokens) : null;
    setOpen(found?.matches.length ? found : null);
    setActive(0);
  };
  const choose = (token) => insert(open.start, open.end, token);
  const insert = (start, end, token) => {
    const next = withWord(value, start, end, token);
    caretAfter.current = next.caret;
    setOpen(null);
    onInput(next.text);
  };
  const onKeyDown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) return event.preventDefault(), onSubmit?.();
    if (!open) return;
    const { length } = open.matches;
    if (event.key === "ArrowDown") setActive((active + 1) % length);
    else if (event.key === "ArrowUp") setActive((active + length - 1) % length);
    else if (event.key === "Enter" || event.key === "Tab") choose(open.matches[active]);
    else if (event.key === "Escape") setOpen(null);
    else return;
    event.preventDefault();
  };

  return html`
    <div class="prompt">
      <label class="prompt-label" for=${id}>${label}</label>
      <div class="prompt-field">
        <div class="prompt-marks" aria-hidden="true"><${Marks} text=${value} tokens=${tokens} hole=${hole} />${value ? "\u200b" : placeholder}</div>
        <textarea
          id=${id}
          ref=${field}
          rows="1"
          spellcheck="false"
          autocomplete="off"
          value=${value}
          placeholder=${placeholder}
          maxlength="20000"
          aria-autocomplete="list"
          aria-describedby=${describedBy}
          aria-controls=${open ? `${id}-list` : undefined}
          aria-activedescendant=${open ? `${id}-${active}` : undefined}
          onInput=${(event) => (onInput(event.target.value), look())}
          onClick=${look}
          onBlur=${() => setOpen(null)}
          onKeyDown=${onKeyDown}
        ></textarea>
        ${open &&
        html`<ul class="completion" id=${`${id}-list`} role="listbox" aria-label="Words">
          ${open.matches.map(
            (token, i) => html`<li
              key=${token}
              id=${`${id}-${i}`}
              role="option"
              aria-selected=${i === active ? "true" : "false"}
              onPointerDown=${(event) => (event.preventDefault(), choose(token))}
            >
              ${written(token)}
            </li>`,
          )}
        </ul>`}
      </div>
      <span class="hidden" role="status">${open ? `${open.matches.length} words, use the arrow keys` : ""}</span>
      ${tokens.length > 0 &&
      html`<div class="chips" role="group" aria-label="Insert a word">
        ${tokens.slice(0, 12).map(
          (token) => html`<button
            key=${token}
            type="button"
            class="chip"
            onClick=${() => insert(field.current.selectionStart ?? value.length, field.current.selectionEnd ?? value.length, token)}
          >
            ${bareName(token)}
          </button>`,
        )}
        ${tokens.length > 12 && html`<span class="quiet">type &lt; for ${tokens.length - 12} more</span>`}
      </div>`}
    </div>
  `;
}

/** The prompt's text again, behind the field: only the marks are visible. */
function Marks({ text, tokens, hole }) {
  const known = new Set(tokens.map(bareName));
  const mark = (name) => (known.has(name) || known.has(name.toLowerCase()) ? "word" : "word unknown");
  return pieces(text).map(({ text, name }) => {
    if (name) return html`<span class=${mark(name)}>${text}</span>`;
    if (!hole) return text;
    return text.split("{}").map((part, i) => html`${i > 0 && html`<span class="word">{}</span>`}${part}`);
  });
}
