/** The state of one run, a recipe whose pictures are being made. Pure: events in, state out. */

/** Tiles are "waiting", "running", "done", "failed" or "cancelled". */
export function newRun(id, recipe, extra = {}) {
  const tiles = Array.from({ length: recipe.count }, (_, index) => ({
    index,
    seed: recipe.seed + index,
    status: "waiting",
    step: 0,
    steps: 0,
    preview: null,
    picture: null,
    message: "",
  }));
  return { id, recipe, tiles, note: "", ...extra };
}

const OPEN = ["waiting", "running"];

export const isOpen = (tile) => OPEN.includes(tile.status);
export const isActive = (run) => run.tiles.some(isOpen);
export const openIndexes = (run) => run.tiles.filter(isOpen).map((tile) => tile.index);

/** Between 0 and 1: the share of all steps that are done. */
export function progress(run) {
  const parts = run.tiles.map((tile) => (isOpen(tile) ? (tile.steps ? tile.step / tile.steps : 0) : 1));
  return parts.reduce((sum, part) => sum + part, 0) / parts.length;
}

/** The run after a server's event about pictures `first` and on of it. `picture` is what `completed` carries, as a Blob. */
export function afterEvent(run, first, { type, data }, picture = null) {
  const kind = type.split(".").at(-1);
  if (kind === "preview" || kind === "partial_image") {
    const preview = data.b64_json ? `data:${imageType(data)};base64,${data.b64_json}` : undefined;
    const change = { status: "running", ...(preview ? { preview } : {}) };
    if (data.steps) Object.assign(change, { step: data.step, steps: data.steps });
    return withTile(run, first + (data.index ?? 0), change);
  }
  if (kind === "completed") {
    const index = data.index === undefined ? openIndexes(run)[0] : first + data.index;
    return withTile(run, index, { status: "done", picture, preview: null });
  }
  return run;
}

/** Resets the tiles that are still open: the server lost them and they are asked for again. */
export const restarted = (run) => ({
  ...run,
  tiles: run.tiles.map((tile) => (isOpen(tile) ? { ...tile, status: "waiting", step: 0 } : tile)),
});

/** Closes the tiles that are still open. */
export const closed = (run, status, message = "") => ({
  ...run,
  note: "",
  tiles: run.tiles.map((tile) => (isOpen(tile) ? { ...tile, status, message } : tile)),
});

function withTile(run, index, change) {
  return { ...run, note: "", tiles: run.tiles.map((tile) => (tile.index === index ? { ...tile, ...change } : tile)) };
}

const imageType = (data) => `image/${data.output_format ?? "jpeg"}`;
