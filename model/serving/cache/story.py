"""What is kept of a story: its chunks as they came, and its key, which names all that it depends on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from model.generation import Chunk, Completion, FinishReason, GenerationRequest, TokenLogprob

FORMAT = 1
"""Changes with the form of what is kept, so that a process never reads what another form has written."""


def key_of(fingerprint: str, request: GenerationRequest) -> str:
    """The key of `request`'s story as `fingerprint` (a model's digest, and what computes it) writes it."""
    sampling = request.sampling
    greedy = sampling.temperature == 0
    parts = [
        FORMAT,
        fingerprint,
        request.prompt,
        request.max_tokens,
        float(sampling.temperature),
        sampling.top_k,
        float(sampling.top_p),
        float(sampling.min_p),
        float(sampling.repetition_penalty),
        0 if greedy else sampling.seed,  # nothing is drawn, so any seed tells the same story
        request.stop,
        request.logprobs,
    ]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=20).hexdigest()


@dataclass(frozen=True, slots=True)
class CachedResponse:
    """A whole story."""

    chunks: tuple[Chunk, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int

    @classmethod
    def of(cls, chunks: list[Chunk], completion: Completion) -> CachedResponse:
        """What is kept of a story that ended so."""
        usage = completion.usage
        return cls(tuple(chunks), completion.finish_reason, usage.prompt_tokens, usage.completion_tokens)

    def as_bytes(self) -> bytes:
        """JSON. Numbers come back as the same bits."""
        chunks = [[chunk.text, chunk.tokens, *_logprobs(chunk)] for chunk in self.chunks]
        parts = [self.finish_reason, self.prompt_tokens, self.completion_tokens, chunks]
        return json.dumps(parts, ensure_ascii=False, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> CachedResponse | None:
        """The story in `data`; None where there is none, for it may have been anywhere meanwhile."""
        try:
            finish, prompt_tokens, completion_tokens, chunks = json.loads(data)
            told = cls(tuple(_chunk(*parts) for parts in chunks), finish, prompt_tokens, completion_tokens)
        except (ValueError, TypeError):
            return None
        counts = (told.prompt_tokens, told.completion_tokens)
        sane = finish in ("stop", "length") and all(type(count) is int for count in counts)
        return told if sane else None


def _logprobs(chunk: Chunk) -> list[Any]:
    if not chunk.logprobs:
        return []
    return [[[entry.token, entry.text, entry.logprob, entry.alternatives] for entry in chunk.logprobs]]


def _chunk(text: str, tokens: list[int], logprobs: list[list[Any]] = []) -> Chunk:  # noqa: B006 (only read)
    if not isinstance(text, str) or not all(type(token) is int for token in tokens):
        raise TypeError("no chunk of a story")
    entries = tuple(
        TokenLogprob(token, word, logprob, tuple((rival, other, value) for rival, other, value in rivals))
        for token, word, logprob, rivals in logprobs
    )
    return Chunk(text, tuple(tokens), entries)
