/** Makes pictures from a person's device fit for the server: known formats, a sensible size, no place or camera inside. */

const SIDE = 1024;

/** The picture as a PNG or JPEG of at most SIDE pixels a side. Raises Error with a sentence for people. */
export async function prepared(file, side = SIDE) {
  const bitmap = await decoded(file);
  const scale = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
  const canvas = new OffscreenCanvas(Math.max(1, Math.round(bitmap.width * scale)), Math.max(1, Math.round(bitmap.height * scale)));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  const photo = file.type === "image/jpeg" && canvas.width * canvas.height > 1 << 18;
  return canvas.convertToBlob(photo ? { type: "image/jpeg", quality: 0.95 } : { type: "image/png" });
}

/** The picture with both sides rounded down to a multiple, cut around its middle. */
export async function cut(blob, multiple, maxSide = SIDE) {
  const bitmap = await decoded(blob);
  const scale = Math.min(1, maxSide / Math.max(bitmap.width, bitmap.height));
  const fit = (side) => Math.max(multiple, Math.floor((side * scale) / multiple) * multiple);
  const canvas = new OffscreenCanvas(fit(bitmap.width), fit(bitmap.height));
  const zoom = Math.max(canvas.width / bitmap.width, canvas.height / bitmap.height);
  const [width, height] = [bitmap.width * zoom, bitmap.height * zoom];
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, (canvas.width - width) / 2, (canvas.height - height) / 2, width, height);
  bitmap.close();
  return { blob: await canvas.convertToBlob({ type: "image/png" }), width: canvas.width, height: canvas.height };
}

async function decoded(file) {
  try {
    return await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch {
    throw new Error(`${file.name || "This file"} is not a picture this browser can read. PNG, JPEG and WebP work.`);
  }
}
