"use strict";
// Everything is there without this script; it copies commands, sorts tables and reads out what maps show.
(() => {
  for (const holder of document.querySelectorAll(".command")) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      const code = holder.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
      } catch {
        getSelection().selectAllChildren(code); // a file that is opened from disk may not use the clipboard
        document.execCommand("copy");
      }
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 1600);
    });
    holder.append(button);
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    table.querySelectorAll("thead th").forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") !== "descending";
        for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
        const body = table.tBodies[0];
        const order = (a, b) => value(a).localeCompare(value(b), "en", { numeric: true });
        const figures = (a, b) => Number(value(a)) - Number(value(b));
        const numbers = [...body.rows].every((row) => value(row) !== "" && !isNaN(value(row)));
        body.append(...[...body.rows].sort((a, b) => (down ? -1 : 1) * (numbers ? figures : order)(a, b)));
      });
    });
  }

  const times = (ratio) => (ratio < 10 ? ratio.toPrecision(2) : Math.round(ratio).toLocaleString("en")) + "×";
  for (const map of document.querySelectorAll("[data-levels]")) {
    const { blocks, columns, width, top, levels } = map.dataset;
    const rows = blocks.split(" "), cells = atob(levels), wide = Number(columns), step = Number(width);
    const said = document.createElement("output");
    said.className = "reading";
    map.after(said);
    let row = 0, column = 0;
    const say = () => {
      const ratio = Math.log(Number(top)) * (cells.charCodeAt(row * wide + column) / 255);
      const channel = column * step, last = channel + step - 1;
      const name = step > 1 ? `channels ${channel} to ${last}` : `channel ${channel}`;
      said.textContent = `block ${rows[row]}, ${name}: ${ratio ? times(Math.exp(ratio)) : "at most 1×"} the median`;
    };
    const within = (value, count) => Math.max(0, Math.min(count - 1, value));
    map.addEventListener("pointermove", (event) => {
      const box = [...map.querySelectorAll("image")].map((e) => e.getBoundingClientRect()).find((e) => e.width);
      if (!box) return;
      column = within(Math.floor(((event.clientX - box.left) / box.width) * wide), wide);
      row = within(Math.floor(((event.clientY - box.top) / box.height) * rows.length), rows.length);
      say();
    });
    map.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!move) return;
      event.preventDefault();
      [row, column] = [within(row + move[0], rows.length), within(column + move[1], wide)];
      say();
    });
  }

  const closed = () => document.querySelectorAll("details:not([open])");
  let opened = [];
  addEventListener("beforeprint", () => { opened = [...closed()]; for (const each of opened) each.open = true; });
  addEventListener("afterprint", () => { for (const each of opened) each.open = false; });
})();
