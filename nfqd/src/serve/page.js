// Keeps the cells of the page current. Without it the page is as it was when it was loaded.
"use strict";

const history = new Map();
const bars = "▁▂▃▄▅▆▇█";

// The last minute of a rate, as a row of bars.
function sparkline(id, text) {
  const value = Number.parseFloat(text);
  if (!Number.isFinite(value)) {
    return;
  }
  const values = history.get(id) ?? [];
  values.push(value);
  if (values.length > 60) {
    values.shift();
  }
  history.set(id, values);
  const most = Math.max(...values, 1);
  return values.map((one) => bars[Math.min(bars.length - 1, Math.floor((one / most) * bars.length))]).join("");
}

function patch(cells) {
  for (const [id, text] of cells) {
    const cell = document.getElementById(id);
    if (cell === null) {
      if (id !== "headline") {
        // A row has come: the page is made anew.
        location.reload();
        return;
      }
      continue;
    }
    if (cell.textContent !== text) {
      cell.textContent = text;
    }
    if (id === "headline") {
      cell.className = text === "OK" ? "ok" : "bad";
    } else if (text.endsWith("/s")) {
      cell.title = sparkline(id, text) ?? "";
      cell.dataset.spark = cell.title;
    }
  }
}

const source = new EventSource("/events");
source.onmessage = (event) => patch(JSON.parse(event.data));
