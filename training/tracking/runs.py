"""Begin or continue the MLflow run of a training, and describe it by parameters, tags and data.

The training's folder names its run in `mlflow-run.json`. A resume continues that run; where the store does not know it
a new one begins, whose tags name the old one.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from model.errors import StoryError
from model.files import write_atomically
from training.tracking.provenance import Provenance, provenance
from training.tracking.store import LAST_SEEN, OWNER, Owner, mark_killed, owner_of, unusable
from training.trainer.observers import RunStart

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

RUN_FILE = "mlflow-run.json"
DIGEST_LENGTH = 36
"""MLflow's longest digest of a data set; the tag `data.digest` holds the whole one."""
SOURCE_LENGTH = 65_535


@contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Turn whatever SQLAlchemy, MLflow, a driver or the network raises into one `InputError` that names the store."""
    try:
        yield
    except StoryError:
        raise
    except Exception as error:
        raise unusable(uri, error) from error


def owned() -> dict[str, str]:
    """Tags of a run that this process begins or continues now."""
    return {OWNER: owner_of().to_text(), LAST_SEEN: str(now())}


def begin_run(client: MlflowClient, experiment_id: str, start: RunStart) -> Run:
    """The run to log to: running, owned by this process, named by `start.out`."""
    named = _named_run(start.out)
    previous = known_run(client, named)
    tags = owned() | {"outcome": "running"}
    if start.resumed_from > 0:
        tags["resumed.from_step"] = str(start.resumed_from)
        if previous is not None:
            run_id = previous.info.run_id
            times = int(previous.data.tags.get("resumed.times", "0")) + 1
            set_tags(client, run_id, tags | {"resumed.times": str(times), "outcome.reason": ""})
            client.update_run(run_id, status="RUNNING")
            return client.get_run(run_id)
        if named is not None:
            tags["resumed.from_run"] = named
            log.warning("the MLflow store does not know run %s; a new one goes on from there", named)
    elif previous is not None and previous.info.status == "RUNNING":
        # A new run takes the folder over, so nobody will ever finish the one before.
        owner = Owner.from_text(previous.data.tags.get(OWNER, ""))
        if owner is None or owner.state() != "alive":
            mark_killed(client, previous, "another run took its folder over")
    run = client.create_run(experiment_id, run_name=start.out.resolve().name, tags=tags)
    write_atomically(start.out / RUN_FILE, json.dumps({"run_id": run.info.run_id}) + "\n")
    return run


def describe_run(client: MlflowClient, run: Run, start: RunStart, origin: Provenance | None = None) -> None:
    """Log parameters, tags and the data set; recipe, data and environment whole as artifacts.

    MLflow's parameters cannot change: what a resume changes is a tag `resumed.…`. `origin` is where the run computes.
    """
    from mlflow.entities import Param

    origin = origin or provenance()
    run_id = run.info.run_id
    params = flat(start.recipe) | {
        "parameters": str(start.parameters),
        "world_size": str(start.world_size),
        "data": start.data_folder.resolve().name,
        "init": start.init or "random weights",
    }
    changes = {f"resumed.{key}": value for key, value in params.items() if run.data.params.get(key, value) != value}
    tags = origin.tags("story train") | {"data.digest": str(start.data.get("digest", "unknown"))}
    for key, value in tags.items():
        if run.data.tags.get(key, value) == value:
            changes[key] = value
        else:
            changes[f"resumed.{key}"] = value
    set_tags(client, run_id, changes)
    fresh = [Param(key, text) for key, text in params.items() if key not in run.data.params]
    client.log_batch(run_id, params=fresh, synchronous=True)
    if not (run.inputs and run.inputs.dataset_inputs):
        _log_data(client, run_id, start)
    client.log_dict(run_id, without_folders(start.recipe), "recipe.json")
    client.log_dict(run_id, without_folders(start.data), "data.json")
    client.log_dict(run_id, origin.as_dict(), "environment.json")


def history(client: MlflowClient, run_id: str, key: str) -> dict[int, float]:
    """A curve by step; of a step that a resumed run repeated, the later value."""
    found = client.get_metric_history(run_id, key)
    return {int(point.step): float(point.value) for point in sorted(found, key=lambda point: int(point.timestamp))}


def set_tags(client: MlflowClient, run_id: str, tags: dict[str, str]) -> None:
    """Set several tags in one call."""
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()], synchronous=True)


def table_text(rows: Sequence[dict[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows as the JSON that `mlflow.load_table` reads. MLflow's own `log_table` fails on the texts of pandas 3."""
    names = list(rows[0] if columns is None else columns)
    return json.dumps({"columns": names, "data": [[row[name] for name in names] for row in rows]}, ensure_ascii=False)


def table_rows(text: str | bytes) -> list[dict[str, Any]]:
    """The inverse of `table_text`. Raises `ValueError`, `TypeError` or `KeyError` for anything else."""
    table = json.loads(text)
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def log_tables(client: MlflowClient, run_id: str, tables: dict[str, str]) -> None:
    """Log texts of `table_text` as artifacts, path → text, with the tag by which MLflow's UI lists them as tables."""
    for path, text in tables.items():
        client.log_text(run_id, text, path)
    listed = [{"path": path, "type": "table"} for path in tables]
    client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps(listed))


def flat(recipe: dict[str, Any]) -> dict[str, str]:
    """A nested recipe as MLflow parameters: `{"model": {"width": 256}}` → `{"model.width": "256"}`.

    Texts stay as they are, all else is written as JSON. Of an absolute path only the last name is shown.
    """
    params: dict[str, str] = {}
    for key, value in without_folders(recipe).items():
        if isinstance(value, dict) and value:
            params |= {f"{key}.{inner}": text for inner, text in flat(value).items()}
        else:
            params[key] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return params


def without_folders(value: Any) -> Any:
    """The same plain values, each absolute path cut down to its last name: folders may name people."""
    if isinstance(value, dict):
        return {str(key): without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(inner) for inner in value]
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str):
        for kind in (PurePosixPath, PureWindowsPath):
            if kind(value).is_absolute():
                return kind(value).name
    return value


def now() -> int:
    """Milliseconds since 1970, MLflow's clock."""
    return int(time.time() * 1000)


def _log_data(client: MlflowClient, run_id: str, start: RunStart) -> None:
    """The shards as MLflow's data set: a name, a digest and counts. The data itself is not read."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    name = start.data_folder.resolve().name
    digest = str(start.data.get("digest", "unknown"))
    source = {"folder": name, "digest": digest, "sources": without_folders(start.data.get("sources", []))}
    if len(json.dumps(source)) > SOURCE_LENGTH:
        del source["sources"]  # thousands of files; the artifact data.json names them all
    shards = Dataset(
        name=name,
        digest=digest[:DIGEST_LENGTH],
        source_type="token-shards",
        source=json.dumps(source),
        profile=json.dumps(start.data.get("splits", {})),
    )
    tag = InputTag("mlflow.data.context", "training")
    client.log_inputs(run_id, datasets=[DatasetInput(shards, [tag])])


def known_run(client: MlflowClient, run_id: str | None) -> Run | None:
    """The run of that id, if this store has it and it was not deleted."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def _named_run(out: Path) -> str | None:
    try:
        return str(json.loads((out / RUN_FILE).read_text(encoding="utf-8"))["run_id"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("%s cannot be read, so MLflow gets a new run: %s", RUN_FILE, error)
        return None
