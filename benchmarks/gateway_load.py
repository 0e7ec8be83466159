"""A locustfile: people who chat, one answer after the other, streaming. Run by ``benchmarks.gateway``.

What each request came to goes to the file named by ``SWARM_LOAD_LOG``, a line of JSON each.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path

from locust import HttpUser, constant, task

QUESTIONS = (
    "Write three sentences about the sea.", "What is a bridge?", "Tell me a story about a dog.", "Why is the sky blue?",
    "Name three colours.", "How does one make bread?", "Who was Isaac Newton?", "What do bees do in winter?",
)  # fmt: skip
ANSWER_TOKENS = 32
_turns = itertools.count()


class Chatting(HttpUser):
    """One of them."""

    wait_time = constant(0)

    @task
    def chat(self) -> None:
        """Ask, and read the answer as it comes."""
        question = QUESTIONS[next(_turns) % len(QUESTIONS)]
        body = {
            "model": "smollm2",
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": ANSWER_TOKENS,
            "stream": True,
        }
        begun_at, begun, times, text, finished = time.time(), time.monotonic(), [], "", None
        with self.client.post(
            "/v1/chat/completions", json=body, stream=True, catch_response=True, timeout=120
        ) as response:  # fmt: skip
            error = None if response.status_code == 200 else f"{response.status_code}: {response.text[:200]}"
            for line in response.iter_lines() if error is None else ():
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    error = event["error"]["message"]
                    break
                (choice,) = event["choices"]
                finished = choice["finish_reason"] or finished
                if choice["delta"].get("content"):
                    times.append(time.monotonic())
                    text += choice["delta"]["content"]
            if error is None and finished is None:
                error = "the answer broke off"
            if error is not None:
                response.failure(error)
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        record = {
            "question": question, "text": text, "error": error, "gaps_s": gaps,
            "ttft_s": times[0] - begun if times else None, "begun_at": begun_at,
            "ended_at": time.time(),
        }  # fmt: skip
        with Path(os.environ["SWARM_LOAD_LOG"]).open("a") as log:
            log.write(json.dumps(record) + "\n")
