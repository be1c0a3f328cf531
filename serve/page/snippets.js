/** "Copy as": the same pictures from curl, Python and ti-run. Pure text; secrets stay placeholders. */

import { namesIn, written } from "./prompt.js";
import { requestFields } from "./recipe.js";

const EDIT_NOTE = "start.png is the picture it starts from";

/** For a shell. */
export function curl(recipe, origin) {
  const fields = { ...requestFields(recipe), response_format: "b64_json" };
  const lines = [`curl ${origin}/v1/images/${recipe.image ? "edits" : "generations"}`, `-H "Authorization: Bearer $ONEWORD_KEY"`];
  if (recipe.image) {
    lines.push("-F image=@start.png", ...(recipe.mask ? ["-F mask=@mask.png"] : []));
    for (const [name, value] of Object.entries(fields)) lines.push(`--form-string ${shell(`${name}=${value}`)}`);
  } else {
    lines.push(`-H "Content-Type: application/json"`, `-d ${shell(JSON.stringify(fields))}`);
  }
  const note = recipe.image ? `# ${EDIT_NOTE}\n` : "";
  return note + lines.join(" \\\n  ");
}

/** For the openai package. */
export function python(recipe, origin) {
  const { prompt, n, size, ...extra } = requestFields(recipe);
  const call = recipe.image ? "edit" : "generate";
  const lines = [
    "import base64",
    "import os",
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(`${origin}/v1`)}, api_key=os.environ.get("ONEWORD_KEY", "none"))`,
    `answer = client.images.${call}(`,
    ...(recipe.image ? [`    image=open("start.png", "rb"),  # ${EDIT_NOTE}`] : []),
    ...(recipe.mask ? ['    mask=open("mask.png", "rb"),'] : []),
    `    prompt=${literal(prompt)},`,
    `    n=${n},`,
    ...(size ? [`    size=${literal(size)},`] : []),
    '    response_format="b64_json",',
    `    extra_body=${literal(extra)},`,
    ")",
    "for i, picture in enumerate(answer.data):",
    '    with open(f"picture-{i}.png", "wb") as file:',
    "        file.write(base64.b64decode(picture.b64_json))",
  ];
  return lines.join("\n");
}

/** For ti-run, with a concept file for each word. */
export function tiRun(recipe) {
  const { width, height, interval } = recipe;
  const options = [
    ...namesIn(recipe.prompt).map((name) => ["--concept", wordFileName(name)]),
    ["--negative-prompt", recipe.negative || undefined],
    ["--seed", recipe.seed],
    ["--num-images", recipe.count],
    ["--steps", recipe.steps],
    ["--sampler", recipe.sampler || undefined],
    ["--spacing", recipe.spacing || undefined],
    ["--guidance", recipe.method || undefined],
    ["--guidance-scale", recipe.guidance],
    ["--embedded-guidance", recipe.embedded],
    ["--guidance-rescale", recipe.rescale || undefined],
    ["--guidance-interval", interval?.join(" ")],
    ["--eta", recipe.eta || undefined],
    ["--clip-skip", recipe.clipSkip || undefined],
    ["--size", width && height ? `${width}x${height}` : undefined],
    ...(recipe.image ? [["--image", "start.png"], ["--strength", recipe.strength]] : []),
    ...(recipe.mask ? [["--mask", "mask.png"]] : []),
  ].filter(([, value]) => value !== undefined);
  const values = options.map(([name, value]) => `${name} ${name === "--guidance-interval" ? value : shell(String(value))}`);
  return [`ti-run bundle ${shell(recipe.prompt)}`, ...values].join(" \\\n  ");
}

/** The name of a word's file, as the page downloads it. */
export const wordFileName = (token) => `${written(token).slice(1, -1).replace(/[^\w.-]+/g, "_")}.safetensors`;

const shell = (text) => (/^[\w./:=,-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`);

/** A Python literal of JSON values. */
function literal(value) {
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object" && value !== null) {
    return `{${Object.entries(value).map(([name, item]) => `${literal(name)}: ${literal(item)}`).join(", ")}}`;
  }
  return typeof value === "string" ? JSON.stringify(value) : String(value);
}
