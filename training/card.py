"""The model card: what a reader of the folder should know before using it (after Mitchell et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from model.folder import read_config
from model.network import StoryNetwork
from training.acceptance import Acceptance


def write_card(folder: Path, network: StoryNetwork, accepted: Sequence[Acceptance]) -> None:
    """Write `card.md` into a model folder, from its config.json and the figures of its acceptance."""
    notes, config = read_config(folder), network.config
    recipe = notes.get("recipe", {})
    best = notes.get("best_bits_per_byte")
    lines = [
        "# A small story model",
        "",
        f"{network.parameter_count():,} parameters; layers `{config.pattern}` (R recurrence, A attention over "
        f"{config.window} tokens), width {config.width}, byte-level BPE of {config.vocab_size:,} pieces. It "
        "continues short, simple children's stories in English. Its memory of a story has a constant size.",
        "",
        "## How it was made",
        "",
        f"- recipe `{recipe.get('name', 'unknown')}`, seed {recipe.get('seed', 'unknown')}, "
        f"{notes.get('step', 0):,} steps, {notes.get('tokens', 0):,} tokens, "
        f"{notes.get('elapsed', 0) / 60:.0f} minutes; the whole recipe stands in `config.json`",
        f"- data digest `{notes.get('data', 'unknown')}`",
        "",
        "## Figures",
        "",
        f"- {best:.4f} bits per byte on the training run's validation stories" if best else "- not validated",
        "",
        "Largest difference of any logit from fp32 PyTorch, on trained weights and real stories, by batch size "
        f"(the logits' standard deviation is {accepted[0].spread:.2f}):",
        "",
        "| precision | " + " | ".join(f"{size}" for size in accepted[0].largest) + " |",
        "| --- |" + " --- |" * len(accepted[0].largest),
        *(
            f"| {entry.precision} | " + " | ".join(f"{value:.2g}" for value in entry.largest.values()) + " |"
            for entry in accepted
        ),
        "",
        "## Limits",
        "",
        "It knows only what the small stories it read tell: simple words, happy endings, few facts. It can "
        "contradict itself and mix up who is who, it is not for questions or instructions, and what it writes "
        "for a child should be read by an adult first. It writes English only.",
        "",
    ]
    (folder / "card.md").write_text("\n".join(lines), "utf-8")
