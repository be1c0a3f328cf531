import assert from "node:assert/strict";
import { test } from "node:test";

import { between, maskPixels, picturePoint, withLine } from "../../../serve/page/mask.js";

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

test("a line continues the last stroke only where it ends and with the same brush", () => {
  const [a, b, c] = [{ x: 0, y: 0 }, { x: 1, y: 0 }, { x: 2, y: 0 }];
  const brush = { size: 6, erase: false };
  const strokes = withLine([], a, b, brush);
  assert.deepEqual(strokes, [{ ...brush, points: [a, b] }]);
  assert.deepEqual(withLine(strokes, b, c, brush), [{ ...brush, points: [a, b, c] }]);
  assert.deepEqual(withLine(strokes, a, b, brush), [...strokes, { ...brush, points: [a, b] }]);
  const places = Array.from({ length: 50 }, (_, i) => ({ x: 0.1 + i * 0.7, y: i / 3 }));
  const long = places.slice(1).reduce((all, place, i) => withLine(all, places[i], place, brush), []);
  assert.equal(long.length, 1);
  for (const other of [{ ...brush, erase: true }, { ...brush, size: 9 }]) {
    assert.deepEqual(withLine(strokes, b, c, other), [...strokes, { ...other, points: [b, c] }]);
  }
});
