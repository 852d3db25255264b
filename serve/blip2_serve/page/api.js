// The server's public API: what anybody else could call, and nothing more.

const KEY = "blip2-serve.key";
const TRIES_S = 60; // the longest that a busy server is waited for at a time

/** An answer that is an error, in words for people. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter; // seconds
  }

  get isBusy() { return this.status === 429 || this.status === 503; }
  get needsKey() { return this.status === 401; }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "",
  isKept: () => localStorage.getItem(KEY) !== null,
  set(value, keep) {
    sessionStorage.removeItem(KEY);
    localStorage.removeItem(KEY);
    if (value) (keep ? localStorage : sessionStorage).setItem(KEY, value);
  },
};

export const base = new URL(".", document.baseURI);

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(new URL(path, base), { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch { /* something between here and the server has answered */ }
  const after = Number(response.headers.get("retry-after"));
  const message = sentence(error.message ?? `The server answered ${response.status}`);
  return new ApiError(response.status === 413 ? `The picture is too large. ${message}` : message, {
    status: response.status,
    code: error.code,
    retryAfter: after > 0 ? Math.min(after, TRIES_S) : null,
  });
}

function sentence(text) {
  const full = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(full) ? full : `${full}.`;
}

export async function get(path) {
  return (await request(path)).json();
}

/** The caption of one picture; throws the picture's own error. */
export async function caption(file, fields, signal) {
  const form = new FormData();
  form.append("image", file);
  for (const [name, value] of Object.entries(fields)) form.append(name, String(value));
  const response = await request("v1/caption", { method: "POST", body: form, signal });
  const [result] = (await response.json()).data;
  if (result.error) throw new ApiError(sentence(result.error.message), { status: 400, code: result.error.code });
  return result.caption;
}

/** The chunks of a streamed chat; throws if it does not come to its end. */
export async function* chat(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    body: JSON.stringify({ ...body, stream: true }),
    headers: { "content-type": "application/json" },
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(sentence(chunk.error.message), { code: chunk.error.code });
    yield chunk;
  }
  throw new ApiError("The answer was cut off before its end. Try again.", { code: "cut" });
}

/** The data of server-sent events; each of this server's is one line. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
    }
  } finally {
    reader.cancel().catch(() => {}); // it may have ended by an error
  }
}

/** Runs `ask` again after a busy server's wait, and tells `waiting` of each second of it. */
export async function patiently(ask, waiting, signal) {
  for (;;) {
    try {
      return await ask();
    } catch (error) {
      if (!(error instanceof ApiError && error.isBusy && error.retryAfter)) throw error;
      for (let left = Math.ceil(error.retryAfter); left > 0; left--) {
        waiting(left);
        await second(signal);
      }
      waiting(0);
    }
  }
}

function second(signal) {
  return new Promise((resolve, reject) => {
    const stop = () => { clearTimeout(timer); reject(signal.reason); };
    const timer = setTimeout(() => { signal.removeEventListener("abort", stop); resolve(); }, 1000);
    if (signal.aborted) stop();
    signal.addEventListener("abort", stop, { once: true });
  });
}
