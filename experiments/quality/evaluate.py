"""`story evaluate`: how well a model predicts stories it has not seen, and what it writes.

Bits per byte is the one loss that compares models of different vocabularies: all nats of a story (its end
included) over ln 2 and over the UTF-8 bytes of its text. The same stories go through the native decoder, both exported
graphs and fp32 PyTorch, so that a runtime that is not the network shows here too. Beside each figure stands that of an
n-gram table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TypedDict, Unpack

from experiments.quality.floor import Floor
from experiments.quality.generated import WrittenStory, load_prompts, write_stories
from experiments.quality.held_out import (
    OWN_STORIES,
    RUNTIMES,
    Figures,
    HeldOut,
    RuntimeName,
    figures_of,
    read_held_out,
    score,
    scorer,
)
from experiments.quality.judge import Judge, judge_stories, why_not
from experiments.quality.memorised import longest_copies
from experiments.quality.ngram_runtime import NgramRuntime
from experiments.quality.positions import loss_by_place, target_bytes
from experiments.quality.report import QualityReport
from experiments.quality.training_texts import TrainingTexts
from experiments.quality.written import Written
from model.architecture.folder import PRETRAINED, ModelFolder
from model.architecture.tokenizer import StoryTokenizer
from model.engine.engine import Engine
from model.engine.load import load_engine, why_not_native
from model.errors import InputError, MissingExtraError

__all__ = ["RUNTIMES", "QualityReport", "RuntimeName", "evaluate", "evaluate_and_log"]

NO_TRAINING = "no training stories were given (--train-data FILE)"
MAX_SEEDS = 100
Progress = Callable[[str, int], None]
"""Called with what is at work (a runtime's name, `floor`, `writing`, …) and the stories just done."""


class Options(TypedDict, total=False):
    """Those of `evaluate`."""

    runtimes: Sequence[RuntimeName]
    limit: int | None
    threads: int
    write: bool
    seeds: int
    train_data: Sequence[Path]
    judge: Path | None
    floor: bool
    progress: Progress


def evaluate(
    model: Path | None,
    data: Sequence[Path] | None,
    *,
    runtimes: Sequence[RuntimeName] = RUNTIMES,
    limit: int | None = None,
    threads: int = 1,
    write: bool = False,
    seeds: int = 1,
    train_data: Sequence[Path] = (),
    judge: Path | None = None,
    floor: bool = True,
    progress: Progress = lambda name, stories: None,
) -> QualityReport:
    """Judge a model on the stories in `data` (JSON Lines or text, also .gz), with each of `runtimes`.

    Args:
        data: files of stories that the model has not seen; None takes the held-out ones of our own corpus.
        model: a model folder; None is the shipped one.
        limit: score the first so many stories only.
        write: also have the model write from the fixed prompts, and measure those stories.
        seeds: stories from each prompt.
        train_data: what the model was trained on, as files of stories or folders of shards: the floor is counted on
            it (without it, on our own corpus), and written stories are searched for runs copied from it.
        judge: folder of a larger model that reads the written stories.
        floor: also count an n-gram table and measure it on the same stories and prompts.
        progress: told of every few stories done.

    Raises:
        InputError: no runtime, an unknown one, a bad limit or number of seeds, or an unusable judge.
        MissingExtraError: only `torch` was asked for, and it is not installed.
        ModelError: only `native` was asked for, and it cannot be used.
        DataError: a file is unusable, or there is no story.
    """
    _check(runtimes, limit, seeds)
    folder = ModelFolder.open(model or PRETRAINED)
    training = TrainingTexts.of(train_data)
    not_measured: dict[str, str] = {}
    if (reason := why_not(judge)) is not None:
        not_measured["judge"] = reason
    # Loaded first, so that an unusable judge is known before minutes of work, not after.
    reader = Judge(judge) if judge is not None and write and reason is None else None
    tokenizer = StoryTokenizer.load(folder.tokenizer)
    held_out = read_held_out(data, tokenizer, limit)
    measured, skipped = _score_all(folder, runtimes, held_out, threads, progress)
    served = next(iter(measured.values()))
    below = None
    if floor:
        progress("floor", 0)
        below = Floor.measure(held_out, training, tokenizer)
        progress("floor", len(held_out.texts))
    places = loss_by_place(
        served.nats, target_bytes(held_out, tokenizer), below.figures.nats if below else None
    )
    written, floor_written, judgement = None, None, None
    if write:
        stories = _write(folder, next(iter(measured)), threads, seeds, partial(progress, "writing"))
        by_floor = [] if below is None else _write_floor(below, tokenizer, partial(progress, "floor writing"))
        written, floor_written = _measure_written(stories, by_floor, training)
        if not train_data:
            not_measured["memorisation"] = NO_TRAINING
        if reader is not None:
            pairs = [(story.prompt.text, story.text) for story in stories]
            judgement = judge_stories(reader, pairs, held_out.texts, partial(progress, "judge"))
    else:
        not_measured["written"] = "the model was not asked to write (--no-write)"
    return QualityReport(
        model=str(folder.path),
        digest=folder.digest,
        data=(OWN_STORIES,) if data is None else tuple(map(str, data)),
        held_out=held_out,
        runtimes=measured,
        skipped=skipped,
        not_measured=not_measured,
        floor=below,
        places=places,
        written=written,
        floor_written=floor_written,
        judgement=judgement,
        training_name=training.name if train_data else None,
        seen_in_training=_seen(held_out, training) if train_data else None,
    )


def evaluate_and_log(
    model: Path | None, data: Sequence[Path] | None, *, tracking_uri: str | None, **options: Unpack[Options]
) -> tuple[QualityReport, dict[str, str]]:
    """`evaluate`, logged as an evidence run to the MLflow store at `tracking_uri`; None: not logged.

    Returns the report and where its evidence is: `{"run": id, "experiment": name}`; `{"skipped": reason}`; or, where
    the store failed only after all had been measured, `{"failed": reason}`.

    Raises:
        InputError: also when the store cannot be used, which is found out before anything is measured.
    """
    if tracking_uri is None:
        return evaluate(model, data, **options), {"skipped": "nothing was to be logged (--no-track)"}
    if find_spec("mlflow") is None or find_spec("psutil") is None:
        # An evaluation is of use without evidence too, where only what serving needs is installed.
        missing = MissingExtraError("logging evidence", "train")
        return evaluate(model, data, **options), {"skipped": str(missing)}
    from experiments.quality.evidence import EXPERIMENT, EvidenceStore

    store = EvidenceStore.open(tracking_uri)
    report = evaluate(model, data, **options)
    try:
        return report, {"run": store.log(report), "experiment": EXPERIMENT}
    except InputError as error:
        return report, {"failed": str(error)}


def _check(runtimes: Sequence[str], limit: int | None, seeds: int) -> None:
    if not runtimes or set(runtimes) - set(RUNTIMES):
        raise InputError(
            "runtime", f"must be among {', '.join(RUNTIMES)}, got {', '.join(runtimes) or 'none'}"
        )
    if limit is not None and limit < 1:
        raise InputError("limit", f"must be at least 1, got {limit}")
    if not 1 <= seeds <= MAX_SEEDS:
        raise InputError("seeds", f"must be between 1 and {MAX_SEEDS}, got {seeds}")


def _score_all(
    folder: ModelFolder,
    runtimes: Sequence[RuntimeName],
    held_out: HeldOut,
    threads: int,
    progress: Progress,
) -> tuple[dict[RuntimeName, Figures], dict[RuntimeName, str]]:
    """Figures by runtime, and the runtimes that could not be asked."""
    skipped: dict[RuntimeName, str] = {}
    if "torch" in runtimes and find_spec("torch") is None:
        missing = MissingExtraError("scoring with PyTorch", "train")
        if set(runtimes) == {"torch"}:
            raise missing
        skipped["torch"] = str(missing)
    if len(runtimes) > 1 and "native" in runtimes and (reason := why_not_native(folder.config, "int8")):
        skipped["native"] = f"the native runtime cannot be used: {reason}"
    measured = {
        name: figures_of(score(scorer(folder, name, threads), held_out, partial(progress, name)), held_out)
        for name in runtimes
        if name not in skipped
    }
    return measured, skipped


def _write(
    folder: ModelFolder, runtime: RuntimeName, threads: int, seeds: int, done: Callable[[int], None]
) -> list[WrittenStory]:
    """By the engine; where PyTorch alone was scored, with the fp32 graph, which is the same network."""
    prompts = load_prompts()
    with load_engine(
        folder.path,
        threads=threads,
        precision="fp32" if runtime in ("fp32", "torch") else "int8",
        runtime="native" if runtime == "native" else "onnx",
        queue_limit=len(prompts),
    ) as engine:
        return write_stories(engine, prompts, range(seeds), done)


def _write_floor(floor: Floor, tokenizer: StoryTokenizer, done: Callable[[int], None]) -> list[WrittenStory]:
    prompts = load_prompts()
    with Engine(NgramRuntime(floor.table), tokenizer, queue_limit=len(prompts)) as engine:
        return write_stories(engine, prompts, [0], done)


def _measure_written(
    stories: list[WrittenStory], by_floor: list[WrittenStory], training: TrainingTexts
) -> tuple[Written, Written | None]:
    copies = None
    if training.sources:
        # Both in one reading of the training stories.
        copies = longest_copies([story.text for story in (*stories, *by_floor)], training)
    written = Written.measure(stories, copies[: len(stories)] if copies else None)
    if not by_floor:
        return written, None
    return written, Written.measure(by_floor, copies[len(stories) :] if copies else None)


def _seen(held_out: HeldOut, training: TrainingTexts) -> int:
    """Held-out stories that stand in the training stories word for word: each makes the loss a lie."""
    texts = set(held_out.texts)
    return len(texts.intersection(training))
