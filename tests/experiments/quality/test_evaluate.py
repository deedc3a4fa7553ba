"""Bits per byte of a model, against an independent computation and by every runtime that can serve it."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import story
from experiments.common import evidence_runs
from experiments.quality import evaluate as module
from experiments.quality import generation, held_out
from experiments.quality.evaluate import evaluate
from experiments.quality.evidence import EXPERIMENT, QualityEvidence
from experiments.quality.generation import generate_stories, load_prompts
from experiments.quality.held_out import RUNTIMES, RuntimeName
from model.architecture.folder import PRETRAINED, ModelFolder
from model.architecture.network import load_network
from model.architecture.tokenizer import StoryTokenizer
from model.engine.load import load_engine
from model.errors import DataError, InputError, MissingExtraError, ModelError
from tests.model.runtimes.shared import NOT_NATIVE, needs_native
from tests.model.small_model import copy_of, small_folder
from training.data.corpus import load_own_stories

SHORT = ["A cat sat.", "Zoë said: “No!” 🐉", "One day, the small dog ran to the big red barn and slept.\n\nThe end."]


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three short stories, one with letters of several bytes, and two whole ones."""
    texts = [one.text for one in load_own_stories("heldout")[:2]]
    return write_jsonl(tmp_path / "stories.jsonl", [*SHORT, *texts])


@cache
def nats_by_steps(folder: Path, text: str) -> tuple[float, int]:
    """(nats, targets) of one story: float64, one token after another, nothing shared with `evaluate`."""
    network = load_network(folder).double()
    tokens = [0, *StoryTokenizer.load(folder).encode(text)]
    state, nats = network.initial_state(1), 0.0
    with torch.no_grad():
        for token, target in zip(tokens, [*tokens[1:], 0], strict=True):
            logits_BV, state = network.step(torch.tensor([token]), state)
            nats -= float(logits_BV[0].log_softmax(-1)[target])
    return nats, len(tokens)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("torch", 1e-5), ("fp32", 1e-5), ("int8", 1e-2), pytest.param("native", 1e-2, marks=needs_native)],
)
def test_bits_per_byte_are_those_of_each_story_fed_token_by_token(
    name: RuntimeName, tolerance: float, data: Path
) -> None:
    report = evaluate(small_folder(), [data], runtimes=[name])
    texts = [json.loads(line)["text"] for line in data.read_text("utf-8").splitlines()]
    by_story = [nats_by_steps(small_folder(), text) for text in texts]
    sizes = [len(text.encode()) for text in texts]
    nats, targets = sum(nats for nats, _ in by_story), sum(count for _, count in by_story)
    figures = report.runtimes[name]
    assert (report.stories, report.bytes, report.tokens) == (5, sum(sizes), targets)
    assert figures.bits_per_byte == pytest.approx(nats / math.log(2) / sum(sizes), rel=tolerance)
    assert figures.loss == pytest.approx(nats / targets, rel=tolerance)
    assert figures.story_nats == pytest.approx([nats for nats, _ in by_story], rel=5 * tolerance)


