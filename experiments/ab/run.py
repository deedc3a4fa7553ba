"""`story ab`: read the store, report, and log the look to MLflow."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.ab.address import sqlite_file
from experiments.ab.database import connect, migrate
from experiments.ab.read import Metric, gather, known_tests
from experiments.ab.report import Report, make_report
from experiments.ab.shown import markdown
from model.errors import InputError, StoryError, one_line
from model.settings import without_password
from training.tracking.provenance import provenance
from training.tracking.store import open_experiment, open_store, unusable

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "story-ab"


def look(
    address: str,
    test: str | None,
    *,
    metric: Metric = "like",
    alpha: float = 0.05,
    since: float | None = None,
) -> Report:
    """The report on `test`, or on the newest one in the store at `address`.

    Raises:
        InputError: there is no such store or test, or `alpha` is no chance.
    """
    from sqlalchemy.exc import SQLAlchemyError

    if not 0 < alpha < 1:
        raise InputError("alpha", f"must be above 0 and below 1, got {alpha:g}")
    file = sqlite_file(address)
    if file is not None and not file.exists():
        raise InputError("DATABASE_URL", f"names {file}, which does not exist; `story demo` makes it")
    try:
        engine = connect(address, writes=False)
        try:
            migrate(engine)
            with engine.connect() as connection:
                if test is None:
                    test = next(iter(known_tests(connection)), None)
                if test is None:
                    raise InputError(
                        "DATABASE_URL", "holds no stories yet; readers of `story demo` make them"
                    )
                evidence = gather(connection, test, since=since)
        finally:
            engine.dispose()
    except SQLAlchemyError as error:
        reason = one_line(error).partition(" [SQL:")[0]
        raise InputError("DATABASE_URL", f"{without_password(address)} cannot be used ({reason})") from None
    return make_report(evidence, metric=metric, alpha=alpha)


def log(uri: str, report: Report) -> dict[str, str]:
    """Log one look as a run; what went wrong is told, as `failed`, and spoils no report."""
    try:
        client = open_store(uri)
        experiment = open_experiment(client, uri, EXPERIMENT)
        name = f"{report.evidence.test}: {report.verdict}"
        tags = provenance().tags() | {"ab.verdict": report.verdict, "ab.test": report.evidence.test}
        tags |= {f"{arm.name}.digest": arm.digest for arm in report.evidence.arms.values() if arm.digest}
        run_id = str(client.create_run(experiment, run_name=name, tags=tags).info.run_id)
        _fill(client, run_id, report)
        client.set_terminated(run_id, "FINISHED")
    except StoryError as error:
        return {"failed": str(error)}
    except Exception as error:  # SQLAlchemy's, MLflow's, the driver's or the network's
        return {"failed": str(unusable(uri, error))}
    return {"run_id": run_id, "experiment": EXPERIMENT}


def _fill(client: MlflowClient, run_id: str, report: Report) -> None:
    for key, value in (
        ("test", report.evidence.test),
        ("split", str(report.evidence.split)),
        ("metric", report.metric),
        ("alpha", f"{report.alpha:g}"),
    ):
        client.log_param(run_id, key, value)
    for key, number in _metrics(report).items():
        client.log_metric(run_id, key, number)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        text = json.dumps(report.as_dict(), ensure_ascii=False, indent=2)
        (folder / "report.json").write_text(text + "\n", encoding="utf-8")
        (folder / "report.md").write_text(markdown(report), encoding="utf-8")
        client.log_artifacts(run_id, str(folder))


def _metrics(report: Report) -> dict[str, float]:
    """By the names that MLflow allows: letters, digits, and a few signs."""
    found: dict[str, float] = {"sample_ratio/p": report.ratio.p, "sample_ratio/e": report.ratio.e}
    for arm in report.evidence.arms.values():
        place = _key(arm.name)
        found |= {f"{place}/visitors": arm.visitors, f"{place}/stories": arm.stories}
        found |= {
            f"{place}/{name}": rate.value for name, rate in report.rates[arm.name].items() if rate is not None
        }
    for each in report.comparisons:
        place = f"{_key(each.arm)}/{each.metric}"
        found |= {
            f"{place}_e": each.comparison.e,
            f"{place}_difference_low": each.comparison.low,
            f"{place}_difference_high": each.comparison.high,
        }
    return found


def _key(name: str) -> str:
    """An arm's name as a part of a metric's: a folder's slashes would be folders of metrics."""
    return "".join(sign if sign.isalnum() or sign in "_-. " else "_" for sign in name).strip(". ") or "arm"
