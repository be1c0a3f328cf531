import assert from "node:assert/strict";
import { test } from "node:test";

import { makeSlots } from "../../../serve/page/slots.js";

/** A task that runs until its `end` is called. */
function task() {
  let end;
  const ended = new Promise((resolve) => (end = resolve));
  const made = { started: false, end, run: () => ((made.started = true), ended) };
  return made;
}

const turn = () => new Promise((resolve) => setTimeout(resolve));

test("no more tasks run than there are slots, and the others start in order", async () => {
  const within = makeSlots(2);
  const tasks = Array.from({ length: 4 }, task);
  tasks.forEach(({ run }) => within(run));
  await turn();
  assert.deepEqual(tasks.map(({ started }) => started), [true, true, false, false]);
  tasks[1].end();
  await turn();
  assert.deepEqual(tasks.map(({ started }) => started), [true, true, true, false]);
});

test("a task that fails gives its slot back", async () => {
  const within = makeSlots(1);
  await assert.rejects(within(() => Promise.reject(new Error("no"))), /no/);
  assert.equal(await within(async () => "yes"), "yes");
});

test("who is cancelled while waiting never starts and takes no slot", async () => {
  const within = makeSlots(1);
  const [first, second, third] = [task(), task(), task()];
  const controller = new AbortController();
  within(first.run);
  const cancelled = within(second.run, controller.signal);
  within(third.run);
  controller.abort();
  await assert.rejects(cancelled, { name: "AbortError" });
  await assert.rejects(within(second.run, controller.signal), { name: "AbortError" });
  first.end();
  await turn();
  assert.deepEqual([second.started, third.started], [false, true]);
});
