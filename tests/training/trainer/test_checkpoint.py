from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from model.architecture.network import StoryNetwork
from model.errors import ModelError
from tests.training.runs import MODEL
from training.trainer.checkpoint import find_checkpoint, read_checkpoint, write_checkpoint
from training.trainer.optim import Optimizers
from training.trainer.recipe import OptimizerRecipe


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


def test_a_checkpoint_replaces_the_one_before_and_leaves_nothing_beside_it(
    tmp_path: Path, tokenizer: Path
) -> None:
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


@pytest.mark.parametrize("damage", ["absent", "empty", "cut", "other"])
def test_a_damaged_state_is_named(tmp_path: Path, tokenizer: Path, damage: str) -> None:
    folder = tmp_path / "last"
    write(folder, 1, tokenizer)
    path = folder / "trainer.pt"
    content = path.read_bytes()
    path.unlink()
    if damage != "absent":
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "other": b"hello"}[damage])
    with pytest.raises(
        ModelError, match=r"trainer\.pt cannot be read, so this run cannot be resumed"
    ) as caught:
        read_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_a_state_that_would_run_code_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    folder = tmp_path / "last"
    write(folder, 1, tokenizer)
    torch.save({"step": KilledError()}, folder / "trainer.pt")
    with pytest.raises(ModelError, match="cannot be read") as caught:
        read_checkpoint(folder)
    assert "\n" not in str(caught.value)