@pytest.mark.parametrize("budget", [1, 150, 10_000])
def test_how_stories_are_batched_changes_nothing(budget: int, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = evaluate(small_folder(), [data])
    monkeypatch.setattr(held_out, "BATCH_TOKENS", budget)
    other = evaluate(small_folder(), [data])
    for name in usual.runtimes:
        # int8 rounds each row by itself; what differs is the order of sums, which may tip such a rounding.
        rel = 1e-3 if name in ("int8", "native") else 1e-5
        assert other.runtimes[name].story_nats == pytest.approx(usual.runtimes[name].story_nats, rel=rel)


def test_a_limit_takes_the_first_stories_in_the_order_of_the_files(data: Path, tmp_path: Path) -> None:
    more = write_jsonl(tmp_path / "more.jsonl", ["A last one."])
    whole = evaluate(small_folder(), [more, data], runtimes=["fp32"])
    assert whole.stories == 6
    for limit in (1, 3, 6, 100):
        part = evaluate(small_folder(), [more, data], runtimes=["fp32"], limit=limit)
        count = min(limit, 6)
        assert part.stories == count
        assert part.served.story_nats == pytest.approx(whole.served.story_nats[:count], rel=1e-5)


def test_behind_the_limit_nothing_is_read(data: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("not json")
    assert evaluate(small_folder(), [data, bad], runtimes=["fp32"], limit=5).stories == 5
    with pytest.raises(DataError, match=r"bad\.jsonl, line 1"):
        evaluate(small_folder(), [data, bad], runtimes=["fp32"], limit=6)


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_all_runtimes_agree_on_the_shipped_model_over_our_held_out_stories(every: int, tmp_path: Path) -> None:
    texts = [one.text for one in load_own_stories("heldout")][::every]
    report = evaluate(None, [write_jsonl(tmp_path / "heldout.jsonl", texts)])
    assert report.model == str(PRETRAINED)
    assert report.digest == ModelFolder.open(PRETRAINED).digest
    assert report.stories == len(texts) >= 100 // every
    assert set(report.skipped) == ({"native"} if NOT_NATIVE else set())
    bits = {name: figures.bits_per_byte for name, figures in report.runtimes.items()}
    assert bits["fp32"] == pytest.approx(bits["torch"], rel=1e-5)
    assert bits["int8"] == pytest.approx(bits["torch"], rel=3e-3)
    assert bits["int8"] != bits["fp32"]
    assert NOT_NATIVE or bits["native"] == pytest.approx(bits["torch"], rel=3e-3)
    for name in set(bits) - {"torch"}:
        rel = 1e-4 if name == "fp32" else 2e-2
        assert report.runtimes[name].story_nats == pytest.approx(report.runtimes["torch"].story_nats, rel=rel)


def test_the_json_has_the_served_runtime_at_the_top(data: Path) -> None:
    report = evaluate(small_folder(), [data])
    output = json.loads(json.dumps(report.as_dict()))
    assert list(output) == [
        "model",
        "digest",
        "data",
        "bits_per_byte",
        "loss",
        "tokens",
        "bytes",
        "stories",
        "runtimes",
        "skipped",
        "written",
        "data_digest",
        "intervals",
        "places",
        "baseline",
        "memorisation",
        "rare_names",
        "wishes",
        "judge",
        "not_measured",
    ]
    served, expected = ("int8", RUNTIMES[1:]) if NOT_NATIVE else ("native", RUNTIMES)
    assert RUNTIMES == ("native", "int8", "fp32", "torch")
    assert list(output["runtimes"]) == list(expected)
    assert all(set(figures) == {"bits_per_byte", "loss"} for figures in output["runtimes"].values())
    assert {name: output[name] for name in ("bits_per_byte", "loss")} == output["runtimes"][served]
    assert (output["model"], output["data"]) == (str(small_folder()), [str(data)])
    assert set(output["skipped"]) == set(RUNTIMES) - set(expected)
    assert output["written"] is None
    only = evaluate(small_folder(), [data], runtimes=["torch", "fp32"])
    assert only.as_dict()["bits_per_byte"] == only.runtimes["torch"].bits_per_byte


def test_progress_counts_every_story_once_for_each_runtime(data: Path) -> None:
    output: list[tuple[str, int]] = []
    evaluate(small_folder(), [data], baseline=False, progress=lambda name, stories: output.append((name, stories)))
    asked = RUNTIMES[1:] if NOT_NATIVE else RUNTIMES
    assert {name: sum(count for who, count in output if who == name) for name, _ in output} == dict.fromkeys(asked, 5)


def test_packed_files_and_plain_text_count_the_same(data: Path, tmp_path: Path) -> None:
    packed, text = tmp_path / "stories.jsonl.gz", tmp_path / "stories.txt"
    packed.write_bytes(gzip.compress(data.read_bytes()))
    stories = [json.loads(line)["text"] for line in data.read_text("utf-8").splitlines()]
    text.write_text("\n<|endoftext|>\n".join(stories), "utf-8")
    reports = [evaluate(small_folder(), [path], runtimes=["fp32"]) for path in (data, packed, text)]
    assert len({(tuple(report.served.story_nats), report.bytes, report.tokens) for report in reports}) == 1


@pytest.fixture
def _few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three prompts and short stories: all 64 at full length would take the small model most of a minute."""
    prompts = load_prompts()[:3]
    monkeypatch.setattr("experiments.quality.evaluate.load_prompts", lambda *path: prompts)
    monkeypatch.setattr(generation, "MAX_TOKENS", 30)


@pytest.mark.usefixtures("_few_prompts")
def test_written_stories_are_measured_beside_those_of_the_baseline(data: Path, tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [one.text for one in load_own_stories("train")])
    report = evaluate(small_folder(), [data], runtimes=["fp32"], write=True, seeds=2, train_data=[train, data])
    assert report.written is not None
    assert report.baseline_written is not None
    assert [len(one.stories) for one in (report.written, report.baseline_written)] == [6, 3]
    with load_engine(small_folder(), precision="fp32") as engine:
        again = generate_stories(engine, load_prompts()[:3], [0, 1])
    assert list(report.written.stories) == again
    assert report.rare_names is not None
    assert list(report.rare_names.stories) == again
    output = report.as_dict()
    assert output["memorisation"]["held_out_seen"] == 5, "the data to judge by is among the training data here"
    assert output["memorisation"]["source"] == "train.jsonl, stories.jsonl"
    assert output["baseline"]["source"] == "train.jsonl, stories.jsonl"
    assert output["baseline"]["written"]["stories"] == 3
    assert output["written"]["copied_words_max"] is not None
    assert output["not_measured"] == {"judge": "no judge was named (--judge FOLDER)"}
    assert sum(place["tokens"] for place in output["places"]) == output["tokens"]
    total = sum(place["loss"] * place["tokens"] for place in output["places"])
    assert total / output["tokens"] == pytest.approx(output["loss"])
    low, high = output["intervals"]["bits_per_byte"]
    assert low < output["bits_per_byte"] < high


def test_what_was_not_asked_for_is_said(data: Path) -> None:
    report = evaluate(small_folder(), [data], runtimes=["fp32"], baseline=False)
    output = report.as_dict()
    assert (output["baseline"], output["memorisation"], output["judge"]) == (None, None, None)
    assert set(output["not_measured"]) == {"written", "judge"}
    assert {place["baseline_loss"] for place in output["places"]} == {None}


@pytest.mark.usefixtures("_few_prompts")
def test_the_verb_logs_evidence_that_is_tied_to_the_model_folder(data: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    arguments = ["evaluate", "--data", str(data), "--model", str(small_folder()), "--runtime", "int8", "--seeds", "1"]
    environment = {"MLFLOW_TRACKING_URI": uri}
    result = CliRunner().invoke(story.app, [*arguments, "--json"], env=environment)
    assert result.exit_code == 0, result.stderr
    output = json.loads(result.stdout)
    evidence = QualityEvidence.newest(uri, ModelFolder.open(small_folder()).digest)
    assert evidence is not None
    assert output["evidence"] == {"run": evidence.run_id, "experiment": "story-evaluation"}
    assert evidence.metrics["bits_per_byte"] == pytest.approx(output["bits_per_byte"])
    assert sum(loss.nats for loss in evidence.losses) == pytest.approx(output["loss"] * output["tokens"])
    assert [row["seed"] for row in evidence.stories] == [0, 0, 0]

    shown = CliRunner().invoke(story.app, [*arguments, "--no-track"], env=environment)
    assert shown.exit_code == 0, shown.stderr
    assert f"{output['bits_per_byte']:.4f} [" in shown.stdout
    assert "no evidence: nothing was to be logged (--no-track)" in shown.stdout
    bad = CliRunner().invoke(story.app, arguments, env={"MLFLOW_TRACKING_URI": "ftp://nowhere"})
    assert bad.exit_code == 2
    assert bad.stderr.strip().splitlines()[-1].startswith("story: MLFLOW_TRACKING_URI ftp://nowhere cannot be used")


def test_a_store_that_fails_after_the_measuring_costs_the_evidence_and_not_the_figures(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is opened, and then a file stands where the folder of its artifacts should be made."""
    opened = evidence_runs.EvidenceStore("sqlite:///mlflow.db", EXPERIMENT)
    monkeypatch.setattr(evidence_runs, "EvidenceStore", lambda uri, experiment: opened)
    Path("mlartifacts").write_text("a file")
    arguments = ["evaluate", "--data", str(data), "--model", str(small_folder()), "--runtime", "fp32", "--no-write"]
    result = CliRunner().invoke(story.app, [*arguments, "--json"])
    assert result.exit_code == 1
    output = json.loads(result.stdout)
    assert output["bits_per_byte"] > 0
    assert output["evidence"]["failed"].startswith("MLFLOW_TRACKING_URI sqlite:///mlflow.db cannot be used")


def test_without_the_train_packages_it_says_what_is_missing(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whether a package is installed is asked of `find_spec`, so that is what is replaced here.
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="story evaluate needs the 'train' packages"):
        evaluate(small_folder(), [data])


WITHOUT_TORCH = """
import importlib.util, json, sys
from pathlib import Path
assert importlib.util.find_spec("torch") is None, "torch must not be there"
from experiments.quality.evaluate import evaluate
from model.errors import MissingExtraError
model, data = map(Path, sys.argv[1:])
report = evaluate(model, [data])
try:
    evaluate(model, [data], runtimes=["torch"])
except MissingExtraError as error:
    print(json.dumps({"report": report.as_dict(), "error": str(error)}))
"""


def test_without_torch_it_is_skipped_with_the_reason_and_the_rest_is_measured(
    data: Path, tmp_path: Path, repository: Path
) -> None:
    """In a process whose packages are links to all of ours but PyTorch: it is truly not there."""
    packages = tmp_path / "packages"
    packages.mkdir()
    folders = [Path(folder) for folder in reversed(sys.path) if folder.endswith("site-packages")]
    found = {path.name: path for folder in folders for path in folder.iterdir()}
    for name, path in found.items():
        if not name.startswith(("torch", "functorch", "__editable__")):
            (packages / name).symlink_to(path)
    program = f"import sys; sys.path[:0] = [{str(repository)!r}, {str(packages)!r}]\n{WITHOUT_TORCH}"
    run = subprocess.run(
        [sys.executable, "-S", "-c", program, str(small_folder()), str(data)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    output = json.loads(run.stdout)
    reason = "scoring with PyTorch needs the 'train' packages: pip install -e '.[train]' -c constraints.txt"
    assert output["error"] == reason
    assert output["report"]["skipped"]["torch"] == reason
    here = evaluate(small_folder(), [data], runtimes=["native", "int8", "fp32"]).as_dict()
    assert output["report"] == {**here, "skipped": {"torch": reason, **here["skipped"]}}


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        ({"runtimes": []}, r"runtimes must have at least 1 item.*, got \[\]"),
        ({"runtimes": ["fp32", "int4"]}, "runtimes must be 'native', 'int8', 'fp32' or 'torch', got 'int4'"),
        ({"limit": 0}, "limit must be greater than or equal to 1, got 0"),
        ({"seeds": 101}, "seeds must be less than or equal to 100, got 101"),
        ({"base": True}, "base is not known, got True"),
    ],
)
def test_bad_use_names_the_option_and_what_is_allowed(ask: dict[str, Any], message: str, data: Path) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        evaluate(small_folder(), [data], **ask)


def test_unusable_data_is_named(tmp_path: Path) -> None:
    empty, blank = tmp_path / "empty.jsonl", write_jsonl(tmp_path / "blank.jsonl", ["A story.", ""])
    empty.touch()
    for data, message in (
        ([], "no file of stories was given"),
        ([tmp_path / "none.jsonl"], r"none\.jsonl: cannot be read"),
        ([empty], r"empty\.jsonl: the file is empty"),
        ([blank], r"blank\.jsonl, line 2: the story is empty"),
    ):
        with pytest.raises(DataError, match=message):
            evaluate(small_folder(), data, runtimes=["fp32"])


def test_an_unusable_model_is_named_before_anything_is_measured(data: Path, tmp_path: Path) -> None:
    damaged = copy_of(small_folder(), tmp_path / "tale")
    (damaged / "decode.int8.onnx").unlink()
    for folder in (damaged, tmp_path / "nowhere"):
        with pytest.raises(ModelError, match=folder.name):
            evaluate(folder, [data])
