// What openai-node does with images, against the server given as an address and a key; prints JSON.
import { createRequire } from "node:module";

const require = createRequire(`${process.env.ONEWORD_CLIENTS}/`);
const { OpenAI, toFile } = require("openai");
const [url, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey });
const found = {};

const size = (b64) => {
  const png = Buffer.from(b64, "base64");
  return [png.readUInt32BE(16), png.readUInt32BE(20)];
};

const answer = await client.images.generate({ prompt: "a red ring", n: 2, steps: 4, seed: 3 });
found.generate = answer.data.map((item) => size(item.b64_json));
const stream = await client.images.generate({ prompt: "a red ring", stream: true, partial_images: 1, steps: 6 });
found.stream = [];
for await (const event of stream) found.stream.push(event.type);
const picture = await toFile(Buffer.from(answer.data[0].b64_json, "base64"), "upload", { type: "image/png" });
const edited = await client.images.edit({ image: picture, prompt: "a blue star", steps: 4 });
found.edit = edited.data.map((item) => size(item.b64_json));
const two = await client.images.edit({ image: [picture, picture], prompt: "a blue star", steps: 4 });
found.editOfTwo = two.data.map((item) => size(item.b64_json));
// The server refuses the first request with this prompt, as it does while its queue is full.
const retried = await client.images.generate({ prompt: "a retried cat", steps: 2 });
found.retried = retried.data.map((item) => size(item.b64_json));
try {
  await client.images.generate({ prompt: "a photo of <nobody>" });
} catch (error) {
  found.error = [error.constructor.name, error.status, error.message];
}
console.log(JSON.stringify(found));
