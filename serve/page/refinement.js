/** One round of refining a word: which candidates are liked and disliked. Pure. */

export const newRound = (answer) => ({ ...answer, likes: [], dislikes: [] });

/** The round after a press on like or dislike; a second press takes it back. */
export function judged(round, index, verdict) {
  const without = (list) => list.filter((other) => other !== index);
  const again = round[verdict].includes(index);
  const next = { ...round, likes: without(round.likes), dislikes: without(round.dislikes) };
  return again ? next : { ...next, [verdict]: [...next[verdict], index] };
}

/** What is asked about a round, which is null while it is drawn. */
export const question = (round) =>
  round?.candidates.length === 0
    ? "No more rounds are possible: keep the word as it is now, or undo the last round."
    : "Which of these are closer to what you mean?";

export const isJudged = ({ likes, dislikes }) => likes.length + dislikes.length > 0;

/** The server's action for a judged round. */
export const judgement = ({ round, likes, dislikes }) => ({ action: "judge", round, likes, dislikes });

/** The server's action that undoes the round before this one. It is named, so that a repeated request undoes it once. */
export const undoing = ({ round }) => ({ action: "undo", round: round - 1 });
