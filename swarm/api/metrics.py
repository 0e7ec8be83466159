"""What the gateway tells Prometheus about itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from swarm.prometheus_text import Samples, metric

_BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Histogram:
    """How often something took how long, in seconds."""

    def __init__(self) -> None:
        self._counts, self._sum_s = [0] * (len(_BOUNDS_S) + 1), 0.0

    def note(self, seconds: float) -> None:
        """It took so long once more."""
        self._counts[next((index for index, bound in enumerate(_BOUNDS_S) if seconds <= bound), len(_BOUNDS_S))] += 1
        self._sum_s += seconds

    def lines(self, name: str) -> Iterator[str]:
        """As Prometheus reads it."""
        total = 0
        for bound, count in zip((*_BOUNDS_S, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum_s:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """Counters since the start.

    Attributes:
        responses: by path and status.
        prompt_tokens, new_tokens: of all answers.
        first_token_s: from a request to its first token.
        lost_clients: who hung up before the answer was complete.
    """

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, int]] = Counter()
        self.prompt_tokens = self.new_tokens = self.lost_clients = 0
        self.first_token_s = Histogram()

    def lose_client(self) -> None:
        """Somebody hung up."""
        self.lost_clients += 1

    def text(self, running: int, waiting: int, models: Iterable[str]) -> str:
        """Everything, with the queue as it is now."""
        responses: Samples = [
            ({"path": path, "status": str(status)}, count) for (path, status), count in sorted(self.responses.items())
        ]
        lines = metric("swarm_gateway_responses_total", "counter", "Answers, by path and status.", responses)
        for name, kind, text, value in (
            ("prompt_tokens_total", "counter", "Tokens of prompts.", self.prompt_tokens),
            ("new_tokens_total", "counter", "Tokens generated.", self.new_tokens),
            (
                "lost_clients_total",
                "counter",
                "Callers who hung up before the end.",
                self.lost_clients,
            ),
            ("requests_running", "gauge", "Requests that are being answered.", running),
            ("requests_waiting", "gauge", "Requests in line.", waiting),
            ("models", "gauge", "Models that are served.", len(list(models))),
        ):
            lines += metric(f"swarm_gateway_{name}", kind, text, [({}, value)])
        lines += ["# TYPE swarm_gateway_first_token_seconds histogram"]
        lines += self.first_token_s.lines("swarm_gateway_first_token_seconds")
        return "\n".join(lines) + "\n"
