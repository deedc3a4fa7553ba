"""A load client that shares nothing with the benchmark: threads and blocking sockets, figures of its own.

    python -m tests.experiments.benchmark.independent http://127.0.0.1:8000 --requests 40 --clients 4

Each thread asks for a story, reads the raw lines of the answer as they come and notes the time of each message with
tokens. It prints what it found as JSON.
"""

from __future__ import annotations

import argparse
import http.client
import json
import threading
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class Story:
    began: float
    times: list[float] = field(default_factory=list)
    tokens: int = 0
    over: float = 0.0


def read_story(connection: http.client.HTTPConnection, seed: int, max_tokens: int) -> Story:
    body = json.dumps(
        {
            "prompt": "Once upon a time",
            "max_tokens": max_tokens,
            "seed": seed,
            "stream": True,
            "temperature": 0.7,
            "top_p": 0.95,
            "return_token_ids": True,
        }
    )
    story = Story(time.monotonic())
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    while (line := response.readline()) != b"data: [DONE]\n":
        assert line, "the stream was cut"
        if not line.startswith(b"data: "):
            continue
        (choice,) = json.loads(line[6:])["choices"]
        if choice.get("token_ids"):
            story.times.append(time.monotonic())
            story.tokens += len(choice["token_ids"])
        if choice["finish_reason"]:
            story.over = time.monotonic()
    response.read()  # to the end, so that the connection can be used again
    return story


def load(url: str, *, requests: int, clients: int, max_tokens: int, seed: int = 0) -> dict[str, float]:
    """Figures of `requests` stories, at most `clients` at once."""
    stories: list[Story] = []
    numbers = iter(range(requests))
    lock = threading.Lock()

    parts = urlsplit(url)

    def client() -> None:
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=60)
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                connection.close()
                return
            story = read_story(connection, seed + number, max_tokens)
            with lock:
                stories.append(story)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stories) == requests, "a thread failed"
    gaps = [b - a for story in stories for a, b in zip(story.times, story.times[1:], strict=False)]
    firsts = [story.times[0] - story.began for story in stories]
    span = max(story.over for story in stories) - min(story.began for story in stories)
    flowing = sum(story.times[-1] - story.times[0] for story in stories)
    tokens = sum(story.tokens for story in stories)
    return {
        "avg_generation_time": sum(story.over - story.began for story in stories) / requests,
        "ttft_p50": middle(firsts),
        "itl_p50": middle(gaps),
        "tokens_per_second": (tokens - requests) / flowing,
        "total_tokens_per_second": tokens / span,
        "tokens": tokens,
    }


def middle(values: list[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1_000_000)
    chosen = parser.parse_args()
    figures = load(
        chosen.url, requests=chosen.requests, clients=chosen.clients, max_tokens=chosen.max_tokens, seed=chosen.seed
    )
    print(json.dumps(figures, indent=2))
