// The gateway, as this page speaks to it: OpenAI's API, and the route of an answer besides.

import { StreamBroken, eventsOf } from "./event_stream.js";

/** What the gateway refused, or what broke off. `status` is 0 if it was never reached. */
export class GatewayError extends Error {
  constructor(message, { status = 0, code = null, retryAfterS = null } = {}) {
    super(message);
    this.name = "GatewayError";
    Object.assign(this, { status, code, retryAfterS });
  }
}

/** The names of the models that are served. Throws GatewayError. */
export async function modelNames(apiKey) {
  const response = await request("v1/models", { headers: headers(apiKey) });
  return (await response.json()).data.map((model) => model.id);
}

/**
 * An answer, in parts as they come: {text}, {route}, {usage}, {finish: "stop" | "length"}, or {waiting: true} while
 * servers are busy or being replaced. Throws GatewayError, or an AbortError once `signal` says so.
 *
 * settings: {temperature, maxTokens, apiKey}; what is null is left to the gateway.
 */
export async function* answerParts(model, messages, settings, signal) {
  const asked = { model, messages, stream: true, stream_options: { include_usage: true }, swarm: { route: true } };
  if (settings.temperature !== null) asked.temperature = settings.temperature;
  if (settings.maxTokens !== null) asked.max_tokens = settings.maxTokens;
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { ...headers(settings.apiKey), "Content-Type": "application/json" },
    body: JSON.stringify(asked),
    signal,
  });
  try {
    for await (const event of eventsOf(response.body)) {
      if (event.comment) yield { waiting: true };
      else if (event.data === "[DONE]") return;
      else yield* partsOf(JSON.parse(event.data));
    }
  } catch (error) {
    throw error instanceof StreamBroken ? new GatewayError("The connection to the gateway broke off.") : error;
  }
  throw new GatewayError("The gateway ended the answer half-way.");
}

function* partsOf(chunk) {
  if (chunk.error) throw new GatewayError(chunk.error.message, { status: 200, code: chunk.error.code });
  const [choice] = chunk.choices ?? [];
  if (choice?.delta?.content) yield { text: choice.delta.content };
  if (chunk.swarm) yield { route: routeOf(chunk.swarm) };
  if (choice?.finish_reason) yield { finish: choice.finish_reason };
  if (chunk.usage) yield { usage: { promptTokens: chunk.usage.prompt_tokens, tokens: chunk.usage.completion_tokens } };
}

function routeOf(swarm) {
  const hops = swarm.hops.map((hop) => ({
    peerId: hop.peer_id,
    name: hop.name ?? "",
    start: hop.start,
    end: hop.end,
    totalMs: hop.total_ms,
    queueMs: hop.queue_ms,
    computeMs: hop.compute_ms,
    networkMs: hop.network_ms,
  }));
  return { hops, stepMs: swarm.step_ms, recoveries: swarm.recoveries };
}

function headers(apiKey) {
  return apiKey ? { Authorization: `Bearer ${apiKey}` } : {};
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new GatewayError("The gateway cannot be reached.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null); // a proxy's error page, maybe
  const retryAfter = Number.parseFloat(response.headers.get("Retry-After") ?? "");
  throw new GatewayError(body?.error?.message ?? `The gateway answered ${response.status} ${response.statusText}.`, {
    status: response.status,
    code: body?.error?.code ?? null,
    retryAfterS: Number.isFinite(retryAfter) ? retryAfter : null,
  });
}
