import assert from "node:assert/strict";
import { test } from "node:test";

import { isJudged, judged, judgement, newRound } from "../../../serve/page/refinement.js";

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
