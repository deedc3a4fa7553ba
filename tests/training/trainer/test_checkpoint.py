"""Checkpoints: whole after a kill at any moment; and runs that start from an existing model."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from model.architecture.folder import ModelFolder, read_config
from model.architecture.network import StoryNetwork
from model.errors import InputError, ModelError, StoryError
from tests.model.small_model import SMALL, copy_of, small_folder
from tests.training.runs import MODEL, Recorder, same_weights, smallest, train, weights
from training.data.corpus import own_stories_folder
from training.data.prepare import PrepareOptions, prepare
from training.export.export import history
from training.trainer.checkpoint import find_checkpoint, read_checkpoint, write_checkpoint
from training.trainer.loop import Trainer
from training.trainer.optim import Optimizers
from training.trainer.recipe import OptimizerRecipe, Recipe


class KilledError(Exception):
    """Stands for a kill: raised inside a call of the operating system, after which nothing more is done."""


@pytest.fixture
def tokenizer(shards: Path) -> Path:
    return shards / "tokenizer.json"


def write(folder: Path, step: int, tokenizer: Path) -> None:
    torch.manual_seed(step)
    network = StoryNetwork(MODEL)
    state: dict[str, Any] = {"step": step, "best": None}
    write_checkpoint(folder, network, tokenizer=tokenizer, notes={"step": step}, trainer=state)


def step_found(folder: Path) -> int | None:
    """The step of the checkpoint that a resume would take, which must be whole."""
    found = find_checkpoint(folder)
    if found is None:
        return None
    network, notes, state = read_checkpoint(found)
    torch.manual_seed(state["step"])
    expected = StoryNetwork(MODEL)
    for one, other in zip(network.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)
    assert notes["step"] == state["step"]
    return int(state["step"])


def test_network_notes_and_state_come_back_as_they_were(tmp_path: Path, tokenizer: Path) -> None:
    network = StoryNetwork(MODEL)
    optimizers = Optimizers(network, OptimizerRecipe())
    network.loss_sum(torch.ones(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long)).backward()
    optimizers.step()
    state = {"optimizers": optimizers.state_dict(), "rows": {"epoch": 1}, "best": 0.5}
    folder = tmp_path / "run" / "last"
    write_checkpoint(folder, network, tokenizer=tokenizer, notes={"data": "abc"}, trainer=state)
    again, notes, restored = read_checkpoint(folder)
    assert again.config == MODEL
    for one, other in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert notes["data"] == "abc"
    assert (restored["rows"], restored["best"]) == ({"epoch": 1}, 0.5)
    torch.testing.assert_close(restored["optimizers"], state["optimizers"], rtol=0, atol=0)
    assert (folder / "tokenizer.json").read_bytes() == tokenizer.read_bytes()


def test_a_checkpoint_replaces_the_one_before_and_leaves_nothing_beside_it(tmp_path: Path, tokenizer: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path / "last", step, tokenizer)
        assert step_found(tmp_path / "last") == step
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_without_a_checkpoint_none_is_found(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "last") is None
    (tmp_path / "last").mkdir()
    assert find_checkpoint(tmp_path / "last") is None


def test_a_kill_between_the_renames_leaves_one_that_is_found(tmp_path: Path, tokenizer: Path) -> None:
    write(tmp_path / "last", 1, tokenizer)
    (tmp_path / "last").rename(tmp_path / "last.old")
    assert step_found(tmp_path / "last") == 1


def killing(monkeypatch: pytest.MonkeyPatch, at: int) -> list[str]:
    """Make the `at`-th call that changes the disk under `write_checkpoint` (0: the first) the last one."""
    calls: list[str] = []

    def watch(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            if len(calls) >= at:
                raise KilledError
            calls.append(name)
            return real(*args, **options)

        monkeypatch.setattr(owner, name, call)

    watch(torch, "save")
    watch(os, "replace")
    watch(os, "fsync")
    watch(Path, "rename")
    watch(Path, "mkdir")
    watch(shutil, "rmtree")
    watch(shutil, "copyfile")
    return calls


@pytest.mark.parametrize("before", ["nothing", "last", "old"])
def test_wherever_a_kill_falls_a_whole_checkpoint_is_found_and_the_next_one_can_be_written(
    tmp_path: Path, tokenizer: Path, before: str
) -> None:
    """A kill at each call that changes the disk, on top of what earlier kills may have left."""
    moments = 0
    while True:
        folder = tmp_path / str(moments) / "last"
        if before != "nothing":
            write(folder, 1, tokenizer)
        if before == "old":
            folder.rename(folder.with_name("last.old"))
            shutil.copytree(folder.with_name("last.old"), folder.with_name("last.new"))
        with pytest.MonkeyPatch.context() as patch:
            calls = killing(patch, moments)
            try:
                write(folder, 2, tokenizer)
            except KilledError:
                killed = True
            else:
                killed = False
        if not killed:
            assert step_found(folder) == 2
            break
        assert step_found(folder) in ((None, 2) if before == "nothing" else (1, 2)), calls
        write(folder, 3, tokenizer)
        assert step_found(folder) == 3
        moments += 1
    assert moments >= 8, "the calls are watched"


FULL_DISK = """
import json, sys
from contextlib import suppress
from pathlib import Path
from model.architecture.folder import read_config
from model.errors import TrainingError
from tests.training.runs import Recorder, smallest, train

