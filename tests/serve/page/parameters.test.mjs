import assert from "node:assert/strict";
import { test } from "node:test";

import { leftOut, parseParameters } from "../../../serve/page/parameters.js";
import { requestFields } from "../../../serve/page/recipe.js";

test("what this project writes is read back", () => {
  const text =
    "a photo of a <toy>\nin the snow\nNegative prompt: blurry, dark\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7.5, " +
    "Seed: 42, Size: 96x64, Model: miniature, Denoising strength: 0.6, Clip skip: 2, Eta: 0.5, CFG Rescale: 0.7, CFG interval: 0.28-5.42";
  assert.deepEqual(parseParameters(text), {
    prompt: "a photo of a <toy>\nin the snow",
    negative: "blurry, dark",
    steps: 20,
    sampler: "dpmpp-2m-karras",
    guidance: 7.5,
    seed: 42,
    width: 96,
    height: 64,
    strength: 0.6,
    clipSkip: 1,
    eta: 0.5,
    rescale: 0.7,
    interval: [0.28, 5.42],
  });
});

test("without a negative prompt it is empty", () => {
  assert.deepEqual(parseParameters("red\nSteps: 1, Seed: 0"), { prompt: "red", negative: "", steps: 1, seed: 0 });
});

test("a later A1111 names the schedule on its own", () => {
  assert.equal(parseParameters("x\nSteps: 9, Sampler: DPM++ 2M, Schedule type: Karras").sampler, "dpmpp-2m-karras");
});

test("a spacing and a kind of guidance are read", () => {
  const recipe = parseParameters("x\nSteps: 9, Sampler: DPM++ 2S a, Schedule type: SGM Uniform, Guidance: CFG-Zero*");
  assert.equal(recipe.sampler, "dpmpp-2s-a");
  assert.equal(recipe.spacing, "sgm-uniform");
  assert.equal(recipe.method, "zero-star");
});

test("the guidance that FLUX takes as an input is read and asked for again", () => {
  const recipe = parseParameters("x\nSteps: 9, CFG scale: 1.0, Seed: 7, Distilled CFG Scale: 3.5, CFG Rescale: 0.5");
  assert.equal(recipe.embedded, 3.5);
  assert.equal(recipe.guidance, 1);
  assert.equal(requestFields(recipe).embedded_guidance, 3.5);
});

test("a quoted value may hold commas and colons", () => {
  const text = 'x\nSteps: 9, Note: "a, Seed: 1, b", Seed: 7';
  assert.equal(parseParameters(text).seed, 7);
});

test("values that make no sense are left out", () => {
  assert.deepEqual(parseParameters("x\nSteps: 9, Seed: -1, Size: 1, CFG scale: high, Sampler: Magic"), {
    prompt: "x",
    negative: "",
    steps: 9,
    width: 1,
  });
});

test("any other text is no recipe", () => {
  assert.equal(parseParameters("just a comment"), null);
  assert.equal(parseParameters(""), null);
});

test("a spacing is not read without its sampler", () => {
  const recipe = parseParameters("x\nSteps: 9, Sampler: DPM++ SDE, Schedule type: Karras");
  assert.deepEqual([recipe.sampler, recipe.spacing], [undefined, undefined]);
});

test("what is left out is named", () => {
  const text =
    "x\nSteps: 9, Sampler: DPM++ SDE, Schedule type: Karras, CFG scale: 7, Seed: -1, Size: 64x64, Model: y, Version: v1.10, " +
    "Denoising strength: 0.6, Hires upscale: 2, constructor: 1";
  const left = ["Sampler DPM++ SDE", "Schedule type Karras", "Seed -1", "the picture it started from", "Hires upscale", "constructor"];
  assert.deepEqual(leftOut(text), left);
});

test("nothing is left out of what this project writes for a prompt alone", () => {
  const tail = "CFG scale: 7.5, Seed: 42, Size: 96x64, Model: miniature, Clip skip: 2, Eta: 0.5, CFG Rescale: 0.7, CFG interval: 0.28-5.42";
  assert.deepEqual(leftOut(`a <toy>\nSteps: 20, Sampler: DPM++ 2M Karras, ${tail}`), []);
  assert.deepEqual(leftOut(`a <toy>\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, ${tail}`), []);
  assert.deepEqual(leftOut(`a <toy>\nSteps: 20, Sampler: Euler a, Schedule type: Karras, Guidance: CFG++, ${tail}`), []);
  assert.deepEqual(leftOut("a\nSteps: 20, Sampler: Euler, Schedule type: Automatic"), []);
});
