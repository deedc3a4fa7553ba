"""Registered versions of the model in MLflow: one for each artifact, found by number, alias or digest.

A version is a model folder with a digest. All evidence names that digest, so no figure is taken for another
artifact's. Registering a folder again gives the version that exists.

A version carries the model folder as its artifact and the generating part of `model` as code. A machine that has the
named packages loads it without this checkout and without torch.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import model
from experiments.common.evidence_runs import DIGEST, EvidenceStore
from model.architecture.folder import FILES, ModelFolder, read_weights
from model.errors import ModelError, one_line
from model.generation import GenerationRequest, SamplingParams
from model.serving.registry import FOLDER, NAME, RegisteredVersion, check_complete, choose, parse_reference
from model.settings import without_password
from training.tracking.observer import EXPERIMENT, MODEL_NAME
from training.tracking.provenance import provenance
from training.tracking.runs import RUN_FILE
from training.tracking.store import SQLITE, database_file, open_store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"


@dataclass(frozen=True, slots=True, kw_only=True)
class Version(RegisteredVersion):
    """One registered version, as `story models` shows it."""

    tags: dict[str, str]
    created: int
    """Milliseconds since 1970."""
    run_id: str = ""
    """Of the training run that it comes from."""
    new: bool = False
    """Made by this very call."""


def register(
    folder: ModelFolder,
    uri: str,
    *,
    alias: str | None = CHALLENGER,
    run_folder: Path | None = None,
    repair: bool = False,
) -> Version:
    """Make a version of `folder` in the store at `uri`, or find the one that has this digest already.

    Args:
        folder: an opened model folder.
        uri: the MLflow store.
        alias: moved to the version; None moves none.
        run_folder: the folder of the training run that the model comes from, if there is one; the version then
            belongs to that run.
        repair: upload the files of a version that exists again.

    Raises:
        InputError: the store is not usable. `MissingExtraError`: MLflow is not installed.
        ModelError: the version exists, and files of it are missing.
    """
    client = open_store(uri)
    _make_name(client)
    version = _with_digest(client, folder.digest)
    new = version is None
    if version is None:
        version = _create(client, uri, folder, _training_run(client, run_folder))
    elif repair:
        # A search leaves the model's id out, but its files lie at …/ID/artifacts.
        _upload(client, folder, str(version.source).split("/")[-2], str(version.run_id))
    else:
        from mlflow.artifacts import list_artifacts

        stored = list_artifacts(artifact_uri=f"{version.source}/{FOLDER}", tracking_uri=client.tracking_uri)
        check_complete(_read(version), [file.path.rpartition("/")[2] for file in stored])
    if alias is not None:
        client.set_registered_model_alias(NAME, alias, version.version)
    return _read(client.get_model_version(NAME, version.version), new=new)


def versions(uri: str) -> list[Version]:
    """All versions, newest first."""
    return versions_in(open_store(uri))


def versions_in(client: MlflowClient) -> list[Version]:
    """All versions of an opened store, newest first."""
    found = client.search_model_versions(f"name = '{NAME}'")
    # A search leaves the aliases out; each version is asked for by itself.
    whole = [client.get_model_version(NAME, each.version) for each in found]
    return sorted((_read(each) for each in whole), key=lambda each: -each.number)


def holder(uri: str, alias: str) -> Version | None:
    """The version that holds an alias, if one does."""
    return next((each for each in versions(uri) if alias in each.aliases), None)


def find(uri: str, reference: str) -> Version:
    """The version that `reference` names: a number, an alias, the first characters of a digest (at least 8), or
    `models:/story-writer/3`, `models:/story-writer@champion`.

    Raises `InputError` that names what there is.
    """
    return choose(versions(uri), parse_reference(reference, bare_names=True) or reference)


class StoreRegistry:
    """The registry of a store that MLflow has to open: a database."""

    def __init__(self, uri: str) -> None:
        database = database_file(uri)
        # Absolute: `mlflow.db` is another database in each folder, and the cache of versions is one for all.
        self.address = without_password(uri) if database is None else f"{SQLITE}{database}"
        self._uri = uri

    def find(self, wanted: str) -> Version:
        """See `model.serving.registry.Registry`."""
        return find(self._uri, wanted)

    def download(self, version: RegisteredVersion, out: Path) -> None:
        """See `model.serving.registry.Registry`."""
        from mlflow.artifacts import download_artifacts, list_artifacts
        from mlflow.exceptions import MlflowException

        client = open_store(self._uri)
        where = client.get_model_version_download_uri(NAME, str(version.number))
        with tempfile.TemporaryDirectory(prefix="story-version-") as scratch:
            source = f"{where}/{FOLDER}"
            try:
                if not list_artifacts(artifact_uri=source, tracking_uri=client.tracking_uri):
                    return
                fetched = download_artifacts(artifact_uri=source, dst_path=scratch, tracking_uri=client.tracking_uri)
                shutil.copytree(fetched, out, dirs_exist_ok=True)
            except (MlflowException, OSError) as error:
                raise ModelError(f"the files of {version.name} cannot be read: {one_line(error)}") from None


def _make_name(client: MlflowClient) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(NAME, description="Small stories by a small language model of our own.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _with_digest(client: MlflowClient, digest: str) -> ModelVersion | None:
    found = client.search_model_versions(f"name = '{NAME}' and tags.`{DIGEST}` = '{digest}'")
    return min(found, key=lambda each: int(each.version), default=None)


def _training_run(client: MlflowClient, folder: Path | None) -> str | None:
    """The run that the training in `folder` logged to, if this store knows it."""
    from mlflow.exceptions import MlflowException

    if folder is None:
        return None
    try:
        run_id = json.loads((folder / RUN_FILE).read_text("utf-8"))["run_id"]
        return str(client.get_run(run_id).info.run_id)
    except (OSError, ValueError, KeyError, MlflowException):
        return None


def _create(client: MlflowClient, uri: str, folder: ModelFolder, trained: str | None) -> ModelVersion:
    """Make the version, belonging to the run `trained`, with short facts of the folder's making as tags."""
    recipe = folder.notes.get("recipe")
    recipe = recipe if isinstance(recipe, dict) else {}
    notes = {name: folder.notes.get(name) for name in ("data", "step", "tokens", "best_bits_per_byte")}
    notes["parameters"] = sum(tensor.size for tensor in read_weights(folder.weights).values())
    notes["recipe"] = recipe.get("name")
    run_id = trained
    if run_id is None:  # MLflow wants a run behind each version: this one stands for a training elsewhere
        with EvidenceStore(uri, EXPERIMENT).run(f"imported-{folder.digest[:8]}", {"imported": "true"}) as run:
            run.log_params(recipe)
        run_id = run.run_id
    experiment = client.get_run(run_id).info.experiment_id
    origin = provenance()
    tags = {DIGEST: folder.digest} | {f"model.{name}": str(value) for name, value in notes.items() if value is not None}
    if origin.git_sha is not None:
        tags |= {"git.sha": origin.git_sha, "git.dirty": str(bool(origin.git_dirty)).lower()}
    model = client.create_logged_model(experiment, MODEL_NAME, run_id, tags, model_type="serving")
    try:
        _upload(client, folder, model.model_id, run_id)
    except Exception:
        client.finalize_logged_model(model.model_id, "FAILED")
        raise
    client.finalize_logged_model(model.model_id, "READY")
    return client.create_model_version(
        NAME, source=model.artifact_location, run_id=run_id, tags=tags, model_id=model.model_id
    )


