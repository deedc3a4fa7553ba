"""The model card: what a reader of the folder should know before using it (after Mitchell et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.architecture.folder import read_config
from model.architecture.network import StoryNetwork
from training.export.acceptance import Acceptance


def history(notes: dict[str, Any]) -> list[dict[str, Any]]:
    """The notes of each training run that made these weights, the first one first."""
    earlier = notes.get("init")
    return [*(history(earlier) if earlier else []), notes]


def _told(notes: dict[str, Any]) -> str:
    """One training run in one line."""
    recipe, earlier = notes.get("recipe", {}), notes.get("init")
    optimizer = recipe.get("optimizer", {})
    chosen = {
        "peak rate": optimizer.get("matrix_lr"),
        "dropout": recipe.get("dropout"),
        "average of the weights": recipe.get("average"),
    }
    return (
        (f"- from the weights of `{earlier['digest'][:12]}`: " if earlier else "- ")
        + f"recipe `{recipe.get('name', 'unknown')}`, seed {recipe.get('seed', 'unknown')}, "
        + "".join(f"{name} {value:g}, " for name, value in chosen.items() if value)
        + f"{notes.get('step', 0):,} steps, {notes.get('tokens', 0):,} tokens, "
        + f"{notes.get('elapsed', 0) / 60:.0f} minutes; data digest `{notes.get('data', 'unknown')}`"
    )


def _blended(notes: dict[str, Any]) -> list[str]:
    """Whose weights were mixed in, if any were."""
    if not (told := notes.get("blend")):
        return []
    return [f"- then the mean of these weights and, to {told['share']:.0%}, those of `{told['digest'][:12]}`"]


def _calibrated(notes: dict[str, Any]) -> list[str]:
    """What calibration did, if there was one."""
    if not (told := notes.get("calibration")):
        return []
    return [
        f"- logits scaled by {told['scale']:.3f}, chosen on the first {told['stories']:,} validation stories: "
        f"{told['bits_per_byte_before']:.4f} bits per byte there without it, {told['bits_per_byte']:.4f} with it"
    ]


def write_card(folder: Path, network: StoryNetwork, accepted: Sequence[Acceptance]) -> None:
    """Write `card.md` into a model folder, from its config.json and the figures of its acceptance."""
    notes, config = read_config(folder), network.config
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
        *(_told(part) for part in history(notes)),
        *_blended(notes),
        "- the whole recipe stands in `config.json`",
        "",
        "## Figures",
        "",
        f"- {best:.4f} bits per byte on the training run's validation stories" if best else "- not validated",
        *_calibrated(notes),
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
