"""A model folder as an MLflow model: code, signature, example and requirements put around it.

A version carries the model folder as its artifact and the generating part of `model` as code. A machine that has the
named packages loads it without this checkout and without torch.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import model
from model.architecture.folder import FILES, ModelFolder
from model.generation import GenerationRequest, SamplingParams

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

CODE = Path(__file__).with_name("story_writer.py")
PACKED = ("__init__.py", "errors.py", "generation.py", "architecture", "runtimes", "engine")
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
    inputs = Schema([prompt, *(ColSpec(AnyType(), name, required=False) for name in (*usual, "stop"))])
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
