// The API's page: operations and the fields of their bodies, drawn from /openapi.json.

const at = (document_, ref) => ref.replace("#/", "").split("/").reduce((node, key) => node[key], document_);

function element(tag, text, ...children) {
  const made = document.createElement(tag);
  if (text) made.textContent = text;
  made.append(...children);
  return made;
}

function typeOf(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (schema.anyOf) return schema.anyOf.filter((each) => each.type !== "null").map(typeOf).join(" | ");
  if (schema.type === "array") return `array of ${typeOf(schema.items ?? {})}`;
  return schema.type ?? "any";
}

function limitsOf(schema) {
  const names = { minimum: "≥", exclusiveMinimum: ">", maximum: "≤", maxItems: "items ≤", maxLength: "characters ≤" };
  const parts = (schema.anyOf ?? [schema]).flatMap((each) =>
    Object.entries(names).filter(([key]) => each[key] !== undefined).map(([key, sign]) => `${sign} ${each[key]}`));
  return [...new Set(parts)].join(", ");
}

function fields(schema) {
  const table = element("table", "", element("tr", "", ...["field", "type", "limits"].map((name) => element("th", name))));
  for (const [name, property] of Object.entries(schema.properties ?? {})) {
    const shown = (schema.required ?? []).includes(name) ? `${name} *` : name;
    table.append(element("tr", "", ...[shown, typeOf(property), limitsOf(property)].map((text) => element("td", text))));
  }
  return table;
}

function operation(document_, path, method, described) {
  const title = element("summary", "", element("span", method.toUpperCase()), element("code", path), element("span", described.summary));
  title.firstChild.className = "method";
  const made = element("details", "", title);
  const body = described.requestBody?.content["application/json"].schema;
  for (const ref of body?.anyOf ?? (body ? [body] : [])) {
    made.append(element("h3", typeOf(ref)), fields(at(document_, ref.$ref)));
  }
  const statuses = Object.entries(described.responses).map(([status, { description }]) => element("li", `${status}: ${description}`));
  made.append(element("h3", "Answers"), element("ul", "", ...statuses));
  return made;
}

async function draw() {
  const main = document.getElementById("operations");
  try {
    const answer = await fetch("/openapi.json");
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const document_ = await answer.json();
    const posts = Object.entries(document_.paths).sort(([, a], [, b]) => ("post" in b) - ("post" in a));
    main.replaceChildren(...posts.flatMap(([path, methods]) =>
      Object.entries(methods).map(([method, described]) => operation(document_, path, method, described))));
  } catch (error) {
    main.textContent = `The document could not be read: ${error.message}`;
  }
  main.removeAttribute("aria-busy");
}

draw();
