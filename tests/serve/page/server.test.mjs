import assert from "node:assert/strict";
import { test } from "node:test";

globalThis.document = { baseURI: "http://localhost/" };
globalThis.sessionStorage = { getItem: () => null };
const { jobEvents } = await import("../../../serve/page/api.js");
const { ApiError, Unreachable } = await import("../../../serve/page/errors.js");
const { watch } = await import("../../../serve/page/parts/queue.js");
const learning = await import("../../../serve/page/learning.js");

const answers = (t, ...made) => t.mock.method(globalThis, "fetch", async (...request) => made.shift()(...request));
const stream = (...events) => () => new Response(events.map(([type, data]) => `event: ${type}\ndata: ${JSON.stringify(data)}\n\n`).join(""));
const refusal = (status, error) => () => Response.json({ error }, { status });
const ticking = (t) => {
  const timer = setInterval(() => t.mock.timers.tick(1000), 5);
  t.after(() => clearInterval(timer));
};
const STEP = ["progress", { number: 1, step: 1, steps: 50 }];

test("a job whose events the server cannot read for a while has not failed", async (t) => {
  answers(t, stream(STEP, ["error", { error: { message: "the store cannot be read", code: "unavailable" } }]));
  const events = jobEvents("1");
  assert.equal((await events.next()).value.type, "progress");
  await assert.rejects(events.next(), Unreachable);
});

test("an error of learning is the job's own event", async (t) => {
  const failed = ["error", { number: 2, error: { message: "no", code: "learning_failed" } }];
  answers(t, stream(STEP, failed));
  const types = [];
  for await (const { type } of jobEvents("1")) types.push(type);
  assert.deepEqual(types, ["progress", "error"]);
});

test("one lost answer does not end the look at the queue, a refusal does", { timeout: 10000 }, async (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const lost = () => Promise.reject(new TypeError("the connection was closed"));
  answers(t, () => Response.json({ data: ["old"] }), lost, () => Response.json({ data: ["new"] }), refusal(500, { message: "no" }));
  const shown = [];
  ticking(t);
  await assert.rejects(watch((entries) => shown.push(entries), new AbortController().signal), ApiError);
  assert.deepEqual(shown, [["old"], [], ["new"], []]);
});

test("a request to cancel is about the job that was shown when it was made", { timeout: 10000 }, async (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const lost = () => Promise.reject(new TypeError("the connection was closed"));
  const ready = () => Response.json({ status: "ready" });
  const fetched = answers(t, lost, ready, () => Response.json({ id: "first", status: "cancelled" }));
  learning.current.set({ id: "first", status: "running" });
  const cancelling = learning.cancel();
  learning.current.set({ id: "second", status: "running" });
  ticking(t);
  await cancelling;
  const paths = fetched.mock.calls.map(({ arguments: [url] }) => url.pathname);
  assert.deepEqual(paths, ["/v1/jobs/first", "/health/ready", "/v1/jobs/first"]);
  assert.deepEqual(learning.current.get(), { id: "second", status: "running" });
});
