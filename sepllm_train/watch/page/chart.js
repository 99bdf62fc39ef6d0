// One chart: its curves on a canvas, and a second canvas above for what follows the pointer.

import { Pointer } from "/pointer.js";
import { Scale, extremes, nearest, position } from "/scale.js";
import { plain, quantity } from "/format.js";
import { element } from "/table.js";

const FONT = '12px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif';
// The first part of each run, where losses fall from the same height, is left above the chart.
const START = 0.1;
const MARKED = 60;

export class Chart {
  /** `curves`: names of what is drawn; `key`: the column along the axis; `up`: what the vertical axis says. */
  constructor({ title, curves, up, key, wide = false, scored = false }) {
    Object.assign(this, { title, curves, up, key, scored, lines: [], view: null, zoomed: null, across: null });
    this.onHover = () => {};
    this.isLoss = curves.includes("loss");
    this.figure = element("figure", wide ? "wide" : "");
    const caption = element("figcaption");
    this.back = element("button", "", "whole range");
    this.back.type = "button";
    this.back.hidden = true;
    this.back.addEventListener("click", () => this.zoom(null));
    caption.append(element("span", "", title), this.back);
    this.plot = element("div", "plot");
    this.base = element("canvas");
    this.base.setAttribute("role", "img");
    this.above = element("canvas");
    this.above.setAttribute("aria-hidden", "true");
    this.plot.append(this.base, this.above);
    this.figure.append(caption, this.plot);
    this.pointer = new Pointer(this);
    // Charts out of sight are drawn when they come into it.
    this.stale = true;
    this.inSight = false;
    new IntersectionObserver((entries) => {
      this.inSight = entries.at(-1).isIntersecting;
      if (this.inSight && this.stale) this.draw();
    }).observe(this.plot);
    new ResizeObserver(() => this.redraw()).observe(this.plot);
  }

  /** Show {runs, units of the axis, log: whether it is logarithmic, range of losses, shown: curve -> bool (others are), averaged}. */
  show(view) {
    this.view = view;
    this.redraw();
  }

  redraw() {
    this.stale = true;
    if (this.inSight) this.draw();
  }

  /** Show [low, high] of the axis only; null for all of it. */
  zoom(range) {
    this.zoomed = range;
    this.back.hidden = range === null;
    this.redraw();
  }

  /** Draw what was found under the pointer of some chart; `here` if of this one. */
  hover(found, here) {
    this.pointer.mark(found, here);
  }

  draw() {
    if (this.view === null || this.plot.clientWidth === 0) return;
    this.stale = false;
    this.lines = this.findLines();
    const context = clear(this.base, this.plot);
    const style = getComputedStyle(document.documentElement);
    const colours = { ink: style.getPropertyValue("--ink").trim(), grid: style.getPropertyValue("--grid").trim() };
    const points = this.lines.reduce((sum, line) => sum + line.x.length, 0);
    const content = `${this.title}: ${this.lines.length} curves, ${points.toLocaleString("en")} points`;
    if (points === 0) {
      this.across = null;
      this.base.setAttribute("aria-label", content);
      context.fillStyle = colours.ink;
      context.textAlign = "center";
      context.fillText("nothing to draw yet", this.plot.clientWidth / 2, this.plot.clientHeight / 2);
      return;
    }
    this.setScales(context);
    this.base.setAttribute("aria-label", `${content}, over ${this.unit[1]}`);
    this.drawAxes(context, colours);
    this.drawLines(context);
    this.pointer.again();
  }

  findLines() {
    const lines = [];
    this.view.runs.forEach((run, number) => {
      for (const name of this.curves) {
        const curve = (this.view.averaged && name !== "validation" ? run.smooth : run.curves)[name];
        if (run.hidden || this.view.shown[name] === false || !curve || curve.value.length === 0) continue;
        lines.push({ number, name, run, x: curve[this.key], y: curve.value, step: curve.step });
      }
    });
    // Validation above training.
    return lines.sort((one, other) => (one.name === "validation") - (other.name === "validation"));
  }

