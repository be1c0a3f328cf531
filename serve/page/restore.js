/** What a dropped file is: a picture that carries its recipe, a plain picture, or a word's file. */

import { parseParameters } from "./parameters.js";
import { pngTexts } from "./png.js";

/** The recipe inside a picture's file, or null. */
export async function recipeIn(file) {
  const texts = await pngTexts(new Uint8Array(await file.arrayBuffer()));
  return texts.has("parameters") ? parseParameters(texts.get("parameters")) : null;
}

export const isPicture = (file) => file.type.startsWith("image/");
export const isWord = (file) => file.name.endsWith(".safetensors");
