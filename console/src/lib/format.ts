/** Numbers, sizes, durations, money and times as the console writes them. Missing values are a dash. */

export const DASH = "–";

const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const compact = new Intl.NumberFormat("en-US", { notation: "compact", maximumFractionDigits: 1 });

export const number = (value: number | null | undefined): string => (value == null ? DASH : whole.format(value));

export function short(value: number | null | undefined): string {
  if (value == null) return DASH;
  return Math.abs(value) < 10_000 ? whole.format(value) : compact.format(value);
}

export function decimal(value: number | null | undefined, digits = 1): string {
  return value == null ? DASH : value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

export function percent(share: number | null | undefined): string {
  return share == null ? DASH : `${(share * 100).toLocaleString("en-US", { maximumFractionDigits: share < 0.1 ? 1 : 0 })} %`;
}

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

export function bytes(value: number | null | undefined): string {
  if (value == null) return DASH;
  let unit = 0;
  let size = value;
  while (size >= 1024 && unit < UNITS.length - 1) {
    size /= 1024;
    unit += 1;
  }
  return `${size.toLocaleString("en-US", { maximumFractionDigits: unit && size < 10 ? 1 : 0 })} ${UNITS[unit]}`;
}

/** Seconds as the two largest units that matter: `820 ms`, `4.2 s`, `3 min 5 s`, `2 h 10 min`, `3 d 4 h`. */
export function duration(seconds: number | null | undefined): string {
  if (seconds == null) return DASH;
  if (seconds < 0) return `−${duration(-seconds)}`;
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 10) return `${decimal(seconds)} s`;
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const parts: [number, string][] = [
    [86_400, "d"],
    [3_600, "h"],
    [60, "min"],
    [1, "s"],
  ];
  const total = Math.round(seconds);
  const first = parts.findIndex(([size]) => total >= size);
  const [size, name] = parts[first]!;
  const [nextSize, nextName] = parts[first + 1]!;
  const rest = Math.floor((total % size) / nextSize);
  return `${Math.floor(total / size)} ${name}${rest ? ` ${rest} ${nextName}` : ""}`;
}

/** An amount in the currency of the ledger; small amounts keep their first digits. */
export function money(amount: number | null | undefined, currency = "USD"): string {
  if (amount == null) return DASH;
  const small = amount !== 0 && Math.abs(amount) < 0.01;
  return amount.toLocaleString("en-US", {
    style: "currency",
    currency,
    minimumFractionDigits: 2,
    maximumFractionDigits: small ? 6 : 2,
  });
}

/** How long ago, or in how long: `12 s ago`, `in 3 min`. `at` in Unix seconds. */
export function relative(at: number, now: number): string {
  const seconds = now - at;
  const size = Math.abs(seconds);
  if (size < 1.5) return "now";
  const text = size < 60 ? `${Math.round(size)} s` : size < 3600 ? `${Math.round(size / 60)} min` : size < 86_400 * 2 ? `${Math.round(size / 3600)} h` : `${Math.round(size / 86_400)} d`;
  return seconds >= 0 ? `${text} ago` : `in ${text}`;
}

const two = (value: number): string => String(value).padStart(2, "0");

/** Local time, as `2026-11-30 15:02:11`. */
export function exact(at: number): string {
  const date = new Date(at * 1000);
  return `${day(at)} ${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
}

export function day(at: number): string {
  const date = new Date(at * 1000);
  return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
}

export const plural = (count: number, one: string, many: string): string => `${number(count)} ${count === 1 ? one : many}`;
