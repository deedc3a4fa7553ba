"""A report made by hand, small enough to be checked with pencil and paper; nothing is loaded or computed by a model."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.quality.evidence import QualityReport
from experiments.quality.generation import Prompt, Written, WrittenStory, longest_copies, measure_rare_names
from experiments.quality.held_out import HeldOut, RuntimeName, figures_of, loss_by_place
from experiments.quality.ngram import NgramBaseline, NgramTable

DIGEST = "a2bf" + "0" * 60
TEXTS = ("A cat sat.", "Zoë [red] ran.")
HELD_OUT = HeldOut(TEXTS, ([0, 5, 6, 7], [0, 5, 8]))
TRAINING = ["Then the big dog ran to the red barn and slept."]
NATS = (np.array([1.0, 2.0, 3.0, 0.5]), np.array([2.0, 2.0, 1.0]))
PROMPTS = (Prompt("Lily and Tom went to the park.", ("Lily", "Tom")), Prompt("Mia had a key.", ("Mia",)))


def written(seeds: int = 2, *, training: bool = True) -> Written:
    """Stories of both prompts; Tom and Lily are kept, Mia is not."""
    texts = (" Lily saw Tom and the big dog ran to the red door.", " The end of a key.")
    stories = [
        WrittenStory(prompt, number, seed, text, 10 + seed, seed == 0)
        for seed in range(seeds)
        for number, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True))
    ]
    copies = longest_copies([story.text for story in stories], TRAINING) if training else None
    return Written.measure(stories, copies)


def report(*, scale: float = 1.0, **changes: Any) -> QualityReport:
    """Losses by int8 and fp32, a baseline of bigrams, and four generated stories."""
    int8 = figures_of([nats * scale for nats in NATS], HELD_OUT)
    fp32 = figures_of([nats * scale * 0.99 for nats in NATS], HELD_OUT)
    table = NgramTable.count([[0, 5, 6], [0, 7, 8]], 9, order=2)
    scored = figures_of(table.nats(HELD_OUT.tokens), HELD_OUT)
    baseline = NgramBaseline(table, scored, "our own corpus", 2, 6, False)
    runtimes: dict[RuntimeName, Any] = {"int8": int8, "fp32": fp32}
    sizes = [np.array([2, 4, 4, 0]), np.array([9, 6, 0])]
    given: dict[str, Any] = {
        "model": "/" + "somewhere/tale",
        "digest": DIGEST,
        "data": ("/" + "somewhere/held-out.jsonl",),
        "held_out": HELD_OUT,
        "runtimes": runtimes,
        "skipped": {"torch": "it is not installed"},
        "not_measured": {"judge": "no judge was named"},
        "baseline": baseline,
        "places": loss_by_place(int8.nats, sizes, baseline.figures.nats, starts=(0, 2)),
        "written": written(),
        "baseline_written": written(1),
        "rare_names": measure_rare_names(written().stories),
        "training_name": "train.jsonl",
        "seen_in_training": 0,
    }
    return QualityReport(**{**given, **changes})
