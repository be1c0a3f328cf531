import assert from "node:assert/strict";
import { test } from "node:test";

import { afterEvent, isEnded, missing, newJob, progress, sheet } from "../../../serve/page/job.js";

const JOB = { id: "1", kind: "learn", name: "<toy>", status: "queued", step: 0, steps: 50 };
const preview = (step, index, b64_json = "AA") => ({ type: "preview", data: { step, index, prompt: `prompt ${index}`, b64_json } });

test("progress moves the job on and keeps each loss once", () => {
  let job = newJob(JOB);
  for (const step of [1, 2, 2]) job = afterEvent(job, { type: "progress", data: { step, steps: 50, loss: 1 / step, seconds_left: 9 } });
  assert.equal(job.status, "running");
  assert.equal(progress(job), 2 / 50);
  assert.deepEqual(job.losses, [{ step: 1, loss: 1 }, { step: 2, loss: 0.5 }]);
});

test("a job that resumes from a checkpoint drops the losses it takes back", () => {
  let job = newJob(JOB);
  for (const step of [1, 2, 3, 2]) job = afterEvent(job, { type: "progress", data: { step, loss: step } });
  assert.deepEqual(job.losses.map(({ step }) => step), [1, 2]);
});

test("previews are a table of prompts by steps, with places for those to come", () => {
  let job = newJob(JOB);
  for (const event of [preview(0, 0), preview(0, 1), preview(5, 0), preview(0, 0, "BB")]) job = afterEvent(job, event);
  const { steps, rows } = sheet(job);
  assert.deepEqual(steps, [0, 5, 10, 20, 35, 50]);
  assert.deepEqual(rows.map(({ prompt }) => prompt), ["prompt 0", "prompt 1"]);
  assert.equal(rows[0].cells[0].src, "data:image/jpeg;base64,BB");
  assert.equal(rows[0].cells[1].step, 5);
  assert.equal(rows[1].cells[1], null);
});

test("a longer job shows the steps that it sends", () => {
  const job = afterEvent(newJob({ ...JOB, steps: 200 }), preview(200, 0));
  assert.deepEqual(sheet(job).steps, [0, 5, 10, 20, 35, 50, 200]);
});

test("a job ends done, failed or cancelled", () => {
  const word = { name: "<toy>" };
  const done = afterEvent(newJob(JOB), { type: "done", data: { word } });
  assert.deepEqual([done.status, done.word, progress(done)], ["succeeded", word, 1]);
  const failed = afterEvent(newJob(JOB), { type: "error", data: { error: { message: "no" } } });
  assert.deepEqual([failed.status, isEnded(failed)], ["failed", true]);
  const cancelled = afterEvent(newJob(JOB), { type: "error", data: { error: { code: "cancelled" } } });
  assert.equal(cancelled.status, "cancelled");
});

test("the form says what is missing, in order", () => {
  assert.equal(missing({ images: 0, name: "" }), "Add 3 to 5 pictures");
  assert.equal(missing({ images: 1, name: "" }), "Add 2 more pictures");
  assert.equal(missing({ images: 2, name: "" }), "Add 1 more picture");
  assert.equal(missing({ images: 3, name: "" }), "Name it");
  assert.match(missing({ images: 3, name: "a b" }), /no spaces/);
  assert.equal(missing({ images: 3, name: "a".repeat(63) }), "A name has at most 62 characters");
  assert.match(missing({ images: 3, name: "toy", taken: true }), /already/);
  for (const name of ["toy", "a".repeat(62)]) assert.equal(missing({ images: 5, name }), "");
});

test("a warning is kept once", () => {
  let job = newJob(JOB);
  for (let i = 0; i < 2; i += 1) job = afterEvent(job, { type: "note", data: { text: "replace one of them" } });
  assert.deepEqual(job.notes, ["replace one of them"]);
});
