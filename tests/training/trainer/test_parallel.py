"""Two real processes that talk over the loopback, against one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from model.errors import InputError
from tests.training.group_worker import INTERRUPTED_AT
from tests.training.runs import REGULARISED, same_weights, smallest, train
from training.run import relaunch
from training.trainer.parallel import Group


@pytest.fixture(scope="module")
def folder(shards: Path, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes under torchrun left behind."""
    folder = tmp_path_factory.mktemp("group")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.training.group_worker", str(shards), str(folder)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "result.json").read_text()))


@pytest.mark.parametrize(("run", "changes"), [("whole", {}), ("regularised", REGULARISED)])
def test_two_processes_give_the_losses_of_one(
    result: dict[str, Any], shards: Path, tmp_path: Path, run: str, changes: dict[str, Any]
) -> None:
    alone = train(smallest(**changes), shards, tmp_path / "run")
    together = result[run]
    assert together["world_size"] == 2
    assert together["tokens"] == alone.ends[0].tokens
    one, two = list(alone.losses.values()), list(together["losses"].values())
    assert two[:5] == pytest.approx(one[:5], rel=1e-5)
    # Sums in another order round otherwise, and Muon's bf16 products let the difference grow from step to step.
    assert two == pytest.approx(one, rel=1e-4)
    assert together["bits"] == pytest.approx([e.bits_per_byte for e in alone.evaluations], rel=1e-4)


def test_both_processes_hold_the_same_weights_bit_for_bit(folder: Path) -> None:
    digests = {(folder / f"weights-{rank}").read_text() for rank in (0, 1)}
    assert len(digests) == 1


def test_a_signal_to_one_process_stops_both_at_the_same_step_and_a_resume_is_exact(
    result: dict[str, Any], folder: Path
) -> None:
    for rank in (0, 1):
        ends = json.loads((folder / f"ends-{rank}").read_text())
        assert ends == ["stopped", INTERRUPTED_AT, "finished", 12]
    assert result["interrupted"] == result["whole"]
    for name in ("last", "best"):
        assert same_weights(folder / "interrupted" / name, folder / "whole" / name)


def test_one_process_goes_on_with_what_two_have_begun(folder: Path, shards: Path, tmp_path: Path) -> None:
    out = shutil.copytree(folder / "whole", tmp_path / "run")
    more = train(smallest(steps=14), shards, out, resume=True)
    assert [report.step for report in more.steps] == [13, 14]


def test_ctrl_c_lets_all_processes_of_story_train_save_and_end(shards: Path, repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "story", "train", "--preset", "tiny", "--processes", "2", "--no-track"]
    command += ["--data", str(shards), "--out", str(out), "--json"]
    command += ["micro_rows=2", "steps=10000", "save_every=1", "eval_every=10000", "samples=[]"]
    process = subprocess.Popen(
        command, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 200
        while saved_step(out) < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to the whole group
        printed, said = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, said
    assert "Traceback" not in said
    notes = json.loads(printed)
    assert (notes["outcome"], notes["reason"]) == ("stopped", "interrupted by hand")
    assert saved_step(out) == notes["step"] >= 2


def saved_step(out: Path) -> int:
    try:
        return int(json.loads((out / "last" / "config.json").read_text())["step"])
    except (OSError, ValueError):  # not there yet, or just being replaced
        return -1


def test_the_exit_status_of_a_group_is_that_of_the_process_that_failed(capfd: pytest.CaptureFixture[str]) -> None:
    assert relaunch(2, ["--version"]) == 0
    assert relaunch(2, ["train", "--preset", "nope"]) == 2
    assert "preset must be one of" in capfd.readouterr().err


def test_when_one_process_fails_the_others_do_not_wait_for_it_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In place of `story`: the second process dies, the first would wait for its sums.
    (tmp_path / "story.py").write_text(
        "import os, time\n"
        "if os.environ['RANK'] == '1':\n"
        "    os.kill(os.getpid(), 9)\n"
        "open('pid', 'w').write(str(os.getpid()))\n"
        "time.sleep(120)\n"
    )
    monkeypatch.setattr("training.run.GRACE_SECONDS", 1.0)
    began = time.monotonic()
    assert relaunch(2, []) == 128 + signal.SIGKILL
    assert time.monotonic() - began < 60
    if (pid := tmp_path / "pid").exists():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)


def test_less_than_one_process_is_refused() -> None:
    with pytest.raises(InputError, match="processes must be at least 1, got 0"):
        relaunch(0, ["train"])


def test_alone_nothing_is_exchanged() -> None:
    group = Group()
    assert (group.rank, group.size, group.first) == (0, 1, True)
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, 2.0])
    group.sum_gradients([parameter])
    assert parameter.grad.tolist() == [1.0, 2.0]
    assert group.agree(0.25, True) == [0.25, 1.0]
    group.close()
