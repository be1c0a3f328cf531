import assert from "node:assert/strict";
import { test } from "node:test";

import { makeParser, readEvents } from "../../../serve/page/stream.js";

const TEXT = 'event: a\ndata: {"x": 1}\n\n: ping\n\ndata: {"y":\ndata: 2}\r\n\r\nevent: b\ndata:{"z": "ä"}\n\n';
const EVENTS = [
  { type: "a", data: { x: 1 } },
  { type: "message", data: { y: 2 } },
  { type: "b", data: { z: "ä" } },
];

const collect = async (response) => {
  const events = [];
  for await (const event of readEvents(response)) events.push(event);
  return events;
};

test("events are the same however the bytes are cut", async () => {
  const bytes = new TextEncoder().encode(TEXT);
  for (let size = 1; size <= bytes.length; size += 1) {
    const body = new ReadableStream({
      start(controller) {
        for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
        controller.close();
      },
    });
    assert.deepEqual(await collect(new Response(body)), EVENTS, `in pieces of ${size} bytes`);
  }
});

test("a comment is no event and OpenAI's end mark is skipped", async () => {
  assert.deepEqual(await collect(new Response(": ping\n\ndata: [DONE]\n\n")), []);
});

test("an event without an empty line behind it is not given out before the end", () => {
  const parse = makeParser();
  assert.deepEqual(parse("data: 1\n"), []);
  assert.deepEqual(parse("\n"), [{ type: "message", data: "1" }]);
});

test("a stream that breaks raises", async () => {
  const body = new ReadableStream({
    start(controller) {
      controller.enqueue(new TextEncoder().encode("data: 1\n\n"));
      controller.error(new TypeError("network error"));
    },
  });
  await assert.rejects(collect(new Response(body)), TypeError);
});
