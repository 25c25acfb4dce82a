// Joins the parts: asks the router once a second while the page is seen, and shows what it says.

import { getJson, useKey } from "./api.js";
import { startChat } from "./chat.js";
import { showPath, showWorkers } from "./cluster.js";
import { byId } from "./dom.js";
import { showClasses, showTiers } from "./load.js";
import { showRecord, showRequests } from "./requests.js";

const EVERY_MS = 1000;
let model = "";
let chosen = null; // the request whose record is shown; null: the newest that has ended
const shown = {};
let seen = null; // requests whose hand-over was drawn; null before the first look

async function refresh() {
  try {
    const paths = ["workers", "v1/requests?limit=12", "v1/slo", "v1/pools", "admin"];
    const [topology, recent, slo, pools, { trusted }] = await Promise.all(paths.map(getJson));
    model ||= (await getJson("v1/models")).data[0].id;
    byId("state").textContent = topology.ready ? `${model} is ready` : "not ready: waiting for workers";
    byId("state").className = topology.ready ? "" : "bad";
    const handoffs = newHandoffs(recent.data);
    update("workers", [topology, pools, trusted], () => showWorkers(topology, pools, trusted, refresh));
    update("path", [topology, handoffs], () => showPath(topology, handoffs));
    update("requests", recent.data, (records) => showRequests(records, choose));
    update("classes", slo, showClasses);
    update("tiers", slo.cache, showTiers);
    const record = recent.data.find((each) => each.request_id === chosen) ?? recent.data.find((each) => each.end);
    if (record) update("record", record, showRecord);
  } catch (error) {
    byId("state").textContent = error.message;
    byId("state").className = "bad";
  }
}

/** Show what has changed: what has not keeps its focus, its scrolling and its animation. */
function update(part, value, show) {
  const text = JSON.stringify(value);
  if (shown[part] !== text) {
    shown[part] = text;
    show(value);
  }
}

function newHandoffs(records) {
  const handed = records.filter((record) => new Set(record.actual?.workers ?? []).size > 1);
  const fresh = seen === null ? [] : handed.filter((record) => !seen.has(record.request_id));
  seen = new Set(handed.map((record) => record.request_id));
  return fresh.map((record) => record.actual.workers);
}

async function choose(requestId) {
  chosen = requestId;
  await refresh();
  byId("record").scrollIntoView({ block: "nearest" });
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key").value.trim());
  byId("key-box").open = false;
  refresh();
});
startChat(
  () => model,
  () => {
    chosen = null;
    refresh();
  },
);
(async () => {
  for (;;) {
    if (!document.hidden) await refresh();
    await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
  }
})();
