"use strict";
// What every page has: tips over cells, and a button that saves a table as CSV. No network, no library.

// Texts of cells come from data: one that a spreadsheet would take for a formula gets an apostrophe.
function csvField(text) {
  const value = String(text);
  const safe = /^[=+\-@\t\r]/.test(value) && !/^[+-]?\d+(\.\d+)?$/.test(value) ? `'${value}` : value;
  return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

function saveCsv(name, rows) {
  const text = rows.map((row) => row.map(csvField).join(",")).join("\r\n") + "\r\n";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(["\ufeff", text], { type: "text/csv;charset=utf-8" }));
  link.download = `${name.trim().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "") || "table"}.csv`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// A table's cells, empty where the page has a dash for no value; a column with intervals is followed by their ends, and by how many answers changed.
function tableRows(table) {
  const rows = [...table.rows].map((row) => [...row.cells].flatMap((cell) => Array(cell.colSpan).fill(cell)));
  const more = rows[0].map((_, column) =>
    [["low", "high"], ["changed"]].filter(([key]) => rows.some((row) => row[column]?.dataset[key] !== undefined)).flat());
  return rows.map((row, number) =>
    row.flatMap((cell, column) => {
      const text = (cell.firstChild?.nodeType === Node.TEXT_NODE && cell.querySelector("small")
        ? cell.firstChild.textContent : cell.textContent).trim();
      return [text === "–" ? "" : text, ...more[column].map((key) => (number === 0 ? `${text} ${key}` : cell.dataset[key] ?? ""))];
    }),
  );
}

function heading(table) {
  const before = [...document.querySelectorAll("h1, h2, h3")].filter(
    (title) => title.compareDocumentPosition(table) & Node.DOCUMENT_POSITION_FOLLOWING,
  );
  return [table.caption?.textContent, before.at(-1)?.textContent].filter(Boolean).reverse().join(" ");
}

for (const table of document.querySelectorAll("table.data, table.heat")) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "csv";
  button.textContent = "Save as CSV";
  button.addEventListener("click", () => saveCsv(`${document.title} ${heading(table)}`, tableRows(table)));
  table.closest(".scroll").after(button);
}

// A title shows on a mouse's hover alone; these show on focus and touch too, and never outside the window.
const tip = document.createElement("div");
tip.className = "tip";
tip.setAttribute("role", "tooltip");
tip.hidden = true;
document.body.append(tip);

for (const cell of document.querySelectorAll("[title]")) {
  cell.dataset.tip = cell.title;
  cell.setAttribute("aria-description", cell.title);
  cell.removeAttribute("title");
  cell.tabIndex = 0;
}

function showTip(event) {
  const cell = event.target.closest?.("[data-tip]");
  tip.hidden = !cell;
  if (!cell) return;
  tip.textContent = cell.dataset.tip;
  const box = cell.getBoundingClientRect();
  const left = box.left + box.width / 2 - tip.offsetWidth / 2;
  tip.style.left = `${Math.max(8, Math.min(left, document.documentElement.clientWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${box.top > tip.offsetHeight + 12 ? box.top - tip.offsetHeight - 6 : box.bottom + 6}px`;
}

for (const name of ["mouseover", "focusin", "click"]) document.addEventListener(name, showTip);
for (const name of ["scroll", "focusout"]) document.addEventListener(name, () => (tip.hidden = true), true);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
