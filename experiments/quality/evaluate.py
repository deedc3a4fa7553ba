"""`story evaluate`: how well a model predicts stories it has not seen, and what it generates.

Bits per byte is the one loss that compares models of different vocabularies: all nats of a story (its end included)
over ln 2 and over the UTF-8 bytes of its text. The same stories go through the native decoder, both exported graphs and
fp32 PyTorch, so a runtime that deviates from the network shows here. An n-gram table is the baseline of each figure.
"""

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from experiments.quality.evidence import QualityReport
from experiments.quality.generation import (
    RARE_PROMPTS,
    WISH_PROMPTS,
    TrainingTexts,
    Written,
    WrittenStory,
    generate_stories,
    load_prompts,
    longest_copies,
    measure_rare_names,
    measure_wishes,
)
from experiments.quality.held_out import (
    OWN_STORIES,
    RUNTIMES,
    Figures,
    HeldOut,
    RuntimeName,
    figures_of,
    loss_by_place,
    read_held_out,
    score,
    scorer,
    target_bytes,
)
from experiments.quality.judge import Judge, judge_stories, why_not
from experiments.quality.ngram import NgramBaseline, NgramRuntime
from model.architecture.folder import PRETRAINED, ModelFolder
from model.architecture.tokenizer import StoryTokenizer
from model.engine.engine import Engine
from model.engine.load import load_engine, why_not_native
from model.errors import InputError, MissingExtraError
from model.validation import Options

NO_TRAINING = "no training stories were given (--train-data FILE)"
Progress = Callable[[str, int], None]
"""Called with the current step (a runtime's name, `baseline`, `writing`, …) and the stories just done."""


class EvaluationOptions(Options):
    """What to measure."""

    runtimes: Annotated[tuple[RuntimeName, ...], Field(min_length=1)] = RUNTIMES
    limit: int | None = Field(default=None, ge=1)
    """Score only the first so many stories."""
    threads: int = 1
    write: bool = False
    """Also generate stories from the fixed prompts, from those with rare names and those with wishes; measure them."""
    seeds: int = Field(default=1, ge=1, le=100)
    """Stories from each prompt."""
    train_data: tuple[Path, ...] = ()
    """What the model was trained on, as files of stories or folders of shards: the baseline is counted on it (without
    it, on our own corpus), and generated stories are searched for runs copied from it."""
    judge: Path | None = None
    """Folder of a larger model that scores the generated stories."""
    baseline: bool = True
    """Also count an n-gram table, and measure it on the same stories and prompts."""


def evaluate(
    model: Path | None, data: Sequence[Path] | None, *, progress: Progress = lambda name, stories: None, **options: Any
) -> QualityReport:
    """Evaluate a model folder (None: the shipped one) on the stories in `data`, with `EvaluationOptions`.

    `data` are files that the model has not seen, JSON Lines or text, also .gz; None: our own held-out stories.

    Raises:
        InputError: an option is wrong, or the judge is unusable.
        MissingExtraError: scipy, or PyTorch where only `torch` was asked for, is not installed.
        ModelError: only `native` was asked for, and it cannot be used.
        DataError: a file is unusable, or there is no story.
    """
    asked = EvaluationOptions(**options)
    if find_spec("scipy") is None:
        raise MissingExtraError("story evaluate", "train")
    folder = ModelFolder.open(model or PRETRAINED)
    training = TrainingTexts.of(asked.train_data)
    reason = why_not(asked.judge)
    not_measured = {} if reason is None else {"judge": reason}
    # Loaded first, so that an unusable judge is reported before minutes of work, not after.
    judge = Judge(asked.judge) if asked.judge is not None and asked.write and reason is None else None
    tokenizer = StoryTokenizer.load(folder.tokenizer)
    held_out = read_held_out(data, tokenizer, asked.limit)
    measured, skipped = _score_all(folder, asked, held_out, progress)
    baseline = None
    if asked.baseline:
        progress("baseline", 0)
        baseline = NgramBaseline.measure(held_out, training, tokenizer)
        progress("baseline", len(held_out.texts))
    sizes = target_bytes(held_out, tokenizer)
    served = next(iter(measured.values()))
    written = baseline_written = rare_names = wishes = judgement = copies = None
    if asked.write:
        stories, rare, wished = _write(folder, next(iter(measured)), asked, partial(progress, "writing"))
        theirs = _write_baseline(baseline, tokenizer, partial(progress, "baseline writing")) if baseline else []
        if asked.train_data:
            # The model's and the baseline's stories together, so that the training stories are read once.
            copies = longest_copies([story.text for story in (*stories, *theirs)], training)
        else:
            not_measured["memorisation"] = NO_TRAINING
        written = Written.measure(stories, copies and copies[: len(stories)])
        baseline_written = Written.measure(theirs, copies and copies[len(stories) :]) if theirs else None
        rare_names = measure_rare_names(rare)
        wishes = measure_wishes(wished)
        if judge is not None:
            pairs = [(story.prompt.text, story.text) for story in stories]
            judgement = judge_stories(judge, pairs, held_out.texts, partial(progress, "judge"))
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
        baseline=baseline,
        places=loss_by_place(served.nats, sizes, baseline.figures.nats if baseline else None),
        written=written,
        baseline_written=baseline_written,
        rare_names=rare_names,
        wishes=wishes,
        judgement=judgement,
        training_name=training.name if asked.train_data else None,
        # A held-out story that the model was trained on makes the loss meaningless.
        seen_in_training=len(set(held_out.texts).intersection(training)) if asked.train_data else None,
    )


