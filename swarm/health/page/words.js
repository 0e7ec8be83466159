// Numbers and times as people read them.

const clock = new Intl.DateTimeFormat([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const shortClock = new Intl.DateTimeFormat([], { hour: "2-digit", minute: "2-digit" });
const day = new Intl.DateTimeFormat([], { weekday: "long", day: "numeric", month: "long" });
const shortDay = new Intl.DateTimeFormat([], { day: "numeric", month: "short" });
const whole = new Intl.NumberFormat();

export const timeOfDay = (unix) => clock.format(unix * 1000);
export const hourAndMinute = (unix) => shortClock.format(unix * 1000);
export const dayOf = (unix) => day.format(unix * 1000);
export const shortDayOf = (unix) => shortDay.format(unix * 1000);
export const isoTime = (unix) => new Date(unix * 1000).toISOString();
export const count = (number) => whole.format(number);

export function rate(number) {
  if (number === null || number === undefined) return "–";
  return number >= 100 ? whole.format(Math.round(number)) : number.toFixed(number >= 10 ? 1 : 2);
}

/** An average of counts. */
export const about = (number) => whole.format(Math.round(10 * number) / 10);

export function duration(seconds) {
  if (seconds < 60) return `${Math.max(0, Math.round(seconds))} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ${Math.floor(seconds / 60) % 60} min`;
  return `${Math.floor(seconds / 86400)} d ${Math.floor(seconds / 3600) % 24} h`;
}

export const plural = (number, word) => `${whole.format(number)} ${word}${number === 1 ? "" : "s"}`;

/** What a server has loaded besides what it hosts: it may host that a moment later. */
export const inMemory = (server) => server.loaded ? ` (${server.loaded[0]}–${server.loaded[1] - 1} in memory)` : "";

export function hosted(server) {
  if (server.start !== null) return server.end - server.start === 1 ? `${server.start}` : `${server.start}–${server.end - 1}`;
  const blocks = Object.keys(server.experts);
  const experts = Object.values(server.experts).reduce((sum, one) => sum + one, 0);
  return `${plural(experts, "expert")} of ${plural(blocks.length, "block")}`;
}
