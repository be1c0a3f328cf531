/** What a dropped file is: a picture that carries its recipe, a plain picture, or a word's file. */

import { parseParameters } from "./parameters.js";
import { pngTexts } from "./png.js";

const MAX_NAMED = 3;

/** The parameters text inside a picture's file, or "". */
export async function parametersIn(file) {
  const texts = await pngTexts(new Uint8Array(await file.arrayBuffer()));
  return texts.get("parameters") ?? "";
}

/** The recipe inside a picture's file, or null. */
export const recipeIn = async (file) => parseParameters(await parametersIn(file));

/** Says that a recipe was restored, except what is `left`. */
export function sayRestored(left) {
  if (left.length === 0) return "Restored all settings of this picture.";
  const more = left.length - MAX_NAMED;
  return `Restored this picture’s settings, except: ${left.slice(0, MAX_NAMED).join(", ")}${more > 0 ? ` and ${more} more` : ""}.`;
}

export const isPicture = (file) => file.type.startsWith("image/");
export const isWord = (file) => file.name.endsWith(".safetensors");
