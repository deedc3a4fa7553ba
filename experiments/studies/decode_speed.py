"""Decoding speed: one stream, many streams, and two reference points, in one run on one thread.

    python -m experiments.studies.decode_speed
    python -m experiments.studies.decode_speed --streams 1 16 64 --seconds 10 --rounds 3

Each target is a closed loop: as many clients as streams, each requesting the next story when one ends, so a slot is
never idle. Targets take turns, round by round, so that a machine whose speed drifts slows them all; ratios are to the
first target in the same round, and medians over rounds count. Tokens are counted by the tokenizer.

The first reference is `plain_decoder.c`, a transformer of our size in the plainest C and fp32, compiled for this
machine; without a compiler it is left out, and the ratio is to the next target. The other is the same network's own
step in eager PyTorch. Both decode greedily, which is the cheapest choice and favours them. Latencies are measured by
`story benchmark`.
"""

import argparse
import asyncio
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from experiments.common.tables import Table
from model.architecture.folder import PRECISIONS, PRETRAINED, ModelFolder
from model.architecture.tokenizer import StoryTokenizer
from model.engine.engine import Engine
from model.engine.load import RuntimeChoice, load_engine, why_not_native
from model.generation import GenerationRequest, SamplingParams

PLAIN_DECODER = Path(__file__).with_name("plain_decoder.c")
PROMPTS = ("Once upon a time", "Lily had a red kite.", "The old dog sat by the door", "One rainy day, Sam")
STORY_TOKENS = 200
"""Tokens that the eager step generates after each prompt."""

Target = Callable[[float, int], float]
"""(seconds, seed) → tokens per second over about that time."""


def _engine_target(engine: Engine, streams: int) -> Target:
    async def run(seconds: float, seed: int) -> float:
        began = time.perf_counter()
        until = began + seconds
        tokens = 0

        async def client(number: int) -> None:
            nonlocal tokens
            story = 0
            while time.perf_counter() < until:
                story += 1
                sampling = SamplingParams(seed=seed + number * 1_000_003 + story)
                stream = engine.submit(GenerationRequest(prompt=PROMPTS[number % len(PROMPTS)], sampling=sampling))
                async for chunk in stream:
                    tokens += len(chunk.tokens)
                    if time.perf_counter() > until:
                        stream.cancel()
                        break

        await asyncio.gather(*(client(number) for number in range(streams)))
        return tokens / (time.perf_counter() - began)

    return lambda seconds, seed: asyncio.run(run(seconds, seed))


def _plain_target(folder: Path) -> Target | None:
    """Compile the plain decoder into `folder`; None, and the reason on stderr, where that is not possible."""
    program = folder / "plain_decoder"
    arguments = ["-O3", "-march=native", "-ffast-math", "-o", str(program), str(PLAIN_DECODER), "-lm"]
    compiler = shutil.which("cc")
    if compiler is None:
        print("without the plain C decoder: there is no C compiler (cc)", file=sys.stderr)
        return None
    done = subprocess.run([compiler, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"without the plain C decoder: {(done.stderr or 'cc failed').splitlines()[0]}", file=sys.stderr)
        return None

    def run(seconds: float, seed: int) -> float:
        output = subprocess.run([str(program), str(seconds)], capture_output=True, text=True, check=True)
        tokens, taken = output.stdout.split()
        return int(tokens) / float(taken)

    return run


def _torch_target(folder: ModelFolder) -> Target:
    import torch

    from model.architecture.network import load_network

    torch.set_num_threads(1)
    network = load_network(folder.path)
    prompt = [0, *StoryTokenizer.load(folder.tokenizer).encode(PROMPTS[0])]

    def run(seconds: float, seed: int) -> float:
        began = time.perf_counter()
        tokens = 0
        with torch.no_grad():
            while time.perf_counter() - began < seconds:
                state = network.initial_state(1)
                for token in prompt:
                    logits, state = network.step(torch.tensor([token]), state)
                for _ in range(STORY_TOKENS):
                    logits, state = network.step(logits.argmax(1), state)
                tokens += STORY_TOKENS
        return tokens / (time.perf_counter() - began)

    return run


def measure(model: Path, streams: list[int], seconds: float, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each target and number of streams. Raises `ModelError` if the folder is unusable."""
    folder = ModelFolder.open(model)
    targets: list[tuple[str, int, Target]] = []
    engines = []
    with tempfile.TemporaryDirectory(prefix="decode-speed-") as scratch:
        if (plain := _plain_target(Path(scratch))) is not None:
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
        for _, _, run in targets:  # warm up
            run(min(seconds, 1.0), 0)
        rates = [[run(seconds, number) for _, _, run in targets] for number in range(1, rounds + 1)]
        for engine in engines:
            engine.close()
    return [
        {
            "target": name,
            "streams": streams,
            "tokens_per_second": median(turns[place] for turns in rates) / streams,
            "total_tokens_per_second": median(turns[place] for turns in rates),
            "ratio": median(turns[place] / turns[0] for turns in rates),
        }
        for place, (name, streams, _) in enumerate(targets)
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=PRETRAINED, help="model folder (default: the shipped one)")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16], help="concurrent streams")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of one round of one target")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    given = parser.parse_args()
    rows = measure(given.model, given.streams, given.seconds, given.rounds)
    cells = [[f"{cell:,.4g}" if isinstance(cell, float) else str(cell) for cell in row.values()] for row in rows]
    print("\n".join(Table(list(rows[0]), cells).markdown()))


if __name__ == "__main__":
    main()
