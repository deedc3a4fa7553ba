"""`story export`: from a checkpoint to a self-contained model folder, accepted logit by logit or not at all.

Accepted on trained weights and real stories, because an overflow that only trained gates reach has passed a test on
random weights: every logit of every precision and batch size must be finite and within its bound, in prefill and step.

Calibration is temperature scaling (Guo et al. 2017): one scale of the logits, found on held-out stories. It corrects
the overconfidence of repeated epochs and of dropout, and changes no ranking of tokens. It costs nothing at run time: it
is multiplied into the tied embedding, whose input side is normed.
"""

import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from model.architecture.folder import END_ID, FILES, PRECISIONS, compute_digest, read_config
from model.architecture.network import StoryNetwork, load_network, save_network
from model.architecture.tokenizer import StoryTokenizer
from model.errors import InputError, ModelError
from model.files import replace_folder
from model.runtimes.onnx.runtime import OnnxRuntime
from model.runtimes.protocol import Logits, Runtime
from training.data.corpus import load_own_stories
from training.data.shards import END_OF_STORY, TokenShard, read_meta, same_tokenizer
from training.export.graph import WeightFile, build_graph
from training.trainer.checkpoint import read_initial
from training.trainer.parallel import Group
from training.trainer.rows import IGNORED, Validation

BATCHES = (1, 2, 3, 8, 16, 32, 64)
LIMITS = {"fp32": 1e-3, "int8": 1.0}
"""Largest difference of any logit. int8 moves single logits of unlikely tokens; what that does to the story is
bounded by bits per byte (within 0.3 %), which `story evaluate` prints for each runtime."""
PREFILL, STEPS = 24, 24
"""Tokens of each story that are taken in at once, and then one by one."""


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Largest absolute logit difference by batch size; `spread` is the logits' own standard deviation."""

    precision: str
    largest: dict[int, float]
    spread: float


def reference_logits(network: StoryNetwork, stories: Sequence[Sequence[int]]) -> list[Logits]:
    """The fp32 network's logits (T, V) at every place of each story."""
    with torch.no_grad():
        return [network(torch.tensor([list(story)]))[0].float().numpy() for story in stories]


def accept(network: StoryNetwork, runtime: Runtime, precision: str, stories: Sequence[Sequence[int]]) -> Acceptance:
    """Compare `runtime` with `network` at each batch size up to its `max_batch`.

    `stories` are token lists that begin with the end-of-story id. Raises `ModelError` for a logit that is not finite
    or further off than its bound.
    """
    cut = [list(story)[: PREFILL + STEPS] for story in stories if len(story) >= PREFILL + STEPS]
    if not cut or any(story[0] != END_ID for story in cut):
        raise ModelError(f"acceptance needs stories of at least {PREFILL + STEPS} tokens")
    expected = reference_logits(network, cut)
    if not all(np.isfinite(logits).all() for logits in expected):
        raise ModelError("the network itself gives logits that are not finite: its weights are unusable")
    largest = {}
    for size in (size for size in BATCHES if size <= runtime.max_batch):
        chosen = [index % len(cut) for index in range(size)]
        largest[size] = _largest(runtime, [cut[i] for i in chosen], [expected[i] for i in chosen])
        if not largest[size] <= LIMITS[precision]:
            off = f"off by {largest[size]:.3g}" if np.isfinite(largest[size]) else "not finite"
            raise ModelError(
                f"the {precision} runtime is not the network: at batch {size} a logit is {off}, "
                f"allowed is a difference of {LIMITS[precision]:g}"
            )
    return Acceptance(precision, largest, float(np.std(np.concatenate(expected))))


def _largest(runtime: Runtime, stories: list[list[int]], expected: list[Logits]) -> float:
    batch = runtime.new_batch()
    worst = 0.0
    for row, story in enumerate(stories):
        logits, state = runtime.prefill(story[:PREFILL])
        batch.append(state)
        worst = max(worst, _difference(logits, expected[row][PREFILL - 1]))
    for place in range(PREFILL, PREFILL + STEPS):
        logits_BV = runtime.step(np.array([story[place] for story in stories]), batch)
        for row in range(len(stories)):
            worst = max(worst, _difference(logits_BV[row], expected[row][place]))
    return worst


def _difference(ours: Logits, theirs: Logits) -> float:
    gap = np.abs(ours - theirs)
    return float(gap.max()) if np.isfinite(gap).all() else float("inf")


STORIES = 400
"""Validation stories that decide: one number needs no more, and the others stay unseen by it."""
LOWEST, HIGHEST = 0.25, 4.0
CLOSE = 1e-4
MOST_PASSES = 8


@dataclass(frozen=True, slots=True)
class Calibration:
    """The scale that was found, on which stories, and what it changed there."""

    scale: float
    stories: int
    data: str | None
    """Digest of the shards."""
    bits_per_byte_before: float
    bits_per_byte: float


