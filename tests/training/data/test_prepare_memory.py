"""Corpora far larger than memory pass: run by name, `make pytest ARGS='-m slow -k gigabyte'`."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from training.data.corpus import load_own_stories

OWN = [story.text for story in load_own_stories()]


def synthetic_corpus(path: Path, size: int, seed: int = 0) -> int:
    """Write `size` bytes of stories as long as TinyStories', all different; returns how many.

    Sentences are drawn from a large stock and share a worn opening, as such corpora do; one story in a
    hundred is a near copy of the one before it.
    """
    rng = random.Random(seed)
    vocabulary = sorted({word.strip('.,!?"') for text in OWN for word in text.split()} - {""})
    sentences = [" ".join(rng.choices(vocabulary, k=rng.randint(4, 7))).capitalize() for _ in range(20_000)]
    openings = [f"Once upon a time there was a little girl named {name}" for name in vocabulary[:300]]
    written = count = 0
    body: list[str] = []
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            if count % 100 != 99:
                # Fresh words in each sentence, so that phrases repeat but, as in real stories, 8-word runs do not.
                body = [f"{s} {' '.join(rng.choices(vocabulary, k=3))}" for s in rng.choices(sentences, k=16)]
            else:
                body[-1] = rng.choice(sentences)
            line = json.dumps({"text": ". ".join([rng.choice(openings), *body]) + "."}) + "\n"
            written += file.write(line)
            count += 1
    return count


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [100, 300, 2000])
def test_a_large_corpus_passes_in_under_a_gigabyte_of_memory(tmp_path: Path, megabytes: int) -> None:
    count = synthetic_corpus(tmp_path / "large.jsonl", megabytes * 1_000_000)
    code = (
        "import json; from pathlib import Path; from training.data.prepare import PrepareOptions, prepare;"
        "report = prepare(PrepareOptions(sources=(Path('large.jsonl'),), out=Path('out')));"
        "print(json.dumps(report.as_dict()))"
    )
    # A process of its own, so that its largest size is that of this work alone.
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        check=True,
    )
    report = json.loads(done.stdout)
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    print({key: report[key] for key in ("peak_memory_mb", "seconds", "splits", "dropped")}, count, cpu)
    assert report["peak_memory_mb"] < 1000
    kept = sum(split["stories"] for split in report["splits"].values())
    assert kept + sum(report["dropped"].values()) == count
    assert report["dropped"]["near duplicate"] == pytest.approx(count / 100, rel=0.02)
