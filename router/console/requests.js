// The last requests; of the chosen one, the waterfall of its stages and why each worker was chosen.

import { byId, el, fillTable, seconds } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";

export function showRequests(records, onChoose) {
  const rows = records.map((record) => [
    el("button", { className: "link", type: "button", onclick: () => onChoose(record.request_id) }, record.request_id.slice(0, 14)),
    record.actual?.workers.join(" → ") ?? record.decisions.at(-1)?.chosen ?? "–",
    String(record.prompt_tokens),
    String(record.actual?.cached_tokens ?? "–"),
    String(record.actual?.output_tokens ?? "–"),
    seconds(record.actual?.ttft_s),
    seconds(record.actual?.tpot_s),
    record.end ?? "running",
    record.missed_by ?? (record.end && record.end !== "abort" ? "good" : "–"),
  ]);
  const head = ["request", "workers", "prompt", "cached", "output", "TTFT", "TPOT", "end", "objective"];
  fillTable(byId("requests"), head, rows);
}

export function showRecord(record) {
  const children = [el("h2", {}, `Request ${record.request_id}`)];
  if (record.actual) {
    children.push(el("h3", {}, `To the first token: ${seconds(record.actual.ttft_s)}, predicted ${seconds(record.predicted.ttft_s)}`));
    children.push(...waterfall(record.actual.ttft_stages_s, ""));
    if (Object.keys(record.actual.handoff_stages_s).length) {
      children.push(el("h3", {}, "From the first to the second: the hand-over"));
      children.push(...waterfall(record.actual.handoff_stages_s, "handoff"));
    }
  }
  for (const decision of record.decisions) children.push(...why(decision));
  byId("record").replaceChildren(...children);
}

function waterfall(stages, className) {
  const total = Object.values(stages).reduce((sum, value) => sum + value, 0) || 1;
  let at = 0;
  return Object.entries(stages).map(([name, value]) => {
    const bar = document.createElementNS(SVG, "rect");
    const picture = document.createElementNS(SVG, "svg");
    picture.setAttribute("viewBox", "0 0 100 10");
    picture.setAttribute("preserveAspectRatio", "none");
    picture.setAttribute("aria-hidden", "true");
    const shape = { x: (100 * at) / total, y: 1, width: Math.max(0.3, (100 * value) / total), height: 8 };
    for (const [attribute, number] of Object.entries(shape)) bar.setAttribute(attribute, number);
    picture.append(bar);
    at += value;
    return el("div", { className: `stage ${className}` }, el("span", {}, name), picture, el("span", {}, seconds(value)));
  });
}

function why(decision) {
  const table = el("table");
  const terms = [...new Set(decision.candidates.flatMap((each) => Object.keys(each.terms_s)))];
  const rows = decision.candidates.map((each) => [
    each.worker_id === decision.chosen ? el("strong", {}, `${each.worker_id} ✓`) : each.worker_id,
    ...terms.map((term) => seconds(each.terms_s[term])),
    seconds(each.cost_s),
    `${each.hit_blocks} blocks`,
  ]);
  fillTable(table, ["worker", ...terms, "sum", "holds"], rows);
  const filtered = decision.filtered.map((each) => `${each.worker_id}: ${each.reason}`).join("; ");
  return [
    el("h3", {}, `${decision.phase}: ${decision.chosen ?? "nobody"}, by policy ${decision.policy}`),
    el("div", { className: "scroll" }, table),
    filtered ? el("p", { className: "quiet" }, `Left out: ${filtered}`) : null,
  ].filter(Boolean);
}
