"""A store with everything that the page shows, all of it real: made once a run of the tests, and read only.

Training runs of a few thousand parameters with their curves and stories; a champion that was measured and judged,
and judged again under bounds that it partly misses and partly cannot decide; a challenger without evidence.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.common.thresholds import load_thresholds
from experiments.gate.decide import Decision
from experiments.gate.run import run_gate
from experiments.registry.versions import register
from model.architecture.folder import ModelFolder
from tests.experiments.gate.promoted import copied, promoted
from tests.experiments.gate.worse import log_quality, log_speed, noised
from tests.once import once_a_run, shared_folder
from tests.training.own_shards import own_shards
from tests.training.runs import Recorder, smallest
from tests.training.tracked import end, evaluation, observer_on, start, step
from training.trainer.loop import Trainer

HARDER = """
thresholds:
  - {metric: success_rate, unit: share, at_least: 0.80, scope: benchmark, reason: documented, min_n: 30}
  - {metric: bits_per_byte, unit: bits/byte, at_most: 0.01, scope: quality, reason: out of reach, min_n: 40}
  - {metric: error_rate, unit: share, below: 0.50, scope: benchmark, reason: asks for more, min_n: 9999}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """The store, and what went into it."""

    uri: str
    trained: Recorder
    """What the loop reported of the run `learned`."""
    decision: Decision
    """The newest on version 1."""


@once_a_run
def made() -> Made:
    """The store."""
    folder = Path(tempfile.mkdtemp(prefix="overview-", dir=shared_folder()))
    place = copied(folder, promoted())
    trained = Recorder()
    recipe = smallest(name="smallest", samples=("Once upon a time", "The fox"))
    out = folder / "runs" / "learned"
    Trainer(recipe, data=own_shards(), out=out, observers=[trained, observer_on(place.uri)]).run()
    _reported(place.uri, folder / "runs" / "stopped")
    (folder / "harder.yaml").write_text(HARDER)
    decision = run_gate(place.uri, load_thresholds(folder / "harder.yaml"), version="1")
    return Made(uri=place.uri, trained=trained, decision=decision)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shipped:
    """A store like that of `made`, in which a version came of the run `learned` and was measured and judged."""

    uri: str
    version: ModelFolder
    decision: Decision


@once_a_run
def shipped() -> Shipped:
    """The store."""
    folder = Path(tempfile.mkdtemp(prefix="shipped-", dir=shared_folder()))
    place = copied(folder, replace(promoted(), uri=made().uri))
    version = noised(folder, strength=2e-4)
    trained = Path(made().uri.removeprefix("sqlite:///")).parent / "runs" / "learned"
    register(version, place.uri, run_folder=trained)
    log_quality(place.uri, version, place.stories)
    log_speed(place.uri, version, place.bounds)
    return Shipped(uri=place.uri, version=version, decision=run_gate(place.uri, place.bounds))


def _reported(uri: str, out: Path) -> None:
    """A run that was stopped by hand, as the loop would report it."""
    out.mkdir(parents=True)
    observer = observer_on(uri)
    observer.started(start(out))
    for number in range(1, 21):
        observer.stepped(step(number, loss=4 - number / 10))
        if number % 5 == 0:
            observer.evaluated(evaluation(number, 2.0 - number / 20))
    observer.ended(end("stopped"))
