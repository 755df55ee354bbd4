// Numbers and moments, as people read them.

const GIB = 2 ** 30;

export function gib(bytes) {
  if (bytes === null || bytes === undefined) return "?";
  if (bytes && bytes < GIB / 10) return `${Math.ceil(bytes / 2 ** 20)} MiB`;
  return bytes ? `${(bytes / GIB).toFixed(bytes < 10 * GIB ? 1 : 0)} GiB` : "0";
}

/** A length of time: 12s, 3m 04s, 1h 12m, 2d 03h. */
export function span(seconds) {
  if (seconds === null || seconds === undefined) return "";
  const whole = Math.max(0, Math.floor(seconds));
  const two = (number) => String(number).padStart(2, "0");
  if (whole < 60) return `${whole}s`;
  if (whole < 3600) return `${Math.floor(whole / 60)}m ${two(whole % 60)}s`;
  if (whole < 86_400) return `${Math.floor(whole / 3600)}h ${two(Math.floor((whole % 3600) / 60))}m`;
  return `${Math.floor(whole / 86_400)}d ${two(Math.floor((whole % 86_400) / 3600))}h`;
}

const TIME = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });
const DAY = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });

export function clock(seconds) {
  return TIME.format(new Date(seconds * 1000));
}

export function day(seconds) {
  const date = new Date(seconds * 1000);
  const near = Math.abs(Date.now() - date) < 12 * 3_600_000;
  return near ? TIME.format(date).slice(0, 5) : DAY.format(date);
}

/** For a tooltip: the same moment in UTC. */
export function utc(seconds) {
  return new Date(seconds * 1000).toISOString().replace("T", " ").slice(0, 19) + " UTC";
}

export function plural(count, word) {
  return `${count || "no"} ${word}${count === 1 ? "" : "s"}`;
}
