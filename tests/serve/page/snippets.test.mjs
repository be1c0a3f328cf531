import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { test } from "node:test";

import { curl, python, tiRun, wordFileName } from "../../../serve/page/snippets.js";

const RECIPE = { prompt: `it's a "<toy>" $HOME \\ \`id\``, negative: "dark", seed: 3, count: 2, steps: 9, interval: [0.5, 4] };

/** What a shell makes of a command: its arguments, one a line. */
const words = (command) => execFileSync("sh", ["-c", `set -- ${command}; printf '%s\\n' "$@"`], { encoding: "utf8" }).trimEnd().split("\n");

test("a shell hands curl the JSON as it is", () => {
  const body = words(curl(RECIPE, "http://127.0.0.1:8000")).at(-1);
  assert.equal(JSON.parse(body).prompt, RECIPE.prompt);
  assert.equal(JSON.parse(body).n, 2);
});

test("an edit names the files it needs", () => {
  const text = curl({ ...RECIPE, image: {}, mask: {}, strength: 0.5 }, "http://x");
  assert.match(text, /v1\/images\/edits/);
  assert.match(text, /image=@start\.png/);
  assert.match(text, /mask=@mask\.png/);
});

test("Python reads the snippet", () => {
  for (const recipe of [RECIPE, { ...RECIPE, image: {}, mask: {} }]) {
    execFileSync("python3", ["-c", "import ast, sys; ast.parse(sys.stdin.read())"], { input: python(recipe, "http://x") });
  }
});

test("a shell hands ti-run the prompt as it is and each word its file", () => {
  const argv = words(tiRun(RECIPE));
  assert.deepEqual(argv.slice(0, 3), ["ti-run", "bundle", RECIPE.prompt]);
  assert.equal(argv[argv.indexOf("--concept") + 1], "toy.safetensors");
  assert.deepEqual(argv.slice(argv.indexOf("--guidance-interval") + 1).slice(0, 2), ["0.5", "4"]);
  assert.equal(words(tiRun({ ...RECIPE, embedded: 3.5 })).includes("3.5"), true);
});

test("no snippet holds a key", () => {
  assert.match(curl(RECIPE, "http://x"), /\$ONEWORD_KEY/);
  assert.match(python(RECIPE, "http://x"), /ONEWORD_KEY/);
});

test("a word's file has a harmless name", () => {
  assert.equal(wordFileName("<a/../b>"), "a_.._b.safetensors");
});

test("curl takes a text field as it is, whatever it begins with", () => {
  const text = curl({ ...RECIPE, prompt: "<toy> in the snow; at night", negative: "@home", image: {} }, "http://x");
  const argv = words(text.replace(/^#.*\n/, ""));
  const texts = argv.filter((_, i) => argv[i - 1] === "--form-string");
  assert.equal(texts.includes("prompt=<toy> in the snow; at night"), true);
  assert.equal(texts.includes("negative_prompt=@home"), true);
  assert.deepEqual(argv.filter((_, i) => argv[i - 1] === "-F"), ["image=@start.png"]);
});

test("ti-run finds a word's file under the name of its download", () => {
  const argv = words(tiRun({ ...RECIPE, prompt: "a <b/c>" }));
  assert.equal(argv[argv.indexOf("--concept") + 1], wordFileName("<b/c>"));
});
