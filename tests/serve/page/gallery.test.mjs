import assert from "node:assert/strict";
import { test } from "node:test";

import { surplus } from "../../../serve/page/gallery.js";

const records = (...sizes) => sizes.map((size, id) => ({ id, blob: { size } }));
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
