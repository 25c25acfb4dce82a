// Validates custom resources with the JSON schemas that the packages @kubernetes-models/* ship.
// usage: node validate-crds.mjs FILE.yaml ...   exit 1 if one is wrong; kinds without a schema are named and skipped
import fs from "node:fs";
import { loadAll } from "js-yaml";

const PACKAGES = ["prometheus-operator", "gateway-api", "keda"].map((name) => `@kubernetes-models/${name}`);

async function model(apiVersion, kind) {
  for (const name of PACKAGES) {
    try {
      const found = await import(`${name}/${apiVersion}/${kind}`);
      if (found[kind] ?? found.default?.[kind]) return found[kind] ?? found.default[kind];
    } catch (error) {
      if (!/NOT_FOUND|NOT_EXPORTED/.test(error.code ?? "")) throw error;
    }
  }
  return null;
}

let wrong = 0;
for (const file of process.argv.slice(2)) {
  for (const object of loadAll(fs.readFileSync(file, "utf8"))) {
    if (!object) continue;
    const Model = await model(object.apiVersion, object.kind);
    const name = `${object.kind} ${object.metadata.name}`;
    if (!Model) {
      console.log("skip", name);
      continue;
    }
    try {
      new Model(object).validate();
      console.log("ok", name);
    } catch (error) {
      wrong += 1;
      console.log("wrong", name, String(error.message));
    }
  }
}
process.exit(wrong ? 1 : 0);
