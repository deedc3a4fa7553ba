"""A model folder as an MLflow model: code, signature, example and requirements put around it.

What a version needs travels with it: the model folder as its artifact, and the serving half of this project as
code. A machine that has the named packages loads it without this checkout, and without torch.
"""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.architecture.folder import DIGESTED, ModelFolder
from model.generation import GenerationRequest, SamplingParams

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.models import ModelSignature

CODE = Path(__file__).with_name("story_writer.py")
SERVING = Path(__file__).resolve().parents[2] / "model"
REQUIREMENTS = ("mlflow", "numpy", "onnxruntime", "pandas", "tokenizers")
"""What the code of a version imports; each is named with the version that is installed here."""


def signature() -> ModelSignature:
    """Columns and parameters of `predict`: only `prompt` is required."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType

    kinds = {
        "max_tokens": DataType.long, "temperature": DataType.double, "top_k": DataType.long,
        "top_p": DataType.double, "min_p": DataType.double, "repetition_penalty": DataType.double,
        "seed": DataType.long,
    }  # fmt: skip
    usual: dict[str, Any] = {"max_tokens": GenerationRequest(prompt="").max_tokens}
    usual |= {name: getattr(SamplingParams(), name) for name in kinds if name != "max_tokens"}
    prompt = ColSpec(DataType.string, "prompt")
    # Any type: a column of whole numbers with a gap has become one of floats, which MLflow would not take for
    # either kind. Each row's values are checked by `GenerationRequest`, which says what is allowed.
    inputs = Schema([prompt, *(ColSpec(AnyType(), name, required=False) for name in kinds)])
    outputs = Schema(
        [
            ColSpec(DataType.string, "story"), ColSpec(DataType.string, "finish_reason"),
            ColSpec(DataType.long, "tokens"), ColSpec(DataType.string, "error"),
        ]
    )  # fmt: skip
    params = ParamSchema([ParamSpec(name, kind, usual[name]) for name, kind in kinds.items()])
    return ModelSignature(inputs, outputs, params)


def example() -> pd.DataFrame:
    """Two prompts, as `predict` takes them."""
    import pandas as pd

    prompts = ["Once upon a time", "Mia found a key."]
    return pd.DataFrame({"prompt": prompts, "max_tokens": [40, 40], "seed": [1, 2]})


def save_package(folder: ModelFolder, out: Path, scratch: Path) -> None:
    """Write the MLflow model of `folder` to `out` (new). `scratch` is an empty folder for copies on the way."""
    from mlflow import pyfunc

    code = scratch / "model"
    shutil.copytree(SERVING, code, ignore=shutil.ignore_patterns("pretrained", "__pycache__", "*.pyc"))
    artifact = scratch / "folder"
    artifact.mkdir()
    for name in (*DIGESTED, "digest", "card.md"):
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
