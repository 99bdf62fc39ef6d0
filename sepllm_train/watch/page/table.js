// The table of runs and the legend.

import { age, duration, loss, percent, quantity } from "/format.js";

// A running run is told to be silent after this many of its usual pauses between records, and not before two minutes.
const PAUSES = 10;
const SILENT = 120;
const SVG = "http://www.w3.org/2000/svg";

/** A short line in the colour and dashes of a run. */
export function swatch(style) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "swatch");
  svg.setAttribute("viewBox", "0 0 26 10");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(SVG, "path");
  line.setAttribute("d", "M0 5H26");
  line.setAttribute("stroke", style.colour);
  line.setAttribute("stroke-width", "3");
  line.setAttribute("stroke-dasharray", style.dash.join(" "));
  svg.append(line);
  return svg;
}

/** An element with a class and text. */
export function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function statusOf(run, seconds) {
  if (run.status !== "running" || seconds === null) {
    return [run.status, { finished: "good", failed: "warn", interrupted: "warn" }[run.status] ?? ""];
  }
  const silent = seconds > Math.max(SILENT, PAUSES * (run.interval ?? 0));
  return silent ? [`no record for ${age(seconds)}`, "warn"] : ["running", ""];
}

/** Write the rows of the table; `now` is the server's clock in seconds since 1970. */
export function writeTable(body, runs, now) {
  const labels = [...body.parentNode.querySelectorAll("thead th")].map((cell) => cell.textContent);
  while (body.rows.length < runs.length) {
    const row = body.insertRow();
    const head = element("th");
    head.scope = "row";
    row.append(head);
    for (const label of labels.slice(1)) row.insertCell().dataset.label = label;
  }
  runs.forEach((run, number) => {
    const row = body.rows[number];
    row.className = run.hidden ? "out" : "";
    const seconds = run.written === null ? null : Math.max(0, now - run.written);
    const [status, kind] = statusOf(run, seconds);
    const steps = run.steps === null ? "" : `/${run.steps.toLocaleString("en")}`;
    const texts = [
      status,
      run.status === "waiting" ? "-" : `${run.step.toLocaleString("en")}${steps}`,
      loss(run.loss),
      loss(run.validation),
      run.throughput === null ? "-" : quantity(run.throughput),
      percent(run.share),
      percent(run.mfu),
      run.left === null ? "-" : duration(run.left),
      seconds === null ? "-" : `${age(seconds)} ago`,
    ];
    const head = row.cells[0];
    if (head.dataset.label !== run.label) {
      head.dataset.label = run.label;
      head.replaceChildren(swatch(run.style), document.createTextNode(run.label));
      head.title = run.folder;
    }
    texts.forEach((text, column) => write(row.cells[column + 1], text));
    row.cells[1].className = kind;
    writeBar(row.cells[2], run);
  });
}

function write(cell, text) {
  if (cell.dataset.text === text) return;
  cell.dataset.text = text;
  if (cell.firstChild === null) cell.append(text);
  else cell.firstChild.nodeValue = text;
}

function writeBar(cell, run) {
  if (!run.steps) return;
  if (cell.childNodes.length < 2) {
    const bar = element("span", "bar");
    bar.append(element("i"));
    cell.append(bar);
  }
  cell.lastChild.firstChild.style.width = `${Math.min(100, (100 * run.step) / run.steps)}%`;
}

/** Write the legend; a click calls `toggle(number)`, a double click `alone(number)`. */
export function writeLegend(legend, runs, toggle, alone) {
  const told = runs.map((run) => run.label).join("\n");
  if (legend.dataset.told !== told) {
    legend.dataset.told = told;
    legend.replaceChildren(
      ...runs.map((run, number) => {
        const button = element("button");
        button.type = "button";
        button.append(swatch(run.style), run.label);
        button.addEventListener("click", () => toggle(number));
        button.addEventListener("dblclick", () => alone(number));
        return button;
      }),
    );
  }
  runs.forEach((run, number) => legend.children[number].setAttribute("aria-pressed", String(!run.hidden)));
}
