// The chat: one conversation, streamed, with what each answer cost.

import { streamChat } from "./api.js";
import { byId, el, seconds } from "./dom.js";

/** `model()` names the model; `onAnswer(requestId)` is called when an answer has ended. */
export function startChat(model, onAnswer) {
  const history = [];
  let abort = null;

  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const prompt = byId("prompt").value.trim();
    if (prompt && !abort) answer(prompt);
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      byId("ask").requestSubmit();
    }
  });
  byId("stop").addEventListener("click", () => abort?.abort());
  byId("clear").addEventListener("click", () => {
    abort?.abort();
    history.length = 0;
    byId("messages").replaceChildren();
    byId("prompt").focus();
  });

  async function answer(prompt) {
    const system = byId("system").value.trim();
    const asked = { role: "user", content: prompt };
    const messages = [...(system ? [{ role: "system", content: system }] : []), ...history, asked];
    const requestId = `console-${crypto.getRandomValues(new Uint32Array(4)).join("-")}`;
    show("user", prompt);
    byId("prompt").value = "";
    const { text, note } = show("assistant", "");
    const began = performance.now();
    let usage = null;
    let extension = null;
    let failure = "";
    setBusy((abort = new AbortController()));
    try {
      const body = {
        model: model(),
        messages,
        temperature: Number(byId("temperature").value),
        max_tokens: Number(byId("max-tokens").value),
      };
      for await (const event of streamChat(body, requestId, abort.signal)) {
        text.data += event.choices[0]?.delta.content ?? "";
        usage = event.usage ?? usage;
        extension = event.x_pdserve ?? extension;
        byId("messages").scrollTop = byId("messages").scrollHeight;
      }
    } catch (error) {
      failure = error.name === "AbortError" ? "stopped" : error.message;
    }
    // What was stopped or failed is shown, and is no part of what the model is told next.
    if (!failure) history.push(asked, { role: "assistant", content: text.data });
    note.className = failure && failure !== "stopped" ? "bad" : "";
    note.replaceChildren(failure || describe(usage, extension, performance.now() - began));
    setBusy((abort = null));
    onAnswer(requestId);
  }

  function show(role, content) {
    const text = document.createTextNode(content);
    const note = el("small");
    byId("messages").append(el("li", { className: role }, text, note));
    return { text, note };
  }

  function setBusy(controller) {
    byId("send").disabled = controller !== null;
    byId("stop").disabled = controller === null;
  }
}

function describe(usage, extension, elapsedMs) {
  const parts = [];
  if (extension) parts.push(`first token ${seconds(extension.ttft_s)}`, `then ${seconds(extension.tpot_s)} a token`);
  if (usage) {
    parts.push(`${usage.completion_tokens} tokens, ${((usage.completion_tokens * 1e3) / elapsedMs).toFixed(0)}/s`);
    const tiers = Object.entries(extension?.cached_tokens ?? {}).map(([tier, tokens]) => `${tokens} from ${tier}`);
    parts.push(`prompt of ${usage.prompt_tokens}: ${tiers.join(", ") || "nothing cached"}`);
  }
  return parts.join(" · ");
}
