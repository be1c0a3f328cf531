import assert from "node:assert/strict";
import { test } from "node:test";
import { deflateSync } from "node:zlib";

import { pngTexts } from "../../../serve/page/png.js";

const SIGNATURE = Buffer.from([137, 80, 78, 71, 13, 10, 26, 10]);

/** A chunk; its checksum is not looked at. */
function chunk(type, body) {
  const length = Buffer.alloc(4);
  length.writeUInt32BE(body.length);
  return Buffer.concat([length, Buffer.from(type), body, Buffer.alloc(4)]);
}

const png = (...chunks) => new Uint8Array(Buffer.concat([SIGNATURE, ...chunks, chunk("IEND", Buffer.alloc(0))]));

test("tEXt is latin-1", async () => {
  const bytes = png(chunk("tEXt", Buffer.from("parameters\0caf\u00e9", "latin1")));
  assert.equal((await pngTexts(bytes)).get("parameters"), "café");
});

test("iTXt is UTF-8, plain or compressed", async () => {
  const head = (flag) => Buffer.from([...Buffer.from("parameters"), 0, flag, 0, ...Buffer.from("en"), 0, 0]);
  const text = Buffer.from("ein Stern ★");
  assert.equal((await pngTexts(png(chunk("iTXt", Buffer.concat([head(0), text]))))).get("parameters"), "ein Stern ★");
  const packed = chunk("iTXt", Buffer.concat([head(1), deflateSync(text)]));
  assert.equal((await pngTexts(png(packed))).get("parameters"), "ein Stern ★");
});

test("zTXt is unpacked", async () => {
  const body = Buffer.concat([Buffer.from("parameters\0\0"), deflateSync(Buffer.from("red"))]);
  assert.equal((await pngTexts(png(chunk("zTXt", body)))).get("parameters"), "red");
});

test("what unpacks to more than a megabyte is left out", async () => {
  const body = Buffer.concat([Buffer.from("parameters\0\0"), deflateSync(Buffer.alloc(32 << 20))]);
  assert.equal((await pngTexts(png(chunk("zTXt", body)))).size, 0);
});

test("other bytes and cut files have no texts and raise nothing", async () => {
  assert.equal((await pngTexts(new Uint8Array([1, 2, 3]))).size, 0);
  const bytes = png(chunk("tEXt", Buffer.from("parameters\0red")));
  for (let length = 0; length < 8 + 4 + 4 + 14; length += 1) {
    assert.equal((await pngTexts(bytes.subarray(0, length))).size, 0, `${length} bytes`);
  }
});

test("a chunk that claims to be larger than the file ends the search", async () => {
  const bytes = Buffer.from(png(chunk("tEXt", Buffer.from("parameters\0red"))));
  bytes.writeUInt32BE(0xffffffff, 8);
  assert.equal((await pngTexts(new Uint8Array(bytes))).size, 0);
});
