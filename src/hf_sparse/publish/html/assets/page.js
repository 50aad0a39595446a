"use strict";

// Sorting: a button in each heading; the order of a cell is its data-order.
function compare(a, b, numeric) {
  return numeric ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true });
}

function sortBy(table, column) {
  const headings = [...table.tHead.rows[0].cells];
  const heading = headings[column];
  const down = heading.getAttribute("aria-sort") === "ascending";
  for (const other of headings) other.setAttribute("aria-sort", "none");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => [row.cells[column].dataset.order, row]);
  const numeric = body.querySelector(`td.number:nth-child(${column + 1})`) !== null;
  rows.sort((a, b) => compare(a[0], b[0], numeric) * (down ? -1 : 1));
  body.append(...rows.map(([, row]) => row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    if (heading.textContent === "" || table.tBodies[0].rows.length < 2) return;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = heading.textContent;
    button.addEventListener("click", () => sortBy(table, column));
    heading.replaceChildren(button);
    heading.setAttribute("aria-sort", "none");
  });
}

// Masks: two bitmaps of the layer that is chosen.
const masks = JSON.parse(document.getElementById("masks-data").textContent);
const select = document.getElementById("mask-layer");

function bytes(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

// Pale for zero, dark for kept, in both colour schemes.
const PALE = [238, 244, 251];
const DARK = [18, 62, 107];

// Each value, from 0 to 1, as a pixel from pale to dark.
function draw(canvas, [rows, columns], value) {
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  for (let i = 0; i < rows * columns; i++) {
    const share = value(i);
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = PALE[c] + (DARK[c] - PALE[c]) * share;
    image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

function show() {
  const mask = masks[select.value];
  const density = bytes(mask.density);
  const bits = bytes(mask.bits);
  const low = density.reduce((a, b) => Math.min(a, b), 255);
  const high = density.reduce((a, b) => Math.max(a, b), 0);
  const percent = (share) => `${((100 * share) / 255).toFixed(0)} %`;
  draw(document.getElementById("mask-density"), mask.grid, (i) =>
    high > low ? (density[i] - low) / (high - low) : 0.5,
  );
  draw(document.getElementById("mask-corner"), mask.corner, (i) => (bits[i >> 3] >> (7 - (i & 7))) & 1);
  document.getElementById("mask-text").textContent =
    `${mask.name}: ${mask.shape[0]} outputs x ${mask.shape[1]} inputs.`;
  document.getElementById("mask-range").textContent =
    `from ${percent(low)} (light) to ${percent(high)} (dark)`;
}

if (select !== null) {
  select.addEventListener("change", show);
  show();
}