def _upload(client: MlflowClient, folder: ModelFolder, model_id: str, run_id: str) -> None:
    with tempfile.TemporaryDirectory(prefix="story-version-") as scratch:
        package, copies = Path(scratch) / "package", Path(scratch) / "copies"
        copies.mkdir()
        save_package(folder, package, copies, model_id, run_id)
        client.log_model_artifacts(model_id, str(package))


def _read(version: ModelVersion, *, new: bool = False) -> Version:
    return Version(
        number=int(version.version),
        digest=version.tags.get(DIGEST, ""),
        aliases=tuple(sorted(version.aliases)),
        tags=dict(sorted(version.tags.items())),
        created=int(version.creation_timestamp),
        source=str(version.source),
        run_id=str(version.run_id or ""),
        new=new,
    )


CODE = Path(__file__).with_name("story_writer.py")
PACKED = ("__init__.py", "errors.py", "generation.py", "wishes.py", "architecture", "runtimes", "engine")
"""Parts of `model` that a version carries: what generates, without HTTP, settings and deployment."""
REQUIREMENTS = ("mlflow", "numpy", "onnxruntime", "pandas", "tokenizers")
"""Packages that a version's code imports; each is pinned to the version that is installed here."""


def signature() -> ModelSignature:
    """Columns and parameters of `predict`: only `prompt` is required."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType

    usual: dict[str, Any] = {"max_tokens": GenerationRequest(prompt="").max_tokens} | asdict(SamplingParams())
    del usual["logit_bias"]  # no column holds it
    usual["seed"] = -1  # each row gets its own
    kinds = {bool: DataType.boolean, int: DataType.long, float: DataType.double, str: DataType.string}
    prompt = ColSpec(DataType.string, "prompt")
    # Any type: a column of integers with a gap becomes one of floats, which MLflow would refuse for either type.
    # `GenerationRequest` checks each row's values.
    inputs = Schema([prompt, *(ColSpec(AnyType(), name, required=False) for name in (*usual, "stop", "wishes"))])
    columns = {"story": str, "finish_reason": str, "tokens": int, "seed": int, "error": str}
    outputs = Schema([ColSpec(kinds[kind], name) for name, kind in columns.items()])
    params = ParamSchema(
        [
            *(ParamSpec(name, kinds[type(value)], value) for name, value in usual.items()),
            ParamSpec("stop", DataType.string, [], shape=(-1,)),
        ]
    )
    return ModelSignature(inputs, outputs, params)


def save_package(folder: ModelFolder, out: Path, scratch: Path, model_id: str, run_id: str) -> None:
    """Write the MLflow model of `folder` to `out` (new), as logged model `model_id` of run `run_id`.

    `scratch` is an empty folder for temporary copies.
    """
    import pandas as pd
    from mlflow import pyfunc
    from mlflow.models import Model

    prompts = ["Once upon a time", "Mia found a key."]
    code, source = scratch / "model", Path(str(model.__file__)).parent

    def unpacked(folder: str, names: list[str]) -> set[str]:
        others = set(names) - set(PACKED) if Path(folder) == source else set()
        return others | {"__pycache__"}

    shutil.copytree(source, code, ignore=unpacked)
    artifact = scratch / "folder"
    artifact.mkdir()
    for name in FILES:
        if (folder.path / name).is_file():
            shutil.copy(folder.path / name, artifact / name)
    pyfunc.save_model(
        path=str(out),
        mlflow_model=Model(model_id=model_id, run_id=run_id),  # `get_model_info(…).model_uri` comes from these
        python_model=str(CODE),
        artifacts={"model": str(artifact)},
        code_paths=[str(code)],
        signature=signature(),
        input_example=pd.DataFrame({"prompt": prompts, "max_tokens": [40, 40], "seed": [1, 2]}),
        pip_requirements=[f"{name}=={metadata.version(name)}" for name in REQUIREMENTS],
        metadata={"artifact.digest": folder.digest},
        streamable=True,
    )
