"""Which layers? Equal processor time for each candidate, then bits per byte, training rate and decode rate.

    python -m experiments.studies.layer_choice --data data/tinystories --seconds 300 hybrid-ssd hybrid-rglru
    python -m experiments.studies.layer_choice --data data/tinystories --seconds 300 transformer recurrent

Each candidate trains in turn on one thread until it has used `--seconds` of processor time (not wall-clock: other
work on the machine then takes nothing from it), compiling left out, with the learning rate warmed down over the
same budget, on the same rows. Results belong in LOG.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from experiments.studies.rglru import Rglru
from model.architecture.network import Recurrence, StoryNetwork
from training.data.shards import TokenShard
from training.trainer.optim import Optimizers, has_bf16, rate_share
from training.trainer.parallel import Group
from training.trainer.recipe import OptimizerRecipe, load_recipe
from training.trainer.rows import IGNORED, RowStream
from training.trainer.validation import Validation

ROWS = 8
"""Rows of 512 tokens a step: many small steps, since the budget is short."""
ADAMW = OptimizerRecipe(name="adamw", matrix_lr=0.003, table_lr=0.003, vector_lr=0.003, weight_decay=0.1)
CANDIDATES = {
    "hybrid-ssd": ("small", "ssd", None),
    "hybrid-rglru": ("small", "rglru", None),
    "hybrid-ssd-adamw": ("small", "ssd", ADAMW),
    "transformer": ("transformer", "ssd", None),
    "recurrent": ("recurrent", "ssd", None),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """One candidate after its budget of processor time."""

    candidate: str
    parameters: int
    steps: int
    tokens: int
    train_tokens_per_cpu_second: float
    loss: float
    bits_per_byte: float
    decode_tokens_per_cpu_second: dict[int, float]
    """Eager PyTorch, fp32, by batch size."""


def build(candidate: str) -> tuple[StoryNetwork, OptimizerRecipe]:
    """Return the candidate's network, freshly initialised, and its optimiser."""
    preset, recurrence, optimizer = CANDIDATES[candidate]
    recipe = load_recipe(preset)
    torch.manual_seed(recipe.seed)
    network = StoryNetwork(recipe.model)
    if recurrence == "rglru":
        for block in network.blocks:
            if isinstance(block.mixer, Recurrence):
                block.mixer = Rglru(recipe.model)
    return network, optimizer or recipe.optimizer


def train(candidate: str, data: Path, seconds: float, stories: int, *, compiled: bool = True) -> Result:
    """Train `candidate` for `seconds` of processor time and measure it."""
    network, recipe = build(candidate)
    recipe = dataclasses.replace(recipe, warmup_steps=10)
    optimizers = Optimizers(network, recipe)
    rows = RowStream(TokenShard(data, "train"), 512, seed=0)
    loss_sum = torch.compile(network.loss_sum) if compiled else network.loss_sum

    def step(share: float) -> int:
        batch = [next(rows) for _ in range(ROWS)]
        inputs, targets = (torch.from_numpy(np.stack(part)) for part in zip(*batch, strict=True))
        count = int((targets != IGNORED).sum())
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16(torch.device("cpu"))):
            loss = loss_sum(inputs, targets) / count
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), recipe.clip)
        if share:
            optimizers.set_rate(share)
            optimizers.step()
        optimizers.zero_grad()
        return count

    step(0.0)  # compiles; changes nothing
    steps = tokens = 0
    began = time.process_time()
    while (used := time.process_time() - began) < seconds:
        tokens += step(rate_share(recipe, steps, used / seconds))
        steps += 1
    shard, tokenizer = TokenShard(data, "val"), Tokenizer.from_file(str(data / "tokenizer.json"))
    loss, bits = Validation(shard, tokenizer, stories, Group()).measure(network.eval())
    rates = {size: decode_rate(network, size) for size in (1, 16)}
    return Result(candidate, network.parameter_count(), steps, tokens, tokens / used, loss, bits, rates)


@torch.no_grad()
def decode_rate(network: StoryNetwork, batch: int, steps: int = 100) -> float:
    """Return tokens per second of processor time in the eager step form."""
    state, tokens = network.initial_state(batch), torch.arange(1, batch + 1)
    for _ in range(10):
        _, state = network.step(tokens, state)
    began = time.process_time()
    for _ in range(steps):
        _, state = network.step(tokens, state)
    return batch * steps / (time.process_time() - began)


def main() -> None:
    """Train the candidates in turn; one line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candidates", nargs="+", choices=sorted(CANDIDATES))
    parser.add_argument("--data", type=Path, required=True, help="token shards made by `story data`")
    parser.add_argument("--seconds", type=float, default=300.0, help="processor time of each candidate")
    parser.add_argument("--stories", type=int, default=400, help="validation stories")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for candidate in chosen.candidates:
        result = train(candidate, chosen.data, chosen.seconds, chosen.stories)
        print(json.dumps(dataclasses.asdict(result)), flush=True)


if __name__ == "__main__":
    main()
