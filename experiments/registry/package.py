"""A model folder as an MLflow model: code, signature, example and requirements put around it.

A version carries the model folder as its artifact and the generating part of `model` as code. A machine that has the
named packages loads it without this checkout and without torch.
"""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import model
from model.architecture.folder import FILES, ModelFolder
from model.generation import GenerationRequest, SamplingParams

if TYPE_CHECKING:
    import pandas as pd
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

    whole, real = DataType.long, DataType.double
    kinds = {"max_tokens": whole, "temperature": real, "top_k": whole, "top_p": real, "min_p": real}
    kinds |= {"repetition_penalty": real, "seed": whole}
    usual: dict[str, Any] = {"max_tokens": GenerationRequest(prompt="").max_tokens}
    usual |= {name: getattr(SamplingParams(), name) for name in kinds if name != "max_tokens"}
    prompt = ColSpec(DataType.string, "prompt")
    # Any type: a column of integers with a gap becomes one of floats, which MLflow would refuse for either type.
    # `GenerationRequest` checks each row's values.
    inputs = Schema([prompt, *(ColSpec(AnyType(), name, required=False) for name in kinds)])
    columns = {"story": DataType.string, "finish_reason": DataType.string, "tokens": whole}
    outputs = Schema([ColSpec(kind, name) for name, kind in (columns | {"error": DataType.string}).items()])
    params = ParamSchema([ParamSpec(name, kind, usual[name]) for name, kind in kinds.items()])
    return ModelSignature(inputs, outputs, params)


def example() -> pd.DataFrame:
    """Two prompts, as `predict` takes them."""
    import pandas as pd

    prompts = ["Once upon a time", "Mia found a key."]
    return pd.DataFrame({"prompt": prompts, "max_tokens": [40, 40], "seed": [1, 2]})


def save_package(folder: ModelFolder, out: Path, scratch: Path) -> None:
    """Write the MLflow model of `folder` to `out` (new). `scratch` is an empty folder for temporary copies."""
    from mlflow import pyfunc

    code, source = scratch / "model", Path(str(model.__file__)).parent
    code.mkdir()
    for name in PACKED:
        if (source / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
            shutil.copytree(source / name, code / name, ignore=ignored)
        else:
            shutil.copy(source / name, code / name)
    artifact = scratch / "folder"
    artifact.mkdir()
    for name in FILES:
        if (folder.path / name).is_file():
            shutil.copy(folder.path / name, artifact / name)
    pyfunc.save_model(
        path=str(out),
        python_model=str(CODE),
        artifacts={"model": str(artifact)},
        code_paths=[str(code)],
        signature=signature(),
        input_example=example(),
        pip_requirements=[f"{name}=={metadata.version(name)}" for name in REQUIREMENTS],
        metadata={"artifact.digest": folder.digest},
        streamable=True,
    )
