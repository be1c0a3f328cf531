/** Paints the area of a picture that is to be repainted, by pointer or by keyboard. */

import { useUrl } from "../hooks.js";
import { maskPixels, paint, picturePoint, withLine } from "../mask.js";
import { randomSeed } from "../recipe.js";
import { start } from "../runs.js";
import { go, masked, notify } from "../state.js";
import { html, useEffect, useRef, useState } from "../vendor/htm-preact.js";
import { tokens } from "../words.js";
import { Dialog } from "./dialog.js";
import { Icon } from "./icons.js";
import { PromptBox } from "./prompt-box.js";

const COLOR = "rgb(255 221 51)";

export function MaskEditor({ picture }) {
  const { blob, recipe } = picture;
  const url = useUrl(blob);
  const canvas = useRef();
  const [strokes, setStrokes] = useState([]);
  const [size, setSize] = useState(0.22); // of the shorter side
  const [erase, setErase] = useState(false);
  const [prompt, setPrompt] = useState(recipe.prompt);
  const [strength, setStrength] = useState(0.8);
  const [cursor, setCursor] = useState(null);
  const [natural, setNatural] = useState(null);
  const drawing = useRef(null); // where the pointer was last, while it paints
  const pixels = natural ? size * Math.min(natural.width, natural.height) : 0;

  useEffect(() => {
    if (natural) paint(canvas.current.getContext("2d"), strokes, COLOR);
  }, [strokes, natural]);

  const brush = { size: pixels, erase };
  const dab = (point) => setStrokes((all) => [...all, { ...brush, points: [point] }]);
  const line = (from, to) => setStrokes((all) => withLine(all, from, to, brush));
  const at = (event) => picturePoint(event.clientX, event.clientY, canvas.current.getBoundingClientRect(), natural.width, natural.height);
  const onDown = (event) => {
    event.preventDefault();
    if (!natural) return;
    canvas.current.setPointerCapture(event.pointerId);
    canvas.current.focus({ preventScroll: true });
    drawing.current = at(event);
    dab(drawing.current);
  };
  const onMove = (event) => {
    if (!natural) return;
    const point = at(event);
    setCursor(point);
    if (!drawing.current) return;
    line(drawing.current, point);
    drawing.current = point;
  };
  const onKey = (event) => {
    if (!natural) return;
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const now = cursor ?? { x: natural.width / 2, y: natural.height / 2 };
    if (moves[event.key]) {
      const [dx, dy] = moves[event.key];
      const stride = pixels / 3;
      const next = { x: clamp(now.x + dx * stride, natural.width), y: clamp(now.y + dy * stride, natural.height) };
      setCursor(next);
      if (event.shiftKey) line(now, next);
    } else if (event.key === " " || event.key === "Enter") dab(now);
    else return;
    event.preventDefault();
  };

  const submit = async (event) => {
    event?.preventDefault();
    if (!natural) return;
    const context = canvas.current.getContext("2d");
    const { width, height } = natural;
    const mask = maskPixels(context.getImageData(0, 0, width, height).data);
    if (!mask) return notify("Paint the area to repaint first.", { bad: true });
    const file = new OffscreenCanvas(width, height);
    file.getContext("2d").putImageData(new ImageData(mask, width, height), 0, 0);
    masked.set(null);
    const made = { ...recipe, prompt: prompt.trim() || recipe.prompt, image: blob, mask: await file.convertToBlob({ type: "image/png" }), width, height };
    start({ ...made, strength, count: 4, seed: randomSeed() }, { label: "Repainted a part" });
    go("create");
  };

  const tool = (name, label, pressed, run) => html`
    <button type="button" class="button small" aria-pressed=${pressed === undefined ? undefined : String(pressed)} disabled=${pressed === undefined && !strokes.length} onClick=${run}>
      <${Icon} name=${name} /> ${label}
    </button>`;
  return html`
    <${Dialog} title="Repaint a part" className="viewer" onClose=${() => masked.set(null)}>
      <form class="viewer-body" onSubmit=${submit}>
        <div class="viewer-stage">
          <div class="mask" style=${{ "--ratio": natural ? natural.width / natural.height : 1 }}>
            ${url && html`<img src=${url} alt="" onLoad=${(event) => setNatural({ width: event.target.naturalWidth, height: event.target.naturalHeight })} />`}
            <canvas
              ref=${canvas}
              width=${natural?.width ?? 1}
              height=${natural?.height ?? 1}
              tabindex="0"
              role="application"
              aria-roledescription="painting area"
              aria-label="Area to repaint. Arrow keys move the brush, space paints, shift with arrow keys paints a line."
              onPointerDown=${onDown}
              onPointerMove=${onMove}
              onPointerUp=${() => (drawing.current = null)}
              onPointerCancel=${() => (drawing.current = null)}
              onPointerLeave=${() => drawing.current || setCursor(null)}
              onKeyDown=${onKey}
            ></canvas>
            ${cursor && natural && html`<span class="brush" style=${brushStyle(cursor, pixels, natural)}></span>`}
          </div>
        </div>
        <div class="viewer-side">
          <div class="row wrap">
            ${tool("brush", "Paint", !erase, () => setErase(false))} ${tool("close", "Erase", erase, () => setErase(true))}
            ${tool("undo", "Undo", undefined, () => setStrokes(strokes.slice(0, -1)))} ${tool("trash", "Clear", undefined, () => setStrokes([]))}
          </div>
          <div class="field"><label for="brush-size">Brush</label>
            <input id="brush-size" type="range" min="0.04" max="0.6" step="0.02" value=${size} onInput=${(event) => setSize(Number(event.target.value))} /></div>
          <div class="field"><label for="repaint">Change <strong>${Math.round(strength * 100)} %</strong></label>
            <input id="repaint" type="range" min="0.2" max="1" step="0.05" value=${strength} onInput=${(event) => setStrength(Number(event.target.value))} /></div>
          <${PromptBox} id="mask-prompt" label="What should be there" value=${prompt} tokens=${tokens()} onInput=${setPrompt} onSubmit=${submit} />
          <button type="submit" class="button primary large" aria-disabled=${strokes.length ? "false" : "true"}>Repaint</button>
        </div>
      </form>
    <//>
  `;
}

const clamp = (value, limit) => Math.min(limit, Math.max(0, value));

function brushStyle({ x, y }, size, { width, height }) {
  const percent = (part, whole) => `${(100 * part) / whole}%`;
  return { left: percent(x, width), top: percent(y, height), width: percent(size, width), height: percent(size, height) };
}
