import assert from "node:assert/strict";
import { test } from "node:test";

import { bytesOf, surplus } from "../../../serve/page/gallery.js";

const records = (...sizes) => sizes.map((size, id) => ({ id, blob: { size }, recipe: {} }));
const ids = (list) => list.map(({ id }) => id);

test("the oldest pictures beyond the number go", () => {
  assert.deepEqual(ids(surplus(records(1, 1, 1, 1), 2, 100)), [2, 3]);
});

test("the oldest pictures beyond the bytes go", () => {
  assert.deepEqual(ids(surplus(records(40, 40, 40, 1), 10, 100)), [2, 3]);
});

test("the newest picture stays, however large", () => {
  assert.deepEqual(ids(surplus(records(500, 1), 10, 100)), [1]);
});

test("the picture and the mask that a picture was made from count too", () => {
  const made = { id: 1, blob: { size: 10 }, recipe: { image: { size: 60 }, mask: { size: 7 } } };
  assert.equal(bytesOf(made), 77);
  assert.deepEqual(ids(surplus([...records(10), made, ...records(1)], 10, 80)), [1, 0]);
});
