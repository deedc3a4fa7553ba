"""The record of how the shipped model was made: exported from an MLflow store, shown where that store is not.

A fresh clone has no store, and its Experiments page would be empty. `story record` writes what the page shows of some
training runs, and of the version that came of them, into one compressed JSON file. The page shows it beside the runs of
the user's own store. Nobody writes such a file by hand: it is checked against the schema when it is read.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar, get_args

from pydantic import ValidationError

from experiments.dashboard.records import Measure, Overview, Row, SampleSet, TrainingRecord
from model.errors import InputError, one_line
from model.validation import fault_of

RECORD = Path(__file__).resolve().parents[1] / "record.json.gz"
"""The record of the model that ships with the project."""
MAX_BYTES = 300_000
"""Of the file: it lies in the repository."""
FEWEST_SAMPLE_SETS = 3
"""Of a run, where there are more and the file would be too large."""

AnyRow = TypeVar("AnyRow", bound=Row)


def export_record(uri: str, names: Sequence[str]) -> TrainingRecord:
    """Read the training runs called `names` from the store at `uri`, and all that is known of their versions.

    `names` are those of `experiments.compare.frames.choose`: of runs or of registered versions.

    Raises `InputError`: a name means nothing, or a version without a training run; a run still goes on; the store is
    unusable.
    """
    from experiments.compare.frames import choose
    from experiments.dashboard import rows
    from training.tracking.runs import now, store_errors
    from training.tracking.store import open_store

    subjects = choose(uri, names)
    client = open_store(uri)
    with store_errors(uri):
        runs = []
        for subject in subjects:
            row = None if subject.run is None else rows.run_row(subject.run)
            if row is None or row.minutes is None:
                raise InputError("run", f"must be a training run or a version of one, and {subject.label} has none")
            if row.status == "running":
                raise InputError("run", f"must have ended, and {subject.label} is running")
            runs.append(row.model_copy(update={"ages": 0}))  # they are too large for a record
        numbers = {subject.version.number for subject in subjects if subject.version is not None}
        versions = tuple(row for row in rows.version_rows(client, {}) if row.number in numbers)
        digests = {row.digest for row in versions}
        ids = [row.id for row in runs]
        return TrainingRecord(
            exported=now(),
            overview=Overview(
                runs=tuple(runs),
                evaluations=tuple(row for row in rows.evaluation_rows(client) if row.digest in digests),
                benchmarks=tuple(row for row in rows.benchmark_rows(client) if row.digest in digests),
                versions=versions,
            ),
            curves={measure: tuple(rows.curves(client, ids, measure)) for measure in get_args(Measure)},
            samples={run: tuple(rows.sample_sets(client, run)) for run in ids},
        )


def fitted(record: TrainingRecord, limit: int = MAX_BYTES) -> TrainingRecord:
    """Leave out every other sample set, again and again, until the file of `record` has at most `limit` bytes.

    The first and the last set of a run stay. Raises `InputError` where that is not enough.
    """
    while (size := len(packed(record))) > limit:
        fewer = {run: _every_other(sets) for run, sets in record.samples.items()}
        if fewer == record.samples:
            raise InputError("run", f"must be few enough for a record of {limit:,} bytes, got {size:,}")
        record = record.model_copy(update={"samples": fewer})
    return record


def packed(record: TrainingRecord) -> bytes:
    """Return the file of `record`: the same bytes each time."""
    return gzip.compress(record.model_dump_json().encode(), compresslevel=9, mtime=0)


def read_record(path: Path = RECORD) -> TrainingRecord | None:
    """Read a record; None: there is none. Raises `InputError` for a file that is no record."""
    try:
        return TrainingRecord.model_validate_json(gzip.decompress(path.read_bytes()))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        reason = " ".join(fault_of(error))
    except (OSError, EOFError, zlib.error) as error:
        reason = one_line(error)
    raise InputError("record", f"must be a file that `story record` made, got {path.name}: {reason}")


def with_record(seen: Overview, record: TrainingRecord) -> Overview:
    """Return what the store holds, followed by what the record has and the store has not."""
    shipped = record.overview
    ids = {row.id for rows in (seen.runs, seen.evaluations, seen.benchmarks) for row in rows}
    digests = {version.digest for version in seen.versions}
    return seen.model_copy(
        update={
            "runs": seen.runs + _marked(row for row in shipped.runs if row.id not in ids),
            "evaluations": seen.evaluations + _marked(row for row in shipped.evaluations if row.id not in ids),
            "benchmarks": seen.benchmarks + _marked(row for row in shipped.benchmarks if row.id not in ids),
            "versions": seen.versions + _marked(row for row in shipped.versions if row.digest not in digests),
            "exported": record.exported,
        }
    )


def _marked(rows: Iterable[AnyRow]) -> tuple[AnyRow, ...]:
    return tuple(row.model_copy(update={"recorded": True}) for row in rows)


def _every_other(sets: tuple[SampleSet, ...]) -> tuple[SampleSet, ...]:
    return sets if len(sets) <= FEWEST_SAMPLE_SETS else (*sets[:-1:2], sets[-1])
