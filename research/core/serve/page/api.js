// The server's endpoints, as the page uses them.

/** An error answer of the server; `status` 0: it was not reached. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function answer(request) {
  let response;
  try {
    response = await request;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.", 0);
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new ApiError(body?.error?.message ?? `The server answered ${response.status}.`, response.status);
}

/** Names that a request may have as its model, the usual one first. */
export async function models(key) {
  const response = await answer(fetch("/v1/models", { headers: headers(key) }));
  return (await response.json()).data;
}

/** Ask for the next message; `onChunk(chunk)` gets each piece as OpenAI's interface has it. */
export async function chat(body, key, signal, onChunk) {
  const response = await answer(
    fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers(key) },
      body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } }),
      signal,
    }),
  );
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  let ended = false;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const events = (held + value).split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") {
        ended = true;
        continue;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message, response.status);
      onChunk(chunk);
    }
  }
  if (!ended) throw new ApiError("The connection ended in the middle of the answer.", 0);
}
