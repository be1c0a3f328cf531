import assert from "node:assert/strict";
import { test } from "node:test";

import { extras, fit, formOf, missingRuns, requestFields, single } from "../../../serve/page/recipe.js";
import { afterEvent, closed, isActive, newRun, openIndexes, progress, restarted } from "../../../serve/page/run.js";

const RECIPE = { prompt: "a <toy>", negative: "", seed: 7, count: 3, guidance: 0, width: 64, height: 96 };

test("a request holds what was chosen and leaves the rest to the server", () => {
  assert.deepEqual(requestFields(RECIPE), { prompt: "a <toy>", n: 3, seed: 7, size: "64x96", guidance_scale: 0 });
});

test("strength is sent only with a picture", () => {
  assert.equal(requestFields({ ...RECIPE, strength: 0.5 }).strength, undefined);
  assert.equal(requestFields({ ...RECIPE, strength: 0.5, image: new Blob() }).strength, 0.5);
});

test("a form joins numbers and repeats the name of several files with brackets", () => {
  const form = formOf({ interval: [1, 2], stream: true }, { image: [new Blob(["a"]), new Blob(["b"])], mask: undefined });
  assert.equal(form.get("interval"), "1,2");
  assert.equal(form.get("stream"), "true");
  assert.equal(form.getAll("image[]").length, 2);
  assert.equal(form.has("mask"), false);
});

test("picture i has the seed of its recipe plus i", () => {
  assert.deepEqual(newRun("a", RECIPE).tiles.map(({ seed }) => seed), [7, 8, 9]);
  assert.equal(single(RECIPE, 2).seed, 9);
});

test("a preview shows its picture drawing, a completed one closes it", () => {
  let run = newRun("a", RECIPE);
  run = afterEvent(run, 0, { type: "image_generation.preview", data: { index: 1, step: 3, steps: 6, b64_json: "AA" } });
  assert.deepEqual(
    run.tiles.map(({ status, step }) => [status, step]),
    [["waiting", 0], ["running", 3], ["waiting", 0]],
  );
  assert.equal(run.tiles[1].preview, "data:image/jpeg;base64,AA");
  assert.equal(progress(run), 0.5 / 3);
  run = afterEvent(run, 0, { type: "image_generation.completed", data: { index: 1 } }, "picture");
  assert.equal(run.tiles[1].picture, "picture");
  assert.deepEqual(openIndexes(run), [0, 2]);
});

test("indexes count from the first picture that was asked for", () => {
  const run = afterEvent(newRun("a", RECIPE), 2, { type: "image_edit.completed", data: { index: 0 } }, "late");
  assert.equal(run.tiles[2].picture, "late");
});

test("a completed picture without an index is the first open one", () => {
  let run = afterEvent(newRun("a", RECIPE), 0, { type: "image_generation.completed", data: { index: 0 } }, "one");
  run = afterEvent(run, 0, { type: "image_generation.completed", data: {} }, "two");
  assert.equal(run.tiles[1].picture, "two");
});

test("after a lost connection only open pictures wait again", () => {
  let run = afterEvent(newRun("a", RECIPE), 0, { type: "image_generation.completed", data: { index: 1 } }, "one");
  run = restarted(afterEvent(run, 0, { type: "image_generation.preview", data: { index: 0, step: 5, steps: 6 } }));
  assert.deepEqual(run.tiles.map(({ status }) => status), ["waiting", "done", "waiting"]);
  assert.deepEqual(missingRuns(openIndexes(run)), [{ first: 0, count: 1 }, { first: 2, count: 1 }]);
});

test("neighbours are asked for together", () => {
  assert.deepEqual(missingRuns([5, 1, 2, 3]), [{ first: 1, count: 3 }, { first: 5, count: 1 }]);
  assert.deepEqual(missingRuns([]), []);
});

test("closing keeps what is done", () => {
  let run = afterEvent(newRun("a", RECIPE), 0, { type: "image_generation.completed", data: { index: 0 } }, "one");
  run = closed(run, "cancelled");
  assert.deepEqual(run.tiles.map(({ status }) => status), ["done", "cancelled", "cancelled"]);
  assert.equal(isActive(run), false);
});

test("settings without a field are listed as they are read out", () => {
  const recipe = { ...RECIPE, spacing: "karras", eta: 0, clipSkip: 1, interval: [0.28, 5.42] };
  assert.deepEqual(
    extras(recipe).map(({ name, label, value }) => [name, label, value]),
    [["spacing", "Spacing", "karras"], ["interval", "Guidance interval", "0.28 to 5.42"], ["clipSkip", "Text layers skipped", "1"]],
  );
});

test("a recipe is taken over without what the model does not have", () => {
  const model = { samplers: ["euler"], spacings: ["karras"], guidance: ["cfg"], defaults: { embedded_guidance: null } };
  const fitting = { ...RECIPE, sampler: "euler", spacing: "karras" };
  assert.deepEqual(fit(fitting, model), { recipe: fitting, left: [] });
  const other = { ...RECIPE, sampler: "ddim", spacing: "karras", method: "cfg++", embedded: 3.5 };
  const { recipe, left } = fit(other, model);
  assert.deepEqual(recipe, RECIPE);
  assert.deepEqual(left, ["Sampler ddim", "Kind of guidance cfg++", "Distilled guidance 3.5", "Spacing karras"]);
});
