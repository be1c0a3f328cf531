/** What can go wrong between the page and the server. */

/** The server refused; `message` is its own sentence. */
export class ApiError extends Error {
  constructor(status, { message, code = null, param = null } = {}, retryAfter = null, date = NaN) {
    super(message || `The server answered ${status}.`);
    this.status = status;
    this.code = code;
    this.param = param;
    this.retryAfter = retryAfter;
    this.date = date; // when the server answered, in seconds since 1970 by its own clock
  }
}

/** The server cannot be reached, or is starting or stopping. Asking again later helps. */
export class Unreachable extends Error {}

/** Whether an error only says that somebody pressed cancel. */
export const isCancel = (error) => error?.name === "AbortError";

/** The error in an event of a stream. */
export function streamError({ error = {} }) {
  return error.code === "unavailable" ? new Unreachable(error.message) : new ApiError(500, error);
}

/** The error of a response that is not ok; reads its body. */
export async function errorOf(response) {
  let body = {};
  try {
    body = await response.json();
  } catch {
    // not JSON: the status has to do
  }
  const seconds = Number(response.headers.get("Retry-After"));
  const detail = typeof body.error === "object" && body.error ? body.error : { message: body.detail ?? body.message };
  if ([502, 503, 504].includes(response.status)) return new Unreachable(detail.message ?? "The server is not ready.");
  const date = Date.parse(response.headers.get("Date")) / 1000;
  return new ApiError(response.status, detail, seconds > 0 ? seconds : null, date);
}
