/** Line icons on a grid of 20. Decorative: the control that holds one names itself. */

import { html } from "../vendor/htm-preact.js";

const PATHS = {
  add: "M10 4v12M4 10h12",
  back: "m12 4-6 6 6 6",
  brush: "M4 16c3 0 4-1.4 4-3a2 2 0 0 0-4 0c0 1.4-.4 2.2-1 3zM8.5 11.5 15.5 4a1.4 1.4 0 0 1 2 2l-7 7.5",
  check: "m4 10.5 4 4 8-9",
  close: "m5 5 10 10M15 5 5 15",
  compare: "M3 4h6v12H3zM11 4h6v12h-6z",
  copy: "M7 7h9v9H7zM4 13V4h9",
  create: "M10 3v4m0 6v4M3 10h4m6 0h4M5.5 5.5 7.5 7.5m5 5 2 2m0-9-2 2m-5 5-2 2",
  download: "M10 3v9m-4-3.5 4 4 4-4M4 16.5h12",
  down: "m5 8 5 5 5-5",
  dislike: "M6 4v8m0 0 3.5 5c1 0 1.7-.7 1.7-1.7V12h4.3a1.5 1.5 0 0 0 1.5-1.8l-.9-4.9A1.6 1.6 0 0 0 14.5 4H6m0 8H3V4h3",
  gallery: "M3 4h14v12H3zM3 13l4-4 4 4 2.5-2.5L17 14M12.5 7.5h.01",
  like: "M6 16V8m0 0 3.5-5c1 0 1.7.7 1.7 1.7V8h4.3A1.5 1.5 0 0 1 17 9.8l-.9 4.9A1.6 1.6 0 0 1 14.5 16H6m0-8H3v8h3",
  lock: "M5 9h10v8H5zM7 9V6.5a3 3 0 0 1 6 0V9",
  more: "M4 10h.01M10 10h.01M16 10h.01",
  next: "m8 4 6 6-6 6",
  picture: "M3 4h14v12H3zM3 13l4-4 4 4 2.5-2.5L17 14",
  rename: "M4 16h3L16 7l-3-3-9 9zM11 6l3 3",
  repeat: "M4 9a6 6 0 0 1 10.5-3L16 7.5M16 4v3.5h-3.5M16 11a6 6 0 0 1-10.5 3L4 12.5M4 16v-3.5h3.5",
  settings: "M3 6h8m4 0h2M3 14h2m4 0h8M11 4v4m4-4v4h-4V4zM5 12v4h4v-4z",
  stop: "M6.5 6.5h7v7h-7z",
  trash: "M4 6h12M8 6V4h4v2m-6.5 0 .8 10.5h7.4L14.5 6",
  undo: "M7 4 3.5 7.5 7 11M4 7.5h8a4.5 4.5 0 0 1 0 9H8",
  unlock: "M5 9h10v8H5zM7 9V6.5a3 3 0 0 1 5.8-1",
  upload: "M10 13V4m-4 3.5 4-4 4 4M4 16.5h12",
  words: "m7 5-5 5 5 5m6-10 5 5-5 5",
};

export const Icon = ({ name }) => html`
  <svg class="icon" viewBox="0 0 20 20" aria-hidden="true" focusable="false"><path d=${PATHS[name]} fill=${name === "stop" ? "currentColor" : undefined} /></svg>
`;