def calibrate(network: StoryNetwork, data: Path, tokenizer: Path, *, stories: int = STORIES) -> Calibration:
    """Scale the network's logits, in place, to the lowest loss on the first validation stories in `data`.

    Raises `InputError` for shards of another tokenizer, `DataError` for damaged ones, and `ModelError` where logits
    are not finite or no scale from 0.25 to 4 is best.
    """
    meta = read_meta(data)
    if not same_tokenizer(data / "tokenizer.json", tokenizer):
        raise InputError("calibrate", f"has another tokenizer than the checkpoint ({data})")
    shared = Tokenizer.from_file(str(tokenizer))
    validation = Validation(TokenShard(data, "val"), shared, stories, Group())
    scale, before, after = _best_scale(network, validation)
    with torch.no_grad():
        network.embedding.weight.mul_(scale)
    per_byte = 1 / math.log(2) / validation.bytes
    return Calibration(scale, validation.stories, meta.get("digest"), before * per_byte, after * per_byte)


def _best_scale(network: StoryNetwork, validation: Validation) -> tuple[float, float, float]:
    """(best scale, nats before, nats with it), by Newton's method: the loss is convex in the scale."""
    scale, before = 1.0, None
    for _ in range(MOST_PASSES):
        nats, slope, curvature = _derivatives(network, validation, scale)
        if not math.isfinite(nats):
            raise ModelError("the network gives logits that are not finite: its weights are unusable")
        before = nats if before is None else before
        step = slope / max(curvature, 1e-30)  # 0 where every choice is certain: then to the end of the range
        if abs(step) < CLOSE:
            return scale, before, nats
        scale = min(max(scale - step, LOWEST), HIGHEST)
    raise ModelError(f"no scale of the logits between {LOWEST:g} and {HIGHEST:g} is best for this network")


@torch.no_grad()
def _derivatives(network: StoryNetwork, validation: Validation, scale: float) -> tuple[float, float, float]:
    """Summed loss in nats with logits times `scale`, and its first and second derivative by `scale`."""
    total = torch.zeros(3, dtype=torch.float64)
    for inputs_BT, targets_BT in validation.batches():
        counts = targets_BT.flatten() != IGNORED
        logits_NV = network(inputs_BT).flatten(0, 1)[counts].float()
        target_N = logits_NV.gather(1, targets_BT.flatten()[counts, None]).squeeze(1)
        chance_NV = (logits_NV * scale).softmax(-1)
        mean_N = (chance_NV * logits_NV).sum(-1)
        total[0] += F.cross_entropy(logits_NV * scale, targets_BT.flatten()[counts], reduction="sum").double()
        total[1] += (mean_N - target_N).double().sum()
        total[2] += ((chance_NV * logits_NV.square()).sum(-1) - mean_N.square()).double().sum()
    nats, slope, curvature = total.tolist()
    return nats, slope, curvature


