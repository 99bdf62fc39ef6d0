// Axes: ranges, ticks and where a value lies.

/** Maps values of [low, high] to pixels [from, to]; `log`: by their logarithms. */
export class Scale {
  constructor(low, high, from, to, log) {
    this.low = low;
    this.high = high;
    this.log = log;
    this.slope = (to - from) / (this.turn(high) - this.turn(low) || 1);
    this.offset = from - this.slope * this.turn(low);
  }

  turn(value) {
    return this.log ? Math.log10(value) : value;
  }

  pixel(value) {
    return this.offset + this.slope * (this.log ? Math.log10(value) : value);
  }

  value(pixel) {
    const turned = (pixel - this.offset) / this.slope;
    return this.log ? 10 ** turned : turned;
  }

  /** About `count` round values within the range, in units of `size`. */
  ticks(count, size = 1) {
    const [low, high] = [this.low / size, this.high / size];
    const decades = this.log ? Math.log10(high / low) : 0;
    const found = decades >= 0.8 ? logTicks(low, high, count) : evenTicks(low, high, count);
    return found.map((tick) => tick * size);
  }
}

function evenTicks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const ticks = [];
  for (let number = Math.ceil(low / step - 1e-9); number * step <= high + 1e-9 * step; number += 1) {
    ticks.push(Number((number * step).toPrecision(12)));
  }
  return ticks;
}

function logTicks(low, high, count) {
  const ticks = [];
  const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  const every = Math.max(1, Math.ceil((last - first) / count));
  const factors = (last - first) * 3 <= count + 2 ? [1, 2, 5] : [1];
  for (let power = first; power <= last; power += every) {
    for (const factor of factors) {
      const tick = factor * 10 ** power;
      if (tick >= low * 0.9999 && tick <= high * 1.0001) ticks.push(Number(tick.toPrecision(12)));
    }
  }
  return ticks;
}

/** The first position in rising `values` that is not below `wanted`. */
export function position(values, wanted) {
  let [low, high] = [0, values.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] < wanted) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** The position whose value is nearest to `wanted`. */
export function nearest(values, wanted) {
  const after = position(values, wanted);
  if (after === 0) return 0;
  if (after === values.length) return after - 1;
  return wanted - values[after - 1] < values[after] - wanted ? after - 1 : after;
}

/** Lowest and highest of `values` from `start` to `end`, above zero only when `log`; [inf, -inf] if there is none. */
export function extremes(values, start, end, log) {
  let [low, high] = [Infinity, -Infinity];
  for (let number = start; number < end; number += 1) {
    const value = values[number];
    // False for nan.
    if (value < low && (!log || value > 0)) low = value;
    if (value > high && (!log || value > 0)) high = value;
  }
  return [low, high];
}

// Averages are over this part of a curve's points, and no more points than this are needed to draw them.
const AVERAGED = 50;
const SMOOTH = 320;

/** A curve of means around some points of `curve`, which has means of buckets: nan where the point itself has none. */
export function averaged(curve) {
  const { mean } = curve;
  const half = Math.floor(mean.length / AVERAGED / 2);
  const every = Math.max(1, Math.ceil(mean.length / SMOOTH));
  const picked = [];
  for (let number = mean.length - 1; number >= 0; number -= every) picked.push(number);
  picked.reverse();
  const sums = new Float64Array(mean.length + 1);
  const counts = new Uint32Array(mean.length + 1);
  mean.forEach((value, number) => {
    const known = !Number.isNaN(value);
    sums[number + 1] = sums[number] + (known ? value : 0);
    counts[number + 1] = counts[number] + known;
  });
  const around = (number) => {
    // As many to either side, so that the ends of a falling curve are not moved.
    const reach = Math.min(half, number, mean.length - 1 - number);
    const [from, to] = [number - reach, number + reach + 1];
    return Number.isNaN(mean[number]) ? NaN : (sums[to] - sums[from]) / (counts[to] - counts[from]);
  };
  const columns = Object.entries(curve).map(([name, column]) => [name, Float32Array.from(picked, (n) => column[n])]);
  return { ...Object.fromEntries(columns), value: Float32Array.from(picked, around) };
}
