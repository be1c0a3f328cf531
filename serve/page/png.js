/** Text chunks of a PNG, read from untrusted bytes. No pixels. */

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const MAX_TEXT = 1 << 20;

/** The texts of tEXt, zTXt and iTXt chunks by keyword; empty if the bytes are no PNG or end too early. */
export async function pngTexts(bytes) {
  const texts = new Map();
  if (SIGNATURE.some((byte, i) => bytes[i] !== byte)) return texts;
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const type = latin1(bytes.subarray(at + 4, at + 8));
    const end = at + 8 + length;
    if (end + 4 > bytes.length || type === "IEND") break;
    const entry = await readText(type, bytes.subarray(at + 8, end));
    if (entry && !texts.has(entry[0])) texts.set(...entry);
    at = end + 4;
  }
  return texts;
}

async function readText(type, body) {
  if (!["tEXt", "zTXt", "iTXt"].includes(type)) return null;
  const zero = body.indexOf(0);
  if (zero < 1) return null;
  const keyword = latin1(body.subarray(0, zero));
  try {
    if (type === "tEXt") return [keyword, latin1(body.subarray(zero + 1, zero + 1 + MAX_TEXT))];
    if (type === "zTXt") return [keyword, latin1(await inflated(body.subarray(zero + 2)))];
    const compressed = body[zero + 1] === 1;
    const language = body.indexOf(0, zero + 3);
    const translated = body.indexOf(0, language + 1);
    if (language < 0 || translated < 0) return null;
    const text = body.subarray(translated + 1);
    return [keyword, new TextDecoder().decode(compressed ? await inflated(text) : text.subarray(0, MAX_TEXT))];
  } catch {
    return null;
  }
}

/** zlib's inverse, of at most MAX_TEXT bytes. */
async function inflated(bytes) {
  const reader = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate")).getReader();
  const parts = [];
  for (let size = 0; ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    size += value.length;
    if (size > MAX_TEXT) {
      reader.cancel().catch(() => {});
      throw new Error("too much text");
    }
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

function latin1(bytes) {
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return text;
}
