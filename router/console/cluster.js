// The workers with their pools, their links, and the picture of prefill, transfer and decode.

import { ask } from "./api.js";
import { byId, el, fillTable, perSecond } from "./dom.js";

const STATES = ["held", "sending", "receiving", "quarantined", "cached", "free"]; // as the ledger names them
const ROLES = ["prefill", "decode", "mixed"];

/** `pools`: blocks by state, by worker. `trusted`: whether the router would do what an operator asks. */
export function showWorkers(topology, pools, trusted, refresh) {
  byId("legend").replaceChildren(...STATES.map((state) => el("span", { className: `key ${state}` }, state)));
  const states = Object.fromEntries(pools.workers.map((each) => [each.worker_id, each]));
  byId("workers").replaceChildren(...topology.workers.map((worker) => row(worker, states[worker.worker_id], trusted, refresh)));
  const links = topology.workers.flatMap((worker) =>
    worker.links.map((link) => ({
      className: link.up ? "" : "bad",
      cells: [`${worker.worker_id} → ${link.to}`, link.up ? link.transport : link.error || "down", perSecond(link.bytes_per_second)],
    })),
  );
  fillTable(byId("links"), ["link", "transport", "bandwidth in a probe"], links);
}

function row(worker, pool, trusted, refresh) {
  const changing = worker.next_role ? `, becomes ${worker.next_role}` : "";
  const state = `${worker.role ?? "unknown"}${changing} · ${worker.error ? `${worker.state}: ${worker.error}` : worker.state}`;
  return el(
    "div",
    { className: `worker ${worker.role}` },
    el("div", { className: "row" }, el("strong", {}, worker.worker_id || worker.address), el("span", { className: worker.state === "ready" ? "" : "bad" }, state), trusted && worker.worker_id ? actions(worker, refresh) : null),
    el("div", { className: "quiet" }, `${worker.running_sequences} running · ${worker.waiting_tokens} tokens waiting`),
    pool && !pool.error ? poolBar(pool) : el("p", { className: "quiet" }, pool?.error ?? `${worker.total_blocks - worker.free_blocks} of ${worker.total_blocks} blocks in use`),
  );
}

function poolBar(pool) {
  const text = STATES.filter((state) => pool.by_state[state]).map((state) => `${pool.by_state[state]} ${state}`).join(", ");
  const bar = el("div", { className: "pool-bar", role: "img", ariaLabel: `${pool.total_blocks} blocks: ${text}`, title: text });
  for (const state of STATES) {
    const part = el("i", { className: state });
    part.style.flexGrow = pool.by_state[state] ?? 0;
    bar.append(part);
  }
  return el("div", {}, bar, el("small", { className: "quiet" }, text));
}

/** Draining, and roles if the router can change them. Each says plainly what it did. */
function actions(worker, refresh) {
  const path = `admin/workers/${encodeURIComponent(worker.worker_id)}`;
  const run = async (text, ...request) => {
    try {
      await ask(...request);
      byId("operator").className = "quiet";
      byId("operator").textContent = text;
    } catch (error) {
      byId("operator").className = "bad";
      byId("operator").textContent = error.message;
    }
    refresh();
  };
  const drained = worker.state === "drained";
  const button = (text, onclick, disabled = false) => el("button", { type: "button", onclick, disabled, ariaLabel: `${text} ${worker.worker_id}` }, text);
  const roles = worker.next_role === undefined ? [] : ROLES.filter((role) => role !== worker.role);
  return el(
    "div",
    { className: "actions" },
    drained
      ? button("Use again", () => run(`${worker.worker_id} is used again.`, "DELETE", `${path}/drain`))
      : button("Drain", () => run(`${worker.worker_id} gets nothing new from this router.`, "POST", `${path}/drain`)),
    ...roles.map((role) =>
      button(`Make ${role}`, () => run(`${worker.worker_id} drains, then becomes ${role}.`, "POST", `${path}/role`, { role }), Boolean(worker.next_role)),
    ),
  );
}

/** Prefill on the left, decode on the right. `handoffs`: pairs of workers that a request crossed since the last call. */
export function showPath(topology, handoffs) {
  const pool = (roles) =>
    el("div", { className: "pool" }, ...topology.workers.filter((worker) => roles.includes(worker.role)).map(card));
  const wire = el("div", { className: "wire" }, handoffs.length ? "" : "blocks over UCX");
  handoffs.slice(0, 8).forEach((pair, number) => {
    const block = el("i", { title: pair.join(" → ") });
    block.style.animationDelay = `${number * 0.12}s`;
    wire.append(block);
  });
  byId("path").replaceChildren(pool(["prefill", "mixed"]), wire, pool(["decode"]));
}

function card(worker) {
  const busy = worker.running_sequences > 0 || worker.waiting_tokens > 0;
  const used = worker.total_blocks - worker.free_blocks;
  return el(
    "div",
    { className: `worker ${worker.role} ${busy ? "busy" : ""}` },
    el("strong", {}, worker.worker_id),
    ` ${worker.role} · ${worker.running_sequences} running`,
    el("progress", { max: Math.max(1, worker.total_blocks), value: used, ariaLabel: "blocks in use" }),
  );
}
