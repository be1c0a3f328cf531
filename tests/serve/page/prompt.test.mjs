import assert from "node:assert/strict";
import { test } from "node:test";

import { bareName, completion, namesIn, pieces, unknownNames, withWord, written } from "../../../serve/page/prompt.js";

test("a token is written in angle brackets whether or not it has them", () => {
  assert.equal(written("<toy>"), "<toy>");
  assert.equal(written("toy"), "<toy>");
  assert.equal(bareName("<toy>"), "toy");
});

test("the pieces of a prompt join to the prompt and name its words", () => {
  const prompt = "a <toy>, embedding:gem and embedding:<x y> <toy>";
  assert.equal(pieces(prompt).map(({ text }) => text).join(""), prompt);
  assert.deepEqual(namesIn(prompt), ["toy", "gem"]);
});

test("angle brackets with spaces are ordinary text", () => {
  assert.deepEqual(namesIn("1 < 2 and 3 > 2, < toy >"), []);
});

test("only names that no token has are unknown, in any case", () => {
  assert.deepEqual(unknownNames("<toy> <Toy> <gem> <ghost>", ["<toy>", "gem"]), ["ghost"]);
});

test("an open bracket at the caret completes, names that begin so first", () => {
  const found = completion("a <to", 5, ["<photo>", "<toy>", "<gem>"]);
  assert.deepEqual(found, { start: 2, end: 5, matches: ["<toy>", "<photo>"] });
});

test("there is nothing to complete behind a closed word or a space", () => {
  assert.equal(completion("a <toy>", 7, ["<toy>"]), null);
  assert.equal(completion("a < toy", 7, ["<toy>"]), null);
});

test("completing inside a closed word replaces all of it", () => {
  const { start, end } = completion("a <toy> here", 4, ["<toy>"]);
  assert.deepEqual([start, end], [2, 7]);
});

test("a word is inserted with the spaces it needs and the caret behind it", () => {
  assert.deepEqual(withWord("a photo of", 10, 10, "toy"), { text: "a photo of <toy>", caret: 16 });
  assert.deepEqual(withWord("a  here", 2, 2, "<toy>"), { text: "a <toy> here", caret: 7 });
  assert.deepEqual(withWord("a <to, red", 2, 5, "<toy>"), { text: "a <toy>, red", caret: 7 });
});
