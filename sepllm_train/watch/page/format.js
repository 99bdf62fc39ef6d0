// Numbers, durations and ages as text.

const SUFFIXES = [[1e24, "Y"], [1e21, "Z"], [1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];

/** A count with a metric suffix: 1234567 -> 1.23M. */
export function quantity(value) {
  const [size, suffix] = SUFFIXES.find(([size]) => Math.abs(value) >= size) ?? [1, ""];
  return `${Number((value / size).toPrecision(3))}${suffix}`;
}

/** Seconds as 45s, 3m10s, 2h05m or 3d04h. */
export function duration(seconds) {
  const whole = Math.round(seconds);
  const two = (number) => String(Math.floor(number)).padStart(2, "0");
  if (whole < 60) return `${whole}s`;
  if (whole < 3600) return `${Math.floor(whole / 60)}m${two(whole % 60)}s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)}h${two((whole % 3600) / 60)}m`;
  return `${Math.floor(whole / 86400)}d${two((whole % 86400) / 3600)}h`;
}

/** Time since something happened, in its largest unit. */
export function age(seconds) {
  const [size, unit] = [[86400, "d"], [3600, "h"], [60, "m"], [1, "s"]].find(([size]) => seconds >= size) ?? [1, "s"];
  return `${Math.max(0, Math.floor(seconds / size))}${unit}`;
}

/** A number in five digits. */
export function plain(value) {
  if (!Number.isFinite(value)) return "-";
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e6 || size < 1e-5)) return value.toExponential(2);
  return String(Number(value.toPrecision(5)));
}

/** A loss, or a dash where there is none. */
export const loss = (value) => (value === null ? "-" : value.toFixed(4));

/** A share as percent, or a dash. */
export const percent = (value) => (value === null ? "-" : `${(100 * value).toFixed(1)}%`);
