"""`story export`: from a checkpoint to a self-contained model folder, accepted logit by logit or not at all."""

from __future__ import annotations

import dataclasses
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from model.checkpoint import load_network, save_network
from model.errors import InputError
from model.folder import PRECISIONS, compute_digest, read_config
from model.network import END_OF_STORY_ID
from model.onnx_runtime import OnnxRuntime
from training.acceptance import BATCHES, Acceptance, accept
from training.card import write_card
from training.graph import WeightFile, build_graph
from training.own_corpus import load_own_stories

ACCEPTANCE_STORIES = 16


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written and how it compares with the network."""

    folder: str
    digest: str
    parameters: int
    bytes: dict[str, int]
    """Size of each file."""
    acceptance: tuple[Acceptance, ...]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def export_checkpoint(checkpoint: Path, out: Path) -> ExportReport:
    """Write the model folder `out` from a checkpoint (a run's `best` or `last` folder).

    Weights are stored as fp16 and both graphs are built from what was stored, so that every runtime computes the
    same network. The folder appears whole, in one rename, after its graphs have been accepted.

    Raises:
        ModelError: the checkpoint is unusable, or a graph differs from the network.
        InputError: `out` exists and is not a model folder.
    """
    if out.exists() and not (out / "config.json").is_file() and any(out.iterdir() if out.is_dir() else [out]):
        raise InputError("out", f"{out} exists and is not a model folder")
    notes = read_config(checkpoint)
    for name in ("format", "model"):
        notes.pop(name)
    network = load_network(checkpoint)
    fresh = out.with_name(out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        save_network(network, fresh, tokenizer=checkpoint / "tokenizer.json", notes=notes, dtype=torch.float16)
        network = load_network(fresh)
        source = WeightFile.read(fresh / "model.safetensors")
        tokenizer = Tokenizer.from_file(str(fresh / "tokenizer.json"))
        texts = [story.text for story in load_own_stories("heldout")]
        stories = [[END_OF_STORY_ID, *tokenizer.encode(text).ids] for text in texts[:ACCEPTANCE_STORIES]]
        accepted = []
        for precision in PRECISIONS:
            path = fresh / f"decode.{precision}.onnx"
            path.write_bytes(build_graph(network.config, source, precision).SerializeToString())
            runtime = OnnxRuntime(path, network.config, max_batch=max(BATCHES))
            accepted.append(accept(network, runtime, precision, stories))
        digest = compute_digest(fresh)
        (fresh / "digest").write_text(digest + "\n", "ascii")
        write_card(fresh, network, accepted)
        if out.exists():
            shutil.rmtree(out)
        os.replace(fresh, out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    sizes = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    return ExportReport(str(out), digest, network.parameter_count(), sizes, tuple(accepted))