def evaluate_and_log(
    model: Path | None, data: Sequence[Path] | None, *, tracking_uri: str | None, **options: Any
) -> tuple[QualityReport, dict[str, str]]:
    """`evaluate`, logged as an evidence run to the MLflow store at `tracking_uri`; None: not logged.

    Returns the report and where its evidence is: `{"run": id, "experiment": name}`; `{"skipped": reason}`; or, if the
    store fails after everything was measured, `{"failed": reason}`.

    Raises:
        InputError: also when the store cannot be used, which is checked before anything is measured.
    """
    if tracking_uri is None:
        return evaluate(model, data, **options), {"skipped": "nothing was to be logged (--no-track)"}
    from experiments.common.evidence_runs import EvidenceStore
    from experiments.quality.evidence import EXPERIMENT, log_evaluation

    store = EvidenceStore(tracking_uri, EXPERIMENT)
    report = evaluate(model, data, **options)
    try:
        return report, {"run": log_evaluation(report, store), "experiment": EXPERIMENT}
    except InputError as error:
        return report, {"failed": str(error)}


def _score_all(
    folder: ModelFolder, asked: EvaluationOptions, held_out: HeldOut, progress: Progress
) -> tuple[dict[RuntimeName, Figures], dict[RuntimeName, str]]:
    """Figures by runtime, and why a runtime was skipped. Where only one is asked for, its absence is an error."""
    skipped: dict[RuntimeName, str] = {}
    several = len(set(asked.runtimes)) > 1
    if "torch" in asked.runtimes and find_spec("torch") is None:
        skipped["torch"] = str(missing := MissingExtraError("scoring with PyTorch", "train"))
        if not several:
            raise missing
    if several and "native" in asked.runtimes and (reason := why_not_native(folder.config, "int8")):
        skipped["native"] = f"the native runtime cannot be used: {reason}"
    measured = {}
    for name in asked.runtimes:
        if name not in skipped:
            nats = score(scorer(folder, name, asked.threads), held_out, partial(progress, name))
            measured[name] = figures_of(nats, held_out)
    return measured, skipped


def _write(
    folder: ModelFolder, runtime: RuntimeName, asked: EvaluationOptions, done: Callable[[int], None]
) -> list[list[WrittenStory]]:
    """Stories of the engine: of the fixed prompts, of those with rare names, and of those with wishes.

    Where only PyTorch was scored, it uses the fp32 graph, which is the same network.
    """
    sets = [load_prompts(), load_prompts(RARE_PROMPTS), load_prompts(WISH_PROMPTS)]
    with load_engine(
        folder.path,
        threads=asked.threads,
        precision="fp32" if runtime in ("fp32", "torch") else "int8",
        runtime="native" if runtime == "native" else "onnx",
        queue_limit=max(map(len, sets)),
    ) as engine:
        return [generate_stories(engine, prompts, range(asked.seeds), done) for prompts in sets]


def _write_baseline(
    baseline: NgramBaseline, tokenizer: StoryTokenizer, done: Callable[[int], None]
) -> list[WrittenStory]:
    prompts = load_prompts()
    with Engine(NgramRuntime(baseline.table), tokenizer, queue_limit=len(prompts)) as engine:
        return generate_stories(engine, prompts, [0], done)
