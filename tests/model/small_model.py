"""A small network that has learned a little, and the model folder exported from it, made once a run of the tests.

Where a test is not about the shipped weights, these stand in for them: four layers of both kinds, wide enough for
the graph's fused nodes and its int8 blocks, a window and chunks far shorter than a story. Random weights prove
little (gates stand near their start, output projections at zero), so every parameter is drawn anew and then trained
for a few steps on our own stories.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch

from model.architecture.folder import END_ID, ModelConfig
from model.architecture.network import StoryNetwork, save_network
from model.architecture.tokenizer import StoryTokenizer
from tests.once import once_a_run, shared_folder
from training.data.corpus import load_own_stories
from training.data.shards import train_tokenizer
from training.export.export import export_checkpoint

SMALL = ModelConfig(
    vocab_size=384, width=64, pattern="RARA", mlp_width=128, heads=2, head_dim=32, key_dim=16, window=24, chunk=16
)
STEPS = 60


def random_network(config: ModelConfig, seed: int = 0) -> StoryNetwork:
    """A network none of whose parameters is at its initial value: no projection is zero, no tap idle."""
    torch.manual_seed(seed)
    network = StoryNetwork(config).eval()
    with torch.no_grad():
        for name, value in network.named_parameters():
            if value.dim() == 2 and not name.endswith(("conv", "skip", "gain")):
                value.normal_(std=value.size(1) ** -0.5)
            elif name.endswith("conv"):
                value.normal_(std=0.5)
            else:
                value.add_(torch.randn_like(value) * 0.3)
    return network


@once_a_run
def small_tokenizer() -> Path:
    path = shared_folder() / "tokenizer.json"
    texts = (story.text for story in load_own_stories("train"))
    train_tokenizer(texts, vocab_size=SMALL.vocab_size).save(str(path))
    return path


def story_tokens(tokenizer: StoryTokenizer, count: int) -> list[list[int]]:
    """The first `count` held-out stories, each behind its leading end-of-story id."""
    stories = load_own_stories("heldout")[:count]
    return [[END_ID, *tokenizer.encode(story.text)] for story in stories]


@once_a_run
def small_checkpoint() -> Path:
    """A checkpoint as training writes it: fp32 weights, config.json and the tokenizer."""
    network = random_network(SMALL)
    tokenizer = StoryTokenizer.load(small_tokenizer())
    texts = [story.text for story in load_own_stories("train")]
    fed = np.concatenate([[END_ID, *tokenizer.encode(text)] for text in texts])
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(STEPS):
        starts = rng.integers(0, len(fed) - 65, 8)
        rows = torch.from_numpy(np.stack([fed[start : start + 65] for start in starts]))
        loss = network.loss_sum(rows[:, :-1], rows[:, 1:]) / rows[:, 1:].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = shared_folder() / "checkpoint"
    folder.mkdir()
    notes = {"recipe": {"name": "small test", "seed": 0}, "step": STEPS, "tokens": STEPS * 512, "elapsed": 60.0}
    save_network(network, folder, tokenizer=small_tokenizer(), notes=notes)
    return folder


@once_a_run
def small_folder() -> Path:
    """The model folder exported from `small_checkpoint`. Tests copy it before they change it."""
    folder = shared_folder() / "model"
    export_checkpoint(small_checkpoint(), folder)
    return folder


def copy_of(folder: Path, target: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(folder, target))
