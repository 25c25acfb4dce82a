// The workers, their links, and the picture of prefill, transfer and decode.

import { byId, el, fillTable, perSecond } from "./dom.js";

export function showWorkers(topology) {
  const rows = topology.workers.map((worker) => ({
    className: worker.state === "ready" ? "" : "bad",
    cells: [
      worker.worker_id || worker.address,
      worker.role ?? "–",
      worker.error ? `${worker.state}: ${worker.error}` : worker.state,
      String(worker.running_sequences),
      String(worker.waiting_tokens),
      `${worker.total_blocks - worker.free_blocks} of ${worker.total_blocks}`,
    ],
  }));
  fillTable(byId("workers"), ["worker", "role", "state", "running", "tokens waiting", "blocks in use"], rows);
  const links = topology.workers.flatMap((worker) =>
    worker.links.map((link) => ({
      className: link.up ? "" : "bad",
      cells: [`${worker.worker_id} → ${link.to}`, link.up ? link.transport : link.error || "down", perSecond(link.bytes_per_second)],
    })),
  );
  fillTable(byId("links"), ["link", "transport", "in a probe"], links);
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
