"""What a request can fail with, whatever dialect it was made in."""

from __future__ import annotations

from dataclasses import dataclass

from swarm.api.queue import QueueFull
from swarm.errors import NoRoom, NoRoute, SwarmError


@dataclass
class RequestFailed(Exception):
    """A request cannot be answered."""

    status: int
    """Of HTTP."""
    kind: str
    """As OpenAI names kinds of errors: ``invalid_request_error``, ``rate_limit_error``, …"""
    message: str
    code: str | None = None
    retry_after_s: float | None = None

    def __str__(self) -> str:
        return self.message

    @property
    def headers(self) -> dict[str, str]:
        """What tells a client when to come back."""
        return {"Retry-After": str(max(1, round(self.retry_after_s)))} if self.retry_after_s is not None else {}


def bad_request(message: str, code: str | None = None) -> RequestFailed:
    """The caller's mistake."""
    return RequestFailed(400, "invalid_request_error", message, code)


def unknown_model(name: str, known: list[str]) -> RequestFailed:
    """There is no such model here."""
    shown = name if len(name) <= 80 else f"{name[:80]}…"
    message = f"The model {shown!r} is not served here. These are: {', '.join(known)}."
    return RequestFailed(404, "invalid_request_error", message, "model_not_found")


def wrong_key() -> RequestFailed:
    """The API key is missing or wrong."""
    message = "The API key is missing or wrong. Send it as `Authorization: Bearer KEY` (or `x-api-key: KEY`)."
    return RequestFailed(401, "authentication_error", message, "invalid_api_key")


def too_many(wait_s: float) -> RequestFailed:
    """The caller has used what its key allows for now."""
    message = f"This key's limit is reached; try again in {wait_s:.0f} s."
    return RequestFailed(429, "rate_limit_error", message, "rate_limit_exceeded", wait_s)


def failure_of(error: SwarmError | QueueFull) -> RequestFailed:
    """What the swarm's errors mean to a caller, who knows nothing of blocks: it can only wait, or ask for less."""
    if isinstance(error, QueueFull):
        return RequestFailed(429, "rate_limit_error", f"Too busy: {error}.", "queue_full", error.retry_after_s)
    if isinstance(error, NoRoom):
        return RequestFailed(503, "server_error", f"The swarm has no room: {error}", "no_room", 15)
    if isinstance(error, NoRoute):
        return RequestFailed(503, "server_error", f"The swarm cannot run this model now: {error}", "no_route", 30)
    return RequestFailed(502, "server_error", f"The swarm failed: {error}", type(error).__name__)