  setScales(context) {
    const { clientWidth: width, clientHeight: height } = this.plot;
    const { log, units, range } = this.view;
    let [low, high] = [Infinity, -Infinity];
    for (const { x } of this.lines) {
      const [first, last] = extremes(x, 0, x.length, log);
      [low, high] = [Math.min(low, first), Math.max(high, last)];
    }
    if (!log) low = Math.min(0, low);
    if (!(low < high)) [low, high] = log ? [(low || 1) / 2, (high || 1) * 2] : [low, low + 1];
    this.unit = units.find(([size]) => high >= 2 * size) ?? units.at(-1);
    if (this.zoomed !== null) [low, high] = this.zoomed;
    else if (!log) high += 0.02 * (high - low);
    const logUp = this.isLoss && range === "log";
    const [bottom, top] = this.valueRange(low, high, logUp);
    const write = this.isLoss || this.scored ? plain : quantity;
    let vertical = new Scale(bottom, top, height - 1, 8, logUp);
    context.font = FONT;
    this.words = wrap(context, this.unit[1], width - 70);
    const foot = 24 + 16 * this.words.length;
    vertical = new Scale(bottom, top, height - foot, 8, logUp);
    this.marks = vertical.ticks(Math.max(2, Math.floor((height - foot) / 34))).map((tick) => [tick, write(tick)]);
    const left = 28 + Math.max(...this.marks.map(([, text]) => context.measureText(text).width), 10);
    this.vertical = vertical;
    this.across = new Scale(low, high, left, width - 14, log);
    this.box = { left, right: width - 14, top: 8, bottom: height - foot };
  }

  /** Lowest and highest value to show between `low` and `high` of the axis. */
  valueRange(low, high, log) {
    const later = this.isLoss && this.view.range === "later" && this.zoomed === null && !this.view.log;
    let [bottom, top] = [Infinity, -Infinity];
    for (const skip of later ? [START, 0] : [0]) {
      for (const { x, y } of this.lines) {
        const from = position(x, Math.max(low, x[0] + skip * (x.at(-1) - x[0])));
        const [least, most] = extremes(y, from, position(x, high * (1 + 1e-6)) + 1, log);
        [bottom, top] = [Math.min(bottom, least), Math.max(top, most)];
      }
      if (bottom <= top) break;
    }
    if (!(bottom <= top)) return log ? [0.1, 1] : [0, 1];
    if (log) return bottom < top ? [bottom / 1.03, top * 1.03] : [bottom / 2, top * 2];
    if (!this.isLoss && !this.scored) return [0, 1.06 * top || 1];
    const margin = 0.05 * (top - bottom) || 0.1;
    return [bottom - margin, top + margin];
  }

  drawAxes(context, colours) {
    const { left, right, top, bottom } = this.box;
    const size = this.unit[0];
    context.strokeStyle = colours.grid;
    context.fillStyle = colours.ink;
    context.lineWidth = 1;
    context.textBaseline = "middle";
    context.textAlign = "right";
    context.beginPath();
    for (const [tick, text] of this.marks) {
      const y = Math.round(this.vertical.pixel(tick)) + 0.5;
      context.moveTo(left, y);
      context.lineTo(right, y);
      context.fillText(text, left - 6, y);
    }
    context.textAlign = "center";
    context.textBaseline = "top";
    for (const tick of this.across.ticks(Math.max(2, Math.floor((right - left) / 80)), size)) {
      const x = Math.round(this.across.pixel(tick)) + 0.5;
      context.moveTo(x, top);
      context.lineTo(x, bottom);
      context.fillText(plain(tick / size), x, bottom + 5);
    }
    context.stroke();
    this.words.forEach((words, row) => context.fillText(words, (left + right) / 2, bottom + 22 + 16 * row));
    context.save();
    context.translate(2, (top + bottom) / 2);
    context.rotate(-Math.PI / 2);
    context.fillText(this.up, 0, 0);
    context.restore();
  }

