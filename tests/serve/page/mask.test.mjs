import assert from "node:assert/strict";
import { test } from "node:test";

import { between, maskPixels, picturePoint } from "../../../serve/page/mask.js";

test("a stroke has no gap wider than its spacing and ends where the pointer is", () => {
  const points = between({ x: 0, y: 0 }, { x: 3, y: 4 }, 1);
  assert.equal(points.length, 5);
  assert.deepEqual(points.at(-1), { x: 3, y: 4 });
  assert.deepEqual(between({ x: 1, y: 1 }, { x: 1, y: 1 }, 1), [{ x: 1, y: 1 }]);
});

test("a pointer's place is scaled to the picture's pixels", () => {
  assert.deepEqual(picturePoint(60, 120, { left: 10, top: 20, width: 100, height: 200 }, 64, 64), { x: 32, y: 32 });
});

test("painted pixels become transparent, the others black and opaque", () => {
  const painted = new Uint8ClampedArray([255, 221, 51, 255, 255, 221, 51, 127]);
  assert.deepEqual([...maskPixels(painted)], [0, 0, 0, 0, 0, 0, 0, 255]);
});

test("a mask without a painted pixel is none", () => {
  assert.equal(maskPixels(new Uint8ClampedArray(8)), null);
});
