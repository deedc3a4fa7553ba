"""How fast does it write? One stream, many streams, and two yardsticks beside them, in one run on one thread.

    python -m experiments.studies.decode_speed
    python -m experiments.studies.decode_speed --streams 1 16 64 --seconds 10 --rounds 3 --json

Each target is a closed loop: as many readers as streams, each asking for the next story when one ends, so a slot
is never idle. Targets take turns, round by round, so that a machine whose speed drifts slows them all; the ratio to
the first is taken round by round. Tokens are counted by the tokenizer.

The first yardstick is `plain_decoder.c`, a transformer of our size in the plainest C and fp32, compiled on the spot for
this very machine; without a compiler it is left out, and the ratio is to the next target. The other is the same
network's own step in eager PyTorch. Both choose the likeliest token, which is the cheapest choice and flatters them;
the plain decoder tells only its mean time a token, which stands in all its columns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from model.architecture.folder import PRECISIONS, PRETRAINED, ModelFolder
from model.architecture.tokenizer import StoryTokenizer
from model.engine.engine import Engine
from model.engine.load import RuntimeChoice, load_engine, why_not_native
from model.generation import GenerationRequest, SamplingParams

PLAIN_DECODER = Path(__file__).with_name("plain_decoder.c")
PROMPTS = ("Once upon a time", "Lily had a red kite.", "The old dog sat by the door", "One rainy day, Sam")


@dataclass(slots=True)
class Sample:
    """One round of one target."""

    tokens: int = 0
    seconds: float = 0.0
    ttft: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    """Seconds between pieces of one stream."""

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Row:
    """What the report says of one target, over all rounds."""

    target: str
    streams: int
    tokens_per_second: float
    """Of one stream: the median round's total over the number of streams."""
    total_tokens_per_second: float
    ratio: float
    """Total rate over the first target's, the median of the rounds."""
    ttft_p50: float
    ttft_p95: float
    itl_p50: float
    itl_p99: float


async def _read_stories(engine: Engine, streams: int, seconds: float, seed: int) -> Sample:
    sample = Sample()
    began = time.perf_counter()
    until = began + seconds

    async def reader(number: int) -> None:
        story = 0
        while time.perf_counter() < until:
            story += 1
            sampling = SamplingParams(seed=seed + number * 1_000_003 + story)
            asked = last = time.perf_counter()
            stream = engine.submit(
                GenerationRequest(prompt=PROMPTS[number % len(PROMPTS)], sampling=sampling)
            )
            async for piece in stream:
                now = time.perf_counter()
                (sample.ttft if last == asked else sample.gaps).append(now - last)
                last = now
                sample.tokens += len(piece.tokens)
                if now > until:
                    stream.cancel()
                    break

    await asyncio.gather(*(reader(number) for number in range(streams)))
    sample.seconds = time.perf_counter() - began
    return sample


def _engine_target(engine: Engine, streams: int) -> Callable[[float, int], Sample]:
    return lambda seconds, seed: asyncio.run(_read_stories(engine, streams, seconds, seed))


