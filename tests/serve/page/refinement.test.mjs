import assert from "node:assert/strict";
import { test } from "node:test";

import { isJudged, judged, judgement, newRound, question, undoing } from "../../../serve/page/refinement.js";

const ROUND = newRound({ round: 1, candidates: [{}, {}, {}] });

test("a second press takes a like back", () => {
  const liked = judged(ROUND, 1, "likes");
  assert.deepEqual(liked.likes, [1]);
  assert.equal(isJudged(judged(liked, 1, "likes")), false);
});

test("a candidate is liked or disliked, not both", () => {
  const changed = judged(judged(ROUND, 1, "likes"), 1, "dislikes");
  assert.deepEqual(judgement(changed), { action: "judge", round: 1, likes: [], dislikes: [1] });
});

test("a round without candidates says that no more are possible", () => {
  assert.match(question(newRound({ round: 9, candidates: [] })), /^No more rounds are possible/);
  assert.match(question(ROUND), /^Which of these/);
  assert.equal(question(null), question(ROUND));
});

test("undo names the round that was judged last", () => {
  assert.deepEqual(undoing(newRound({ round: 3, candidates: [] })), { action: "undo", round: 2 });
});
