/** Learned words in prompts: where they are, and how to complete one. Pure text; the server has the last word. */

const WORD = /<([^\s<>]+)>|\bembedding:(?:<([^\s<>]+)>|([\w.+*@#!~&$%^=-]+))/gi;

/** The name of a token without its brackets: `<toy>` and `toy` are both written `<toy>` in a prompt. */
export const bareName = (token) => token.replace(/^<(.*)>$/, "$1");

/** How a word is written in a prompt. */
export const written = (token) => `<${bareName(token)}>`;

/** The prompt in pieces `{text, name}`; `name` is that of the word that the piece spells, or null. */
export function pieces(prompt) {
  const found = [];
  let at = 0;
  for (const match of prompt.matchAll(WORD)) {
    if (match.index > at) found.push({ text: prompt.slice(at, match.index), name: null });
    found.push({ text: match[0], name: match[1] ?? match[2] ?? match[3] });
    at = match.index + match[0].length;
  }
  if (at < prompt.length) found.push({ text: prompt.slice(at), name: null });
  return found;
}

/** The names of the words in a prompt, each once. */
export const namesIn = (prompt) => [...new Set(pieces(prompt).flatMap(({ name }) => (name ? [name] : [])))];

/** Names in a prompt that belong to no token; as on the server, lower case is tried too. */
export function unknownNames(prompt, tokens) {
  const known = new Set(tokens.map(bareName));
  return namesIn(prompt).filter((name) => !known.has(name) && !known.has(name.toLowerCase()));
}

/** What is being completed at the caret: `{start, end, matches}`, or null where no `<` is open. */
export function completion(prompt, caret, tokens, limit = 8) {
  const open = /<([^\s<>]*)$/.exec(prompt.slice(0, caret));
  if (!open) return null;
  const rest = /^[^\s<>]*>?/.exec(prompt.slice(caret))[0];
  const query = open[1].toLowerCase();
  const rank = (token) => (bareName(token).toLowerCase().startsWith(query) ? 0 : 1);
  const matches = tokens
    .filter((token) => bareName(token).toLowerCase().includes(query))
    .sort((a, b) => rank(a) - rank(b))
    .slice(0, limit);
  return { start: open.index, end: caret + (rest.endsWith(">") || rest === "" ? rest.length : 0), matches };
}

/** The prompt with a word written over [start, end), and the caret behind it; spaces are added where words would touch. */
export function withWord(prompt, start, end, token) {
  const before = prompt.slice(0, start);
  const after = prompt.slice(end);
  const left = before && !/[\s([,]$/.test(before) ? " " : "";
  const right = after === "" || /^[\s)\].,:;!?]/.test(after) ? "" : " ";
  const text = `${before}${left}${written(token)}${right}${after}`;
  return { text, caret: before.length + left.length + written(token).length };
}
