/** The state of a learning job: events in, state out. Pure. */

export const PREVIEW_STEPS = [0, 5, 10, 20, 35, 50];
export const MIN_PICTURES = 3;
export const MAX_PICTURES = 5;
const MAX_NAME = 62; // with < and > it is a token of 64 characters

const ENDED = ["succeeded", "failed", "cancelled"];

/** A job as the server describes it, with what the page follows beside it: previews by step, losses by step. */
export const newJob = (data) => ({ losses: [], notes: [], ...data, pictures: [] });

export const isEnded = (job) => ENDED.includes(job.status);

/** The name of the word, as it was given. */
export const nameOf = (job) => job.word?.name ?? job.name ?? job.token ?? "";

/** Between 0 and 1. */
export const progress = (job) => (job.status === "succeeded" ? 1 : job.steps ? (job.step ?? 0) / job.steps : 0);

/** The job after a server's event. */
export function afterEvent(job, { type, data }) {
  switch (type) {
    case "progress": {
      const losses = Number.isFinite(data.loss)
        ? [...job.losses.filter(({ step }) => step < data.step), { step: data.step, loss: data.loss }]
        : job.losses;
      return { ...job, ...data, losses, status: "running" };
    }
    case "preview":
      return withPictures(job, data);
    case "done":
      return { ...job, status: "succeeded", step: job.steps, word: data.word };
    case "note":
      return job.notes.includes(data.text) ? job : { ...job, notes: [...job.notes, data.text] };
    case "cancelled":
      return { ...job, status: "cancelled" };
    case "error":
      return { ...job, status: data.error?.code === "cancelled" ? "cancelled" : "failed", error: data.error };
    default:
      return job;
  }
}

/** Pictures `{step, index, prompt, src, url}`, one per prompt and step; a repeated one replaces the earlier, but one that
 * is only named does not hide one that can be seen. */
export function withPictures(job, data) {
  const items = data.pictures ?? [data];
  const fresh = items.map((item, i) => ({
    step: item.step ?? data.step,
    index: item.index ?? i,
    prompt: item.prompt ?? data.prompts?.[item.index ?? i] ?? job.prompts?.[item.index ?? i] ?? "",
    src: item.src ?? dataUrl(item, data.output_format) ?? found(job, item.step ?? data.step, item.index ?? i)?.src ?? null,
    url: item.url ?? null,
  }));
  const same = (a) => fresh.some((b) => a.step === b.step && a.index === b.index);
  return { ...job, pictures: [...job.pictures.filter((picture) => !same(picture)), ...fresh] };
}

/** The picture of a prompt after a step, or undefined. */
export const found = (job, step, index) => job.pictures.find((picture) => picture.step === step && picture.index === index);

/** The pictures as a table: `steps`, and one row `{prompt, cells}` per prompt, a cell per step, null where still open. */
export function sheet(job) {
  const planned = PREVIEW_STEPS.filter((step) => !job.steps || step <= job.steps);
  const steps = [...new Set([...planned, ...job.pictures.map(({ step }) => step)])].sort((a, b) => a - b);
  const indexes = [...new Set(job.pictures.map(({ index }) => index))].sort((a, b) => a - b);
  const rows = indexes.map((index) => {
    const row = job.pictures.filter((picture) => picture.index === index);
    return { prompt: row[0].prompt, cells: steps.map((step) => row.find((picture) => picture.step === step) ?? null) };
  });
  return { steps, rows };
}

/** What a person has to do before the word can be learned, or "". */
export function missing({ images, name, taken = false }) {
  const more = MIN_PICTURES - images;
  if (more > 0) return `Add ${images ? more : "3 to 5"} ${images ? "more " : ""}picture${more > 1 ? "s" : ""}`;
  if (!name) return "Name it";
  if (name.length > MAX_NAME) return `A name has at most ${MAX_NAME} characters`;
  if (!validName(name)) return "A name has no spaces or < >";
  if (taken) return "You already have a word of this name";
  return "";
}

export const validName = (name) => name.length <= MAX_NAME && /^[^\s<>]+$/.test(name);

const dataUrl = ({ b64_json, output_format }, format = "jpeg") =>
  b64_json ? `data:image/${output_format ?? format};base64,${b64_json}` : null;
