/** One round of refining a word: which candidates are liked and disliked. Pure. */

export const newRound = (answer) => ({ ...answer, likes: [], dislikes: [] });

/** The round after a press on like or dislike; a second press takes it back. */
export function judged(round, index, verdict) {
  const without = (list) => list.filter((other) => other !== index);
  const again = round[verdict].includes(index);
  const next = { ...round, likes: without(round.likes), dislikes: without(round.dislikes) };
  return again ? next : { ...next, [verdict]: [...next[verdict], index] };
}

export const isJudged = ({ likes, dislikes }) => likes.length + dislikes.length > 0;

/** The server's action for a judged round. */
export const judgement = ({ round, likes, dislikes }) => ({ action: "judge", round, likes, dislikes });
