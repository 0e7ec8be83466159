// The connection to the dashboard: the latest overview whenever there is a new one, and whether it still comes.

const SILENT_MS = 20000;

export function follow(onOverview, onState) {
  let heardAt = 0;
  let source;
  const connect = () => {
    source?.close();
    source = new EventSource("/api/v1/events");
    source.addEventListener("overview", (event) => {
      heardAt = Date.now();
      onState("live");
      onOverview(JSON.parse(event.data));
    });
    source.addEventListener("error", () => {
      onState("lost");
      if (source.readyState === EventSource.CLOSED) setTimeout(connect, 3000);
    });
  };
  connect();
  setInterval(() => {
    if (heardAt && Date.now() - heardAt > SILENT_MS) onState("lost");
  }, 2000);
}

export async function fetchJson(path) {
  const response = await fetch(path, { headers: { Accept: "application/json" } });
  if (response.status === 404) return null;
  if (!response.ok) throw new Error(`${path} answered ${response.status}`);
  return response.json();
}
