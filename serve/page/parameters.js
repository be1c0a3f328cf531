/** Reads A1111's generation parameters, which every picture carries as text, into a recipe. */

const SAMPLERS = {
  DDIM: "ddim",
  DDPM: "ddpm",
  Euler: "euler",
  "Euler a": "euler-a",
  "DPM++ 2M": "dpmpp-2m",
  "DPM++ 2M Karras": "dpmpp-2m-karras",
  "DPM++ 2M SDE": "dpmpp-2m-sde",
  LCM: "lcm",
  Heun: "heun",
  "DPM2 a": "dpm2-a",
  "DPM++ 2S a": "dpmpp-2s-a",
  "DPM++ 3M SDE": "dpmpp-3m-sde",
  UniPC: "unipc",
};
const SPACINGS = {
  Karras: "karras",
  Exponential: "exponential",
  Beta: "beta",
  "SGM Uniform": "sgm-uniform",
  "Align Your Steps": "ays",
};
const METHODS = { "CFG++": "cfg++", "CFG-Zero*": "zero-star" };

/** What becomes of each value: keys of the recipe. */
const KEYS = new Map([
  ["Steps", ["steps"]],
  ["Sampler", ["sampler"]],
  ["Schedule type", ["spacing"]],
  ["Guidance", ["method"]],
  ["CFG scale", ["guidance"]],
  ["Distilled CFG Scale", ["embedded"]],
  ["Seed", ["seed"]],
  ["Size", ["width", "height"]],
  ["Clip skip", ["clipSkip"]],
  ["Eta", ["eta"]],
  ["CFG Rescale", ["rescale"]],
  ["CFG interval", ["interval"]],
]);
const FILES = new Map([
  ["Denoising strength", "the picture it started from"],
  ["Mask blur", "the mask"],
]);
const NOT_SETTINGS = ["Model", "Model hash", "VAE", "VAE hash", "Version"];

/** The recipe of a parameters text, or null if the text is none. Values that make no sense are left out. */
export function parseParameters(text) {
  const lines = text.trim().split(/\r?\n/);
  const last = lines.at(-1);
  if (!/^Steps: \d+/.test(last)) return null;
  const body = lines.slice(0, -1).join("\n");
  const split = body.search(/(^|\n)Negative prompt: /);
  const pairs = readPairs(last);
  const sampler = samplerOf(pairs.get("Sampler"), pairs.get("Schedule type"));
  const [width, height] = (pairs.get("Size") ?? "").split("x").map((side) => whole(side));
  const recipe = {
    prompt: (split < 0 ? body : body.slice(0, split)).trim(),
    negative: split < 0 ? "" : body.slice(split).trim().replace(/^Negative prompt: /, ""),
    steps: whole(pairs.get("Steps")),
    sampler,
    spacing: sampler === undefined || sampler === "dpmpp-2m-karras" ? undefined : SPACINGS[pairs.get("Schedule type")],
    method: METHODS[pairs.get("Guidance")],
    guidance: number(pairs.get("CFG scale")),
    embedded: number(pairs.get("Distilled CFG Scale")),
    seed: whole(pairs.get("Seed")),
    width,
    height,
    strength: number(pairs.get("Denoising strength")),
    clipSkip: pairs.has("Clip skip") ? Math.max(0, whole(pairs.get("Clip skip")) - 1) : undefined,
    eta: number(pairs.get("Eta")),
    rescale: number(pairs.get("CFG Rescale")),
    interval: intervalOf(pairs.get("CFG interval")),
  };
  return Object.fromEntries(Object.entries(recipe).filter(([, value]) => value !== undefined));
}

/** What a parameters text says and its recipe lacks, in words: values that are unknown here, other settings, files. */
export function leftOut(text) {
  const recipe = parseParameters(text);
  const isTaken = ([name, value]) =>
    NOT_SETTINGS.includes(name) ||
    KEYS.get(name)?.every((key) => recipe[key] !== undefined) ||
    (name === "Schedule type" && (value === "Automatic" || (value === "Karras" && recipe.sampler?.endsWith("-karras"))));
  const said = ([name, value]) => FILES.get(name) ?? (KEYS.has(name) ? `${name} ${value}` : name);
  return [...readPairs(text.trim().split(/\r?\n/).at(-1))].filter((pair) => !isTaken(pair)).map(said);
}

/** `Name: value` pairs; a value in quotes may contain commas. */
function readPairs(line) {
  const pairs = new Map();
  for (const [, name, value] of line.matchAll(/\s*([^:,]+):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)/g)) {
    pairs.set(name.trim(), value.startsWith('"') ? unquoted(value) : value.trim());
  }
  return pairs;
}

function unquoted(value) {
  try {
    return JSON.parse(value);
  } catch {
    return value.slice(1, -1);
  }
}

function samplerOf(name, schedule) {
  if (name === undefined) return undefined;
  return SAMPLERS[schedule === "Karras" ? `${name} Karras` : name] ?? SAMPLERS[name];
}

function intervalOf(text) {
  const match = /^([\d.e+]+)-([\d.e+]+)$/.exec(text ?? "");
  return match ? [Number(match[1]), Number(match[2])] : undefined;
}

function number(text) {
  const value = text === undefined || text === "" ? NaN : Number(text);
  return Number.isFinite(value) ? value : undefined;
}

function whole(text) {
  const value = number(text);
  return Number.isSafeInteger(value) && value >= 0 ? value : undefined;
}
