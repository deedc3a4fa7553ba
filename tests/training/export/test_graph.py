from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file

from model.architecture.folder import PRECISIONS, PRETRAINED, ModelConfig
from model.architecture.network import load_network, save_network
from model.errors import ModelError
from model.runtimes.onnx.runtime import OnnxRuntime
from tests.model.small_model import SMALL, copy_of, random_network, small_folder, small_tokenizer
from training.export.export import accept
from training.export.graph import CONTRIB, WeightFile, build_graph

STORED_IN_FP32 = {"embedding.weight"} | {
    f"blocks.{layer}.{name}.weight" for layer in range(4) for name in ("mixer.inputs", "mixer.output", "up", "down")
}


def test_the_weight_file_knows_where_each_tensor_lies() -> None:
    path = small_folder() / "model.safetensors"
    source, other = WeightFile.read(path), load_file(path)
    content = path.read_bytes()
    assert source.name == "model.safetensors"
    assert source.tensors.keys() == source.spans.keys() == other.keys()
    for name, (offset, length) in source.spans.items():
        assert content[offset : offset + length] == other[name].numpy().tobytes()
    assert struct.unpack("<Q", content[:8])[0] + 8 == min(offset for offset, _ in source.spans.values())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_graph_passes_onnxs_own_checker(precision: str) -> None:
    path = small_folder() / f"decode.{precision}.onnx"
    model = onnx.load(path, load_external_data=False)
    foreign = {node.op_type for node in model.graph.node if node.domain == CONTRIB}
    foreign.add("SimplifiedLayerNormalization")
    for node in model.graph.node:
        # ONNX Runtime registers this one under ONNX's own name, where ONNX's checker does not know it.
        if node.op_type == "SimplifiedLayerNormalization":
            node.domain = CONTRIB
    copy = path.with_name(f"checked.{precision}.onnx")  # beside the weights, which the checker looks for
    copy.write_bytes(model.SerializeToString())
    try:
        onnx.checker.check_model(str(copy))
    finally:
        copy.unlink()
    known = {node.op_type for node in model.graph.node} - foreign
    assert {"MatMul", "Softmax", "Split", "Gather"} <= known
    assert all(onnx.defs.has(kind) for kind in known)
    assert "LinearAttention" in foreign


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_graph_points_at_the_right_bytes_of_the_weights_file(precision: str) -> None:
    """ONNX's own loader follows the pointers; safetensors reads the same tensors by name."""
    path = small_folder() / f"decode.{precision}.onnx"
    pointers = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
    }
    assert set(pointers) == (STORED_IN_FP32 if precision == "fp32" else {"embedding.weight"})
    assert {entry["location"] for entry in pointers.values()} == {"model.safetensors"}
    filled = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    stored = load_file(small_folder() / "model.safetensors")
    for name in pointers:
        np.testing.assert_array_equal(numpy_helper.to_array(filled[name]), stored[name].numpy())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_graph_takes_and_gives_what_its_module_says(precision: str) -> None:
    session = ort.InferenceSession(str(small_folder() / f"decode.{precision}.onnx"))
    taken = {entry.name: list(entry.shape) for entry in session.get_inputs()}
    channels = 2 * SMALL.heads * SMALL.key_dim + SMALL.heads * SMALL.head_dim
    conv, memory = ["B", 3, channels], ["B", SMALL.heads, SMALL.key_dim, SMALL.head_dim]
    ring = ["B", 1, SMALL.window, SMALL.head_dim]
    states = {f"conv_{layer}": conv for layer in (0, 2)} | {f"memory_{layer}": memory for layer in (0, 2)}
    assert taken == {
        "tokens": ["B", "T"],
        "take": ["taken"],
        "bias": ["B", "T", 1, "W_plus_T"],
        "cos": ["B", "T", 1, SMALL.head_dim],
        "sin": ["B", "T", 1, SMALL.head_dim],
        "keys_1": ring,
        "values_1": ring,
        "keys_3": ring,
        "values_3": ring,
        **states,
    }
    given_back = {entry.name: list(entry.shape) for entry in session.get_outputs()}
    new = ["B", "T", SMALL.head_dim]
    assert given_back == {
        "logits": ["B", "taken", SMALL.vocab_size],
        **{f"{name}_{layer}_out": new for name in ("keys", "values") for layer in (1, 3)},
        **{f"{name}_out": shape for name, shape in states.items()},
    }


def test_int8_is_made_of_8_bit_matrices_alone() -> None:
    model = onnx.load(small_folder() / "decode.int8.onnx", load_external_data=False)
    products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == len(STORED_IN_FP32)
    for node in products:
        notes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        assert (notes["bits"], notes["block_size"], notes["accuracy_level"]) == (8, 64, 4)


def test_the_shipped_graphs_share_one_copy_of_the_weights() -> None:
    sizes = {path.name: path.stat().st_size for path in PRETRAINED.iterdir()}
    parameters = sum(value.numel() for value in load_file(PRETRAINED / "model.safetensors").values())
    assert sizes["model.safetensors"] < 2 * parameters + 20_000  # fp16 and a header
    assert sizes["decode.fp32.onnx"] < 200_000  # nodes and pointers only
    assert sizes["decode.int8.onnx"] < (1 + 4 / 64) * parameters + 250_000  # a byte each, a scale a block


@pytest.mark.parametrize("width", [32, 40, 72])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_width_that_does_not_fill_its_blocks_gives_the_networks_logits(
    width: int, precision: str, tmp_path: Path
) -> None:
    config = ModelConfig(
        vocab_size=50, width=width, pattern="RA", mlp_width=88, heads=2, head_dim=20, key_dim=8, window=8
    )
    path = tmp_path / f"decode.{precision}.onnx"
    path.write_bytes(build_graph(config, saved(config, tmp_path), precision).SerializeToString())
    rng = np.random.default_rng(0)
    stories = [[0, *map(int, rng.integers(1, 50, 60))] for _ in range(3)]
    accept(load_network(tmp_path), OnnxRuntime(path, config, max_batch=3), precision, stories)


def saved(config: ModelConfig, folder: Path) -> WeightFile:
    save_network(random_network(config), folder, tokenizer=small_tokenizer(), notes={})
    return WeightFile.read(folder / "model.safetensors")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named_before_int8_hides_it(value: float, tmp_path: Path) -> None:
    folder = copy_of(small_folder(), tmp_path / "model")
    source = WeightFile.read(folder / "model.safetensors")
    source.tensors["blocks.2.down.weight"][3, 5] = value
    with pytest.raises(ModelError, match=r"model\.safetensors: blocks\.2\.down\.weight holds a value that is not"):
        build_graph(SMALL, source, "int8")