def _plain_target(workplace: Path) -> Callable[[float, int], Sample] | None:
    """The plain decoder, compiled into `workplace`; None, and a word on stderr, where that cannot be done."""
    program = workplace / "plain_decoder"
    options = ["-O3", "-march=native", "-ffast-math", "-o", str(program), str(PLAIN_DECODER), "-lm"]
    compiler = shutil.which("cc")
    if compiler is None:
        print("without the plain C decoder: there is no C compiler (cc)", file=sys.stderr)
        return None
    done = subprocess.run([compiler, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"without the plain C decoder: {(done.stderr or 'cc failed').splitlines()[0]}", file=sys.stderr)
        return None

    def run(seconds: float, seed: int) -> Sample:
        told = subprocess.run([str(program), str(seconds)], capture_output=True, text=True, check=True)
        tokens, taken = told.stdout.split()
        mean = float(taken) / int(tokens)
        return Sample(int(tokens), float(taken), [mean], [mean])

    return run


def _torch_target(folder: ModelFolder) -> Callable[[float, int], Sample]:
    import torch

    from model.architecture.checkpoint import load_network

    torch.set_num_threads(1)
    network = load_network(folder.path)
    prompt = [0, *StoryTokenizer.load(folder.tokenizer).encode(PROMPTS[0])]

    def run(seconds: float, seed: int) -> Sample:
        sample = Sample()
        began = last = time.perf_counter()
        with torch.no_grad():
            while last - began < seconds:
                state = network.initial_state(1)
                start = time.perf_counter()
                for token in prompt:
                    logits, state = network.step(torch.tensor([token]), state)
                sample.ttft.append(time.perf_counter() - start)
                for _ in range(200):
                    last = time.perf_counter()
                    logits, state = network.step(logits.argmax(1), state)
                    sample.gaps.append(time.perf_counter() - last)
                    sample.tokens += 1
        sample.seconds = time.perf_counter() - began
        return sample

    return run


def measure(model: Path, streams: list[int], seconds: float, rounds: int) -> list[Row]:
    """Measure all targets in turn. Raises `ModelError` if the folder is unusable."""
    folder = ModelFolder.open(model)
    targets: list[tuple[str, int, Callable[[float, int], Sample]]] = []
    engines = []
    workplace = tempfile.TemporaryDirectory(prefix="decode-speed-")
    if (plain := _plain_target(Path(workplace.name))) is not None:
        targets.append(("plain C fp32 decoder", 1, plain))
    kinds: list[tuple[str, RuntimeChoice]] = [(precision, "onnx") for precision in PRECISIONS]
    if (reason := why_not_native(folder.config, "int8")) is None:
        kinds.insert(0, ("int8", "native"))
    else:
        print(f"without the native runtime: {reason}", file=sys.stderr)
    for precision, runtime in kinds:
        engine = load_engine(model, slots=max(streams), precision=precision, runtime=runtime)
        engines.append(engine)
        name = f"engine {engine.runtime_name}"
        targets += [(name, count, _engine_target(engine, count)) for count in streams]
    if find_spec("torch") is not None:
        targets.append(("PyTorch eager fp32 step", 1, _torch_target(folder)))
    samples: list[list[Sample]] = [[] for _ in targets]
    for number in range(rounds + 1):  # the first round warms up and is dropped
        for index, (_, _, run) in enumerate(targets):
            sample = run(seconds if number else min(seconds, 1.0), number)
            if number:
                samples[index].append(sample)
    for engine in engines:
        engine.close()
    workplace.cleanup()
    rows = []
    for (name, count, _), taken in zip(targets, samples, strict=True):
        total = statistics.median(sample.rate for sample in taken)
        ratio = statistics.median(
            sample.rate / first.rate for sample, first in zip(taken, samples[0], strict=True)
        )
        ttft = np.concatenate([sample.ttft for sample in taken])
        gaps = np.concatenate([sample.gaps for sample in taken])
        times = (*np.percentile(ttft, [50, 95]), *np.percentile(gaps, [50, 99]))
        rows.append(Row(name, count, total / count, total, ratio, *map(float, times)))
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, default=PRETRAINED, help="model folder (default: the shipped one)"
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16], help="readers at once")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of one round of one target")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    parser.add_argument("--json", action="store_true", help="print JSON")
    chosen = parser.parse_args()
    rows = measure(chosen.model, chosen.streams, chosen.seconds, chosen.rounds)
    if chosen.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    print(f"{'target':28} {'streams':>7} {'tok/s each':>11} {'tok/s total':>12} {'ratio':>7} "
          f"{'TTFT p50/p95 ms':>17} {'ITL p50/p99 ms':>16}")  # fmt: skip
    for row in rows:
        ttft = f"{row.ttft_p50 * 1e3:.1f}/{row.ttft_p95 * 1e3:.1f}"
        itl = f"{row.itl_p50 * 1e3:.2f}/{row.itl_p99 * 1e3:.2f}"
        print(f"{row.target:28} {row.streams:7d} {row.tokens_per_second:11,.0f} {row.total_tokens_per_second:12,.0f} "
              f"{row.ratio:7.2f} {ttft:>17} {itl:>16}")  # fmt: skip


if __name__ == "__main__":
    main()
