// What follows the pointer over a chart: the nearest point in every chart, its values, and a range to zoom into.

import { clear } from "/chart.js";
import { loss, percent, plain, quantity } from "/format.js";
import { nearest } from "/scale.js";
import { element, swatch } from "/table.js";

const MOST = 9;
const DRAGGED = 8;
const REACH = 14;

export class Pointer {
  constructor(chart) {
    this.chart = chart;
    this.tip = element("div", "tip");
    this.tip.hidden = true;
    chart.plot.append(this.tip);
    this.found = null;
    this.here = false;
    this.at = null;
    this.began = null;
    const plot = chart.plot;
    plot.addEventListener("pointermove", (event) => this.move(event));
    plot.addEventListener("pointerdown", (event) => this.down(event));
    plot.addEventListener("pointerup", (event) => this.up(event));
    plot.addEventListener("pointerleave", () => this.leave());
    plot.addEventListener("dblclick", () => chart.zoom(null));
  }

  place(event) {
    const box = this.chart.plot.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  move(event) {
    this.at = this.place(event);
    const best = this.chart.find(...this.at);
    const found = best && { number: best.line.number, name: best.line.name, step: best.line.step[best.index] };
    this.chart.onHover(found);
  }

  down(event) {
    this.move(event);
    if (event.pointerType === "touch" || event.button !== 0) return;
    this.began = this.at[0];
    this.chart.plot.setPointerCapture(event.pointerId);
  }

  up(event) {
    const [from, to] = [this.began, this.place(event)[0]];
    this.began = null;
    const { across, box } = this.chart;
    if (from === null || across === null || Math.abs(to - from) < DRAGGED) return;
    const within = (pixel) => across.value(Math.min(box.right, Math.max(box.left, pixel)));
    this.chart.zoom([within(Math.min(from, to)), within(Math.max(from, to))]);
  }

  leave() {
    if (this.began === null) this.chart.onHover(null);
  }

  /** Mark a point that was found in some chart. */
  mark(found, here) {
    const nothing = this.found === null && found === null;
    this.found = found;
    this.here = here;
    if (!nothing) this.again();
  }

  /** Draw once more, on curves that may have changed. */
  again() {
    const { chart, found } = this;
    if (!chart.inSight) return;
    const context = clear(chart.above, chart.plot);
    this.tip.hidden = true;
    if (found === null || chart.across === null) return;
    context.save();
    chart.clip(context);
    for (const line of chart.lines.filter((line) => line.number === found.number)) {
      chart.drawLine(context, line, line.name === "loss" || line.name === "throughput" ? 1.4 : 3, 1);
    }
    this.drawPoint(context);
    if (this.here && this.began !== null) this.drawRange(context);
    context.restore();
    if (this.here) this.writeTip();
  }

  /** A ring around the point, and a line down to the axis. */
  drawPoint(context) {
    const { chart, found } = this;
    const lines = chart.lines.filter((line) => line.number === found.number);
    const line = lines.find((line) => line.name === found.name) ?? lines[0];
    if (line === undefined) return;
    const index = nearest(line.step, found.step);
    const [x, y] = [chart.across.pixel(line.x[index]), chart.vertical.pixel(line.y[index])];
    context.strokeStyle = getComputedStyle(chart.plot).color;
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(x, chart.box.top);
    context.lineTo(x, chart.box.bottom);
    context.globalAlpha = 0.5;
    context.stroke();
    context.globalAlpha = 1;
    context.lineWidth = 2;
    context.fillStyle = line.run.style.colour;
    context.beginPath();
    context.arc(x, y, 5, 0, 7);
    context.fill();
    context.stroke();
  }

  drawRange(context) {
    const { box } = this.chart;
    context.globalAlpha = 0.18;
    context.fillStyle = getComputedStyle(this.chart.plot).color;
    context.fillRect(this.began, box.top, this.at[0] - this.began, box.bottom - box.top);
    context.globalAlpha = 1;
  }

  /** Values of the runs nearest to the pointer. */
  writeTip() {
    const { chart, found, tip } = this;
    const wanted = chart.across.value(this.at[0]);
    const rows = [];
    for (const line of chart.lines.filter((line) => line.name === found.name)) {
      const own = line.number === found.number;
      const index = own ? nearest(line.step, found.step) : nearest(line.x, wanted);
      const away = Math.abs(chart.across.pixel(line.x[index]) - this.at[0]);
      const value = line.y[index];
      if (!Number.isFinite(value) || (!own && away > REACH)) continue;
      rows.push({ line, own, index, value, distance: own ? -1 : Math.abs(chart.vertical.pixel(value) - this.at[1]) });
    }
    rows.sort((one, other) => one.distance - other.distance).splice(MOST);
    const own = rows.find((row) => row.own);
    if (own === undefined) return;
    rows.sort((one, other) => other.value - one.value);
    const [size, unit] = chart.unit;
    const x = own.line.x[own.index] / size;
    const averaged = chart.view.averaged && found.name !== "validation" && !chart.scored ? ", averaged," : "";
    const names = { loss: "training loss", validation: "validation loss", share: "attended share" };
    const of = chart.scored ? chart.up : names[found.name] ?? "tokens/s";
    const step = Math.round(found.step).toLocaleString("en");
    tip.replaceChildren(element("p", "", `${of}${averaged} at step ${step}, ${plain(x)} ${brief(unit)}`));
    for (const row of rows) {
      const entry = element("div", row.own ? "on" : "");
      const losses = chart.isLoss || chart.scored;
      const text = losses ? loss(row.value) : found.name === "share" ? percent(row.value) : quantity(row.value);
      entry.append(swatch(row.line.run.style), element("span", "", row.line.run.label), text);
      tip.append(entry);
    }
    tip.hidden = false;
    const { clientWidth: width, clientHeight: height } = chart.plot;
    const [px, py] = this.at;
    tip.style.left = `${px < width / 2 ? px + 16 : Math.max(0, px - tip.offsetWidth - 16)}px`;
    tip.style.top = `${Math.max(0, Math.min(height - tip.offsetHeight, py - tip.offsetHeight / 2))}px`;
  }
}

/** Unit of an axis behind a number: "training tokens, millions" -> "million tokens". */
function brief(label) {
  return label
    .replace(/ \(.*/, "")
    .replace(/^training (time, )?/, "")
    .replace(/^tokens, (\w+)s$/, "$1 tokens");
}
