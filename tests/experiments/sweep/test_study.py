"""The database of a study, made by several processes at once."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

OPENED = """
import sys, optuna.storages, sqlalchemy
from experiments.sweep.study import open_storage
optuna.storages.RDBStorage  # imported when named
print("ready", flush=True)
sys.stdin.readline()
open_storage("sqlite:///" + sys.argv[1])
"""


def test_processes_that_begin_at_once_all_open_the_new_database(tmp_path: Path, repository: Path) -> None:
    command = [sys.executable, "-c", OPENED, str(tmp_path / "sweeps" / "sweeps.db")]
    start = partial(
        subprocess.Popen,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=repository,
        text=True,
    )
    processes = [start(command) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, errors
