// Goodput, queue and refusals by SLO class; hit rates by tier.

import { byId, el, fillTable, seconds, share } from "./dom.js";

export function showClasses(slo) {
  const { admission, classes, objectives } = slo;
  const refused = (name) => admission.refused.filter((each) => each.class === name);
  const names = [...new Set([...Object.keys(objectives), ...Object.keys(classes), ...Object.keys(admission.queued)])];
  const rows = names.map((name) => {
    const { requests = 0, good = 0, missed_by_stage: missed = {} } = classes[name] ?? {};
    const worst = Object.entries(missed).sort(([, a], [, b]) => b - a)[0];
    const wait = admission.predicted_wait_ms[name];
    return [
      el("span", { title: limits(objectives[name]) }, name),
      requests ? meter(good / requests, `${good} of ${requests}`) : "–",
      worst ? `${worst[0]} (${worst[1]})` : "–",
      String(admission.queued[name] ?? 0),
      wait === undefined ? "–" : seconds(wait / 1e3),
      el("span", { title: refused(name).map((each) => `${each.reason}: ${each.requests}`).join(", ") }, String(total(refused(name)))),
    ];
  });
  fillTable(byId("classes"), ["class", "good", "missed by", "queued", "predicted wait", "refused"], rows);
  const waiting = admission.waiting.map((each) => `${each.requests} ${each.class} for ${each.for} (${each.tokens} tokens)`);
  const reasons = admission.refused.map((each) => `${each.requests} ${each.class} for ${each.reason}`);
  byId("admission").textContent = [
    `Admission: ${admission.mode}.`,
    `Waiting: ${waiting.join(", ") || "nobody"}.`,
    `Refused: ${reasons.join(", ") || "nobody"}.`,
  ].join(" ");
}

const total = (entries) => entries.reduce((sum, each) => sum + each.requests, 0);

const limits = (objective) => (objective ? `TTFT ${seconds(objective.ttft_ms / 1e3)}, TPOT ${seconds(objective.tpot_ms / 1e3)}` : "the client's own objectives");

function meter(value, text) {
  return el("span", { className: "share" }, el("progress", { max: 1, value, ariaLabel: text }), ` ${share(value)} · ${text}`);
}

export function showTiers({ prompt_tokens: prompts, cached_tokens: cached }) {
  const found = ["device", "host", "disk", "remote"].map((tier) => [tier, cached[tier] ?? 0]);
  const computed = prompts - found.reduce((sum, [, tokens]) => sum + tokens, 0);
  const bars = [...found, ["computed", computed]].map(([tier, tokens]) =>
    el(
      "div",
      { className: "stage" },
      el("span", {}, tier),
      el("progress", { className: tier, max: Math.max(1, prompts), value: tokens, ariaLabel: `${tier}: ${tokens} tokens` }),
      el("span", {}, prompts ? share(tokens / prompts) : "–"),
    ),
  );
  byId("tiers").replaceChildren(...bars, el("p", { className: "quiet" }, `Of ${prompts} prompt tokens since the router started.`));
}
