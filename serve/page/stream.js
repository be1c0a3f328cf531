/** Server-sent events read from a fetch response, because EventSource can neither POST nor send a header. */

/** Splits text that arrives in pieces into events `{type, data}`; `data` is still text. */
export function makeParser() {
  let rest = "";
  let type = "message";
  let data = [];
  return function parse(text) {
    const events = [];
    rest += text;
    const lines = rest.split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (data.length) events.push({ type, data: data.join("\n") });
        type = "message";
        data = [];
        continue;
      }
      const [field, value] = fieldOf(line);
      if (field === "event") type = value;
      else if (field === "data") data.push(value);
    }
    return events;
  };
}

/** Yields the events of a response, with `data` parsed as JSON. Ends with the body; throws what the body's reader throws. */
export async function* readEvents(response) {
  const parse = makeParser();
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      const text = done ? `${decoder.decode()}\n\n` : decoder.decode(value, { stream: true });
      for (const { type, data } of parse(text)) {
        if (data !== "[DONE]") yield { type, data: JSON.parse(data) };
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Name and value of a line. A comment has an empty name. */
function fieldOf(line) {
  const colon = line.indexOf(":");
  if (colon < 0) return [line, ""];
  const value = line.slice(colon + 1);
  return [line.slice(0, colon), value.startsWith(" ") ? value.slice(1) : value];
}
