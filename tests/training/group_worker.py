"""One process of a group, as `torchrun` starts it for test_parallel: a whole run, one interrupted and resumed,
and one with dropout and averaged weights. The first process writes what it saw to `result.json`, and each one
what its weights are.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import weakref
from pathlib import Path

import torch
import torch.distributed

from tests.training.runs import REGULARISED, Recorder, smallest
from training.trainer.loop import Trainer
from training.trainer.parallel import Group

INTERRUPTED_AT = 5
"""Step behind which only the second process gets a signal."""


def main(data: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    group = Group()
    world = weakref.ref(torch.distributed.group.WORLD)
    recorders = {"whole": Recorder(), "interrupted": Recorder(), "regularised": Recorder()}

    def trainer(name: str, *, resume: bool = False) -> Trainer:
        recipe = smallest(**REGULARISED) if name == "regularised" else smallest()
        return Trainer(recipe, data=data, out=folder / name, observers=[recorders[name]], group=group, resume=resume)

    whole = trainer("whole")
    whole.run()
    interrupted = trainer("interrupted")
    if not group.first:
        step = interrupted.optimizers.step

        def step_and_signal() -> None:
            step()
            if interrupted.step + 1 == INTERRUPTED_AT:
                os.kill(os.getpid(), signal.SIGTERM)

        interrupted.optimizers.step = step_and_signal  # type: ignore[method-assign]
    stopped = interrupted.run()
    end = trainer("interrupted", resume=True).run()
    trainer("regularised").run()
    digest = hashlib.sha256()
    for parameter in whole.network.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    (folder / f"weights-{group.rank}").write_text(digest.hexdigest())
    (folder / f"ends-{group.rank}").write_text(json.dumps([stopped.outcome, stopped.step, end.outcome, end.step]))
    if group.first:
        result = {
            name: {
                "losses": recorder.losses,
                "bits": [report.bits_per_byte for report in recorder.evaluations],
                "tokens": recorder.ends[-1].tokens,
                "world_size": recorder.starts[0].world_size,
            }
            for name, recorder in recorders.items()
        }
        (folder / "result.json").write_text(json.dumps(result))
    group.close()
    assert world() is None, "a group that outlives its end may abort the process at the interpreter's"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