disk, shards = map(Path, sys.argv[1:])
run, filler = disk / "run", disk / "filler"

def fill(step: int) -> None:
    if step == 5:
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

recorder = Recorder(fill)
try:
    train(smallest(), shards, run, recorder)
except TrainingError as error:
    message = str(error)
kept = read_config(run / "last")["step"]
left = sorted(path.name for path in run.iterdir())
filler.unlink()
recorder.then = lambda step: None
train(smallest(), shards, run, recorder, resume=True)
size = sum(path.stat().st_size for path in (run / "last").iterdir())
ends = [(end.outcome, end.reason) for end in recorder.ends]
print(json.dumps([message, kept, left, size, ends, list(recorder.losses.values())]))
"""


def test_a_full_disk_is_named_with_what_is_needed_and_free_and_the_run_goes_on_when_there_is_room(
    whole: tuple[Recorder, Path], shards: Path, tmp_path: Path
) -> None:
    """On a file system of 4 MB that is really full, mounted for one process only."""
    if subprocess.run(["unshare", "--map-root-user", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a file system of his own")
    mounted = f'mount -t tmpfs -o size=4m none "{tmp_path}" && exec "$@"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", mounted, "sh"]
    command += [sys.executable, "-c", FULL_DISK, str(tmp_path), str(shards)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    message, kept, left, size, ends, losses = json.loads(done.stdout)
    last, best = (re.escape(str(tmp_path / "run" / name)) for name in ("last", "best"))
    figures = r"a checkpoint needs ([\d,]+) bytes, ([\d,]+) are free"
    found = re.fullmatch(f"{last}: the disk is full: {figures}; kept: {last} and {best}", message)
    assert found is not None, message
    needed, free = (int(figure.replace(",", "")) for figure in found.groups())
    assert free < needed == pytest.approx(size, rel=0.1)
    assert (kept, left) == (4, ["best", "last"])
    assert ends == [["failed", message], ["finished", "the budget is used"]]
    assert losses == list(whole[0].losses.values())


@pytest.mark.parametrize("damage", ["absent", "empty", "cut", "other"])
def test_a_damaged_state_is_named(tmp_path: Path, tokenizer: Path, damage: str) -> None:
    folder = tmp_path / "last"
    write(folder, 1, tokenizer)
    path = folder / "trainer.pt"
    content = path.read_bytes()
    path.unlink()
    if damage != "absent":
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "other": b"hello"}[damage])
    with pytest.raises(ModelError, match=r"trainer\.pt cannot be read, so this run cannot be resumed") as caught:
        read_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_a_state_that_would_run_code_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    folder = tmp_path / "last"
    write(folder, 1, tokenizer)
    torch.save({"step": KilledError()}, folder / "trainer.pt")
    with pytest.raises(ModelError, match="cannot be read") as caught:
        read_checkpoint(folder)
    assert "\n" not in str(caught.value)


def start(shards: Path, out: Path, init: Path, recipe: Recipe | None = None, **options: Any) -> Recorder:
    recorder = Recorder()
    Trainer(recipe or smallest(), data=shards, out=out, observers=[recorder], init=init, **options).run()
    return recorder


def digest_of(checkpoint: Path) -> str:
    return hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()


def test_it_begins_with_these_weights_a_new_optimiser_and_the_first_row(
    whole: tuple[Recorder, Path], shards: Path, tmp_path: Path
) -> None:
    recorder, init = whole[0], whole[1] / "last"
    trainer = Trainer(smallest(seed=3), data=shards, out=tmp_path / "run", init=init)
    assert all(torch.equal(value, weights(init)[name]) for name, value in trainer.network.state_dict().items())
    assert all(part.state_dict()["state"] == {} for part in trainer.optimizers.parts)
    assert (trainer.step, trainer.tokens, trainer.rows.state()["next"]) == (0, 0, 0)
    more = start(shards, tmp_path / "more", init)
    assert [report.step for report in more.steps] == list(range(1, 13))
    assert more.steps[0].loss < recorder.steps[0].loss - 0.3, "it knows what the first run has learned"
    assert more.ends[0].best_bits_per_byte is not None
    assert recorder.ends[0].best_bits_per_byte is not None
    assert more.ends[0].best_bits_per_byte < recorder.ends[0].best_bits_per_byte


def test_its_checkpoints_report_what_it_started_from(
    whole: tuple[Recorder, Path], shards: Path, tmp_path: Path
) -> None:
    init = whole[1] / "best"
    notes = read_config(init)
    del notes["model"], notes["format"]
    recorder = start(shards, tmp_path / "run", init)
    assert recorder.starts[0].init == digest_of(init)
    for name in ("last", "best"):
        assert read_config(tmp_path / "run" / name)["init"] == {"digest": digest_of(init), **notes}
    assert whole[0].starts[0].init is None
    assert "init" not in notes


def test_a_continuation_of_a_continuation_reports_both(
    whole: tuple[Recorder, Path], shards: Path, tmp_path: Path
) -> None:
    second, third = tmp_path / "second" / "best", tmp_path / "third" / "best"
    start(shards, tmp_path / "second", whole[1] / "best", smallest(steps=2, eval_every=2, seed=1))
    start(shards, tmp_path / "third", second, smallest(steps=2, eval_every=2, seed=2))
    notes = read_config(third)
    assert notes["init"]["digest"] == digest_of(second)
    assert notes["init"]["init"]["digest"] == digest_of(whole[1] / "best")
    assert [part["recipe"]["seed"] for part in history(notes)] == [0, 1, 2]


def test_an_interrupted_continuation_resumes_without_init_and_still_reports_it(
    whole: tuple[Recorder, Path], shards: Path, tmp_path: Path
) -> None:
    init = whole[1] / "best"
    expected = start(shards, tmp_path / "expected", init)
    recorder = Recorder()
    trainer = Trainer(smallest(), data=shards, out=tmp_path / "run", observers=[recorder], init=init)
    recorder.then = lambda step: trainer._stop.set() if step == 5 else None
    trainer.run()
    assert recorder.ends[0].outcome == "stopped"
    train(smallest(), shards, tmp_path / "run", recorder, resume=True)
    assert recorder.losses == expected.losses
    assert [entry.init for entry in recorder.starts] == [digest_of(init)] * 2
    for name in ("last", "best"):
        assert same_weights(tmp_path / "run" / name, tmp_path / "expected" / name)
        assert read_config(tmp_path / "run" / name)["init"]["digest"] == digest_of(init)


def test_a_model_folder_is_named_by_its_own_digest_and_must_be_whole(tmp_path: Path) -> None:
    data = tmp_path / "data"
    tokenizer = small_folder() / "tokenizer.json"
    prepare(PrepareOptions(sources=(own_stories_folder(),), out=data, tokenizer=tokenizer))
    recipe = smallest(model=SMALL, steps=1, eval_every=1)
    start(data, tmp_path / "run", small_folder(), recipe)
    assert read_config(tmp_path / "run" / "best")["init"]["digest"] == ModelFolder.open(small_folder()).digest
    damaged = copy_of(small_folder(), tmp_path / "damaged")
    with (damaged / "decode.int8.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ModelError, match="is damaged: its digest is"):
        start(data, tmp_path / "other", damaged, recipe)


# What is refused.


def test_a_resume_takes_no_other_weights(whole: tuple[Recorder, Path], shards: Path) -> None:
    with pytest.raises(InputError, match=r"^init cannot be given with resume: the run in .* has weights"):
        start(shards, whole[1], whole[1] / "best", resume=True)


def test_a_folder_with_a_run_is_not_overwritten(whole: tuple[Recorder, Path], shards: Path) -> None:
    before = weights(whole[1] / "last")
    with pytest.raises(InputError, match="out already holds a run"):
        start(shards, whole[1], whole[1] / "best")
    assert all(torch.equal(value, before[name]) for name, value in weights(whole[1] / "last").items())


@pytest.mark.parametrize(("name", "value"), [("pattern", "AR"), ("mlp_width", 64), ("window", 32)])
def test_other_sizes_are_refused_by_name(
    whole: tuple[Recorder, Path], shards: Path, tmp_path: Path, name: str, value: object
) -> None:
    values = smallest().as_dict()
    ours = values["model"][name]
    recipe = Recipe.from_dict(values | {"model": values["model"] | {name: value}})
    with pytest.raises(InputError, match=rf"^init has model\.{name} = {ours!r} \(.*\), and not {value!r}$"):
        start(shards, tmp_path / "run", whole[1] / "best", recipe)


def test_another_tokenizer_of_the_same_size_is_refused(
    whole: tuple[Recorder, Path], shards: Path, tmp_path: Path
) -> None:
    init = tmp_path / "init"
    shutil.copytree(whole[1] / "best", init)
    tokenizer = json.loads((init / "tokenizer.json").read_text("utf-8"))
    merges = tokenizer["model"]["merges"]
    merges[-1], merges[-2] = merges[-2], merges[-1]
    (init / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    with pytest.raises(InputError, match=r"^init has another tokenizer \(.*\) than ") as caught:
        start(shards, tmp_path / "run", init)
    assert f"story data --tokenizer {init / 'tokenizer.json'}" in str(caught.value)


def test_the_same_tokenizer_written_otherwise_is_accepted(
    whole: tuple[Recorder, Path], shards: Path, tmp_path: Path
) -> None:
    init = tmp_path / "init"
    shutil.copytree(whole[1] / "best", init)
    tokenizer = json.loads((init / "tokenizer.json").read_text("utf-8"))
    (init / "tokenizer.json").write_text(json.dumps(tokenizer, indent=7), "utf-8")
    Trainer(smallest(), data=shards, out=tmp_path / "run", init=init)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_that_lacks_a_file_is_refused_by_name(
    whole: tuple[Recorder, Path], shards: Path, tmp_path: Path, missing: str
) -> None:
    init = tmp_path / "init"
    shutil.copytree(whole[1] / "best", init)
    (init / missing).unlink()
    with pytest.raises(StoryError, match=rf"{missing}:? cannot be read"):
        start(shards, tmp_path / "run", init)
    assert not (tmp_path / "run").exists()
