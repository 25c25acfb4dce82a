// Elements without markup: text is always text, whatever a model or a worker says.

export const byId = (id) => document.getElementById(id);

/** `el("td", {className: "bad"}, "text", child)`; null and undefined children are left out. */
export function el(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Replace a table's content. Cells are text or elements; a row may be given as {cells, className}. */
export function fillTable(table, head, rows) {
  const cells = (row) => (Array.isArray(row) ? row : row.cells).map((cell) => el("td", {}, cell));
  table.replaceChildren(
    el("thead", {}, el("tr", {}, ...head.map((text) => el("th", { scope: "col" }, text)))),
    el("tbody", {}, ...rows.map((row) => el("tr", { className: row.className ?? "" }, ...cells(row)))),
  );
}

export const seconds = (value) =>
  value === null || value === undefined ? "–" : value < 0.001 ? "<1 ms" : value < 1 ? `${(value * 1e3).toFixed(0)} ms` : `${value.toFixed(2)} s`;

export const perSecond = (bytes) => (bytes ? `${(bytes / 1e9).toFixed(1)} GB/s` : "not measured");

export const share = (value) => `${(value * 100).toFixed(0)} %`;
