// The router's HTTP API. Every failure is an Error with one sentence to show.

let key = "";

/** `text` goes with every request from now on: as the admin key, and as the key of a client. */
export function useKey(text) {
  key = text;
}

const keyHeaders = () => (key ? { "x-pdserve-admin-key": key, Authorization: `Bearer ${key}` } : {});

export const getJson = (path) => ask("GET", path);

/** `body` is sent as JSON, if there is one. */
export async function ask(method, path, body) {
  const init = { method, headers: keyHeaders() };
  if (body !== undefined) {
    init.headers["Content-Type"] = "application/json";
    init.body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(path, init);
  } catch {
    throw new Error("The router does not answer.");
  }
  const found = await response.json().catch(() => ({}));
  // A router that is not ready says so with 503 and the same body.
  if (!response.ok && (found.error || response.status !== 503)) {
    throw new Error(found.error?.message ?? `${path} answered with status ${response.status}.`);
  }
  return found;
}

/** Events of a streamed chat completion, each as its parsed JSON; ends with the stream. */
export async function* streamChat(body, requestId, signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...keyHeaders(), "X-Request-Id": requestId, "x-pdserve-timeline": "1" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) {
    const failure = await response.json().catch(() => ({}));
    throw new Error(failure.error?.message ?? `The router answered with status ${response.status}.`);
  }
  const decoder = new TextDecoder();
  let rest = "";
  for await (const bytes of chunks(response.body)) {
    const events = (rest + decoder.decode(bytes, { stream: true })).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const value = JSON.parse(data);
      if (value.error) throw new Error(value.error.message);
      yield value;
    }
  }
  throw new Error("The stream ended early.");
}

async function* chunks(stream) {
  const reader = stream.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.releaseLock();
  }
}