  drawLines(context) {
    context.save();
    this.clip(context);
    for (const line of this.lines) {
      const [width, alpha] = line.name === "loss" ? [1.2, 0.5] : line.name === "throughput" ? [1.2, 0.9] : [1.8, 1];
      this.drawLine(context, line, width, alpha);
    }
    context.restore();
  }

  clip(context) {
    const { left, right, top, bottom } = this.box;
    context.beginPath();
    context.rect(left, top - 2, right - left + 2, bottom - top + 4);
    context.clip();
  }

  drawLine(context, line, width, alpha) {
    const { x, y, run, name } = line;
    const [from, to] = [
      Math.max(0, position(x, this.across.low) - 1),
      Math.min(x.length, position(x, this.across.high * (1 + 1e-6)) + 1),
    ];
    context.globalAlpha = alpha;
    context.strokeStyle = context.fillStyle = run.style.colour;
    context.lineWidth = width;
    context.lineJoin = "bevel";
    context.lineCap = "round";
    // Dashes of a curve that turns at every pixel could not be seen.
    context.setLineDash(name === "loss" ? [] : run.style.dash);
    context.beginPath();
    const { across, vertical } = this;
    let drawing = false;
    for (let number = from; number < to; number += 1) {
      const [px, py] = [across.pixel(x[number]), vertical.pixel(y[number])];
      if (!(Math.abs(px) < 1e6 && Math.abs(py) < 1e6)) {
        drawing = false;
        continue;
      }
      if (drawing) context.lineTo(px, py);
      else {
        context.moveTo(px, py);
        // A point between two gaps.
        if (number + 1 === to || Number.isNaN(y[number + 1])) context.lineTo(px + 0.5, py);
      }
      drawing = true;
    }
    context.stroke();
    context.setLineDash([]);
    if ((name === "validation" || this.scored) && to - from <= MARKED) this.drawMarks(context, line, from, to);
    context.globalAlpha = 1;
  }

  drawMarks(context, { x, y }, from, to) {
    context.beginPath();
    for (let number = from; number < to; number += 1) {
      const [px, py] = [this.across.pixel(x[number]), this.vertical.pixel(y[number])];
      context.moveTo(px + 2.6, py);
      context.arc(px, py, 2.6, 0, 7);
    }
    context.fill();
  }

  /** The point of the curves nearest to a pixel: {line, index}; null without one. */
  find(px, py) {
    if (this.across === null || this.stale) return null;
    const wanted = this.across.value(px);
    let best = null;
    for (const line of this.lines) {
      const around = nearest(line.x, wanted);
      // Lowest and highest of a bucket stand side by side.
      for (let index = Math.max(0, around - 1); index <= Math.min(line.x.length - 1, around + 1); index += 1) {
        const [dx, dy] = [this.across.pixel(line.x[index]) - px, this.vertical.pixel(line.y[index]) - py];
        const distance = dx * dx + dy * dy;
        if (distance < (best?.distance ?? Infinity)) best = { line, index, distance };
      }
    }
    return best;
  }
}

/** Fit a canvas to its plot and give its empty drawing context, in CSS pixels. */
export function clear(canvas, plot) {
  const ratio = Math.min(3, devicePixelRatio || 1);
  const [width, height] = [Math.round(plot.clientWidth * ratio), Math.round(plot.clientHeight * ratio)];
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, plot.clientWidth, plot.clientHeight);
  context.font = FONT;
  return context;
}

/** Text in lines no wider than `width`. */
function wrap(context, text, width) {
  const lines = [""];
  for (const word of text.split(" ")) {
    const longer = `${lines.at(-1)} ${word}`.trim();
    if (lines.at(-1) && context.measureText(longer).width > width) lines.push(word);
    else lines[lines.length - 1] = longer;
  }
  return lines;
}