ACCEPTANCE_STORIES = 16
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END_OF_STORY,
    "eos_token": END_OF_STORY,
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
}
"""With `tokenizer.json` what `AutoTokenizer` of the `transformers` library needs to encode as `StoryTokenizer` does.

There, as with other models and as evaluation harnesses rely on, the name of the end of a story stands for that token;
`StoryTokenizer`, which encodes what users type, reads it as letters.
"""


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written and how it compares with the network."""

    folder: str
    digest: str
    parameters: int
    bytes: dict[str, int]
    """Size of each file."""
    acceptance: tuple[Acceptance, ...]


def export_checkpoint(
    checkpoint: Path, out: Path, *, blend_with: Path | None = None, calibrate_on: Path | None = None
) -> ExportReport:
    """Write the model folder `out` from a checkpoint (a run's `best` or `last` folder).

    `blend_with`, a model folder or checkpoint, is averaged into the weights first. `calibrate_on`, a folder of token
    shards, then calibrates the logits (see `calibrate`).

    Weights are stored as fp16 and both graphs are built from what was stored, so every runtime computes the same
    network. The folder is replaced by one rename, after its graphs have been accepted.

    Raises:
        ModelError: the checkpoint is unusable, or a graph differs from the network.
        InputError: `out` cannot be written or is not a model folder; `blend_with` has other sizes; it or
            `calibrate_on` was made with another tokenizer.
        DataError: the shards in `calibrate_on` are missing or damaged.
    """
    _check_target(out)
    notes = read_config(checkpoint)
    for name in ("format", "model"):
        notes.pop(name)
    network = load_network(checkpoint)
    tokenizer = StoryTokenizer.load(checkpoint)
    if tokenizer.vocab_size > network.config.vocab_size:
        raise ModelError(
            f"{checkpoint}: tokenizer.json has {tokenizer.vocab_size} tokens, the network {network.config.vocab_size}"
        )
    if blend_with is not None:
        notes["blend"] = blend(network, blend_with, checkpoint / "tokenizer.json")
    if calibrate_on is not None:
        calibration = calibrate(network, calibrate_on, checkpoint / "tokenizer.json")
        notes["calibration"] = dataclasses.asdict(calibration)
    fresh = _make_beside(out)
    try:
        save_network(network, fresh, tokenizer=checkpoint / "tokenizer.json", notes=notes, dtype=torch.float16)
        network = load_network(fresh)
        source = WeightFile.read(fresh / "model.safetensors")
        texts = [story.text for story in load_own_stories("heldout")]
        stories = [[END_ID, *tokenizer.encode(text)] for text in texts[:ACCEPTANCE_STORIES]]
        accepted = []
        for precision in PRECISIONS:
            path = fresh / f"decode.{precision}.onnx"
            path.write_bytes(build_graph(network.config, source, precision).SerializeToString())
            runtime = OnnxRuntime(path, network.config, max_batch=max(BATCHES))
            accepted.append(accept(network, runtime, precision, stories))
        config = json.dumps(TOKENIZER_CONFIG, indent=2) + "\n"
        (fresh / "tokenizer_config.json").write_text(config, "utf-8")
        digest = compute_digest(fresh)
        (fresh / "digest").write_text(digest + "\n", "ascii")
        write_card(fresh, network, accepted)
        replace_folder(fresh, out, fresh.with_name(fresh.name + ".old"))
    except OSError as error:  # a full disk, mostly
        raise InputError("out", f"{out} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    sizes = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    return ExportReport(str(out), digest, network.parameter_count(), sizes, tuple(accepted))


def _check_target(out: Path) -> None:
    """Raise `InputError` if anything stands at `out` that an export must not replace."""
    if out.is_dir() and not out.is_symlink():
        strange = sorted(path.name for path in out.iterdir() if path.name not in FILES)
        if strange:
            raise InputError("out", f"{out} exists and is not a model folder: it holds {strange[0]}")
        if not (out / "digest").is_file() and any(out.iterdir()):
            raise InputError("out", f"{out} exists and is not a model folder: it has no digest")
    elif out.exists() or out.is_symlink():
        raise InputError("out", f"{out} exists and is not a folder")


def _make_beside(out: Path) -> Path:
    """A new folder on the disk of `out`, under a name that nobody uses. Raises `InputError`."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise InputError("out", f"{out} cannot be written: {error.strerror}") from None
    fresh.chmod(out.parent.stat().st_mode & 0o777)  # a temporary folder is closed to everyone else
    return fresh


SHARE = 0.5
"""Of the other model."""


def blend(network: StoryNetwork, other: Path, tokenizer: Path) -> dict[str, Any]:
    """Average the network's weights with those in the folder `other`; returns the record for the notes.

    Raises `InputError` for other sizes or another tokenizer, `ModelError` and `DataError` for a damaged folder.
    """
    theirs, notes = read_initial(other, network.config, tokenizer, name="blend")
    with torch.no_grad():
        for mine, other_one in zip(network.parameters(), theirs.parameters(), strict=True):
            mine.lerp_(other_one, SHARE)
    return {"share": SHARE, "digest": notes["digest"]}


def history(notes: dict[str, Any]) -> list[dict[str, Any]]:
    """The notes of each training run that made these weights, the first one first."""
    earlier = notes.get("init")
    return [*(history(earlier) if earlier else []), notes]


def _history_line(notes: dict[str, Any]) -> str:
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


def write_card(folder: Path, network: StoryNetwork, accepted: Sequence[Acceptance]) -> None:
    """Write `card.md` into a model folder, from its config.json and the figures of its acceptance."""
    notes, config = read_config(folder), network.config
    best = notes.get("best_bits_per_byte")
    blended, calibrated = [], []
    if found := notes.get("blend"):
        mixed = f"to {found['share']:.0%}, those of `{found['digest'][:12]}`"
        blended = [f"- then the mean of these weights and, {mixed}"]
    if found := notes.get("calibration"):
        calibrated = [
            f"- logits scaled by {found['scale']:.3f}, chosen on the first {found['stories']:,} validation stories: "
            f"{found['bits_per_byte_before']:.4f} bits per byte there without it, {found['bits_per_byte']:.4f} with it"
        ]
    lines = [
        "# A small story model",
        "",
        f"{network.parameter_count():,} parameters; layers `{config.pattern}` (R recurrence, A attention over "
        f"{config.window} tokens), width {config.width}, byte-level BPE of {config.vocab_size:,} tokens. It "
        "continues short, simple children's stories in English. Its decoding state has a constant size.",
        "",
        "## How it was made",
        "",
        *map(_history_line, history(notes)),
        *blended,
        "- the whole recipe stands in `config.json`",
        "",
        "## Figures",
        "",
        f"- {best:.4f} bits per byte on the training run's validation stories" if best else "- not validated",
        *calibrated,
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
        "It knows only what its small training stories hold: simple words, happy endings, few facts. It can "
        "contradict itself and mix up who is who, it is not for questions or instructions, and what it writes "
        "for a child should be read by an adult first. It writes English only.",
        "",
    ]
    (folder / "card.md").write_text("\n".join(lines), "utf-8")
