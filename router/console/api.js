// The router's HTTP API. Every failure is an Error with one sentence to show.

export async function getJson(path) {
  let response;
  try {
    response = await fetch(path);
  } catch {
    throw new Error("The router does not answer.");
  }
  const body = await response.json().catch(() => ({}));
  // A router that is not ready says so with 503 and the same body.
  if (!response.ok && response.status !== 503) {
    throw new Error(body.error?.message ?? `${path} answered with status ${response.status}.`);
  }
  return body;
}

/** Events of a streamed chat completion, each as its parsed JSON; ends with the stream. */
export async function* streamChat(body, requestId, signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Request-Id": requestId, "x-pdserve-timeline": "1" },
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
