"""Build the decode graph: the network as ONNX nodes, for serving without PyTorch.

One graph serves prefill (a run of tokens) and decode (one token a stream). States go in and come out; the ring of
attention's keys and values only goes in and the new rows come out, so that no step copies a ring.

Built by hand rather than traced: fewer and larger nodes, each of which costs a microsecond or more at this size.
ONNX Runtime's fused nodes do the recurrence (`LinearAttention`) and its decays (`LinearAttentionGate`). Its
`CausalConvWithState` and `GatedRMSNorm` are not used: at 16 streams plain nodes are faster (a step 17 % shorter).

Inputs (B streams, T tokens, W window, D width, H heads, N keys, P values, K taps, M convolved channels):
`tokens` (B, T); `cos`, `sin` (B, T, 1, P) rotary table; `bias` (B, T, 1, W + T), 0 where a query may look and a
large negative number elsewhere; `take` (some of T) the places whose logits are wanted; for each recurrent layer
`conv_i` (B, K-1, M) and `memory_i` (B, H, N, P); for each attention layer `keys_i`, `values_i` (B, 1, W, P).
Outputs: `logits` (B, take, V); the states with `_out`; for attention only the new rows (B, T, P).
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

from model.architecture.folder import ModelConfig
from model.errors import ModelError
from model.runtimes.native.library import BLOCK, quantize_matrix

CONTRIB = "com.microsoft"
EPSILON = 1e-6
Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A safetensors file: its tensors, and where in the file each one's bytes are."""

    name: str
    tensors: dict[str, Array]
    spans: dict[str, tuple[int, int]]
    """Name to (offset, length) in bytes from the start of the file."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read all of `path` (the format: eight bytes of header length, a JSON header, then the tensors)."""
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        offsets = {name: entry["data_offsets"] for name, entry in header.items()}
        spans = {name: (8 + size + begin, end - begin) for name, (begin, end) in offsets.items()}
        return cls(path.name, load_file(path), spans)


class GraphBuilder:
    """Collects nodes and constants; each method adds one operation and returns the name of its result."""

    def __init__(self, config: ModelConfig, source: WeightFile, precision: str) -> None:
        self.config, self.source, self.precision = config, source, precision
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self._known: set[str] = set()
        self._count = 0

    def node(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        names = [f"{kind.lower()}_{self._count}_{index}" for index in range(outputs)]
        self._count += 1
        self.nodes.append(helper.make_node(kind, list(inputs), names, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, name: str, value: Array) -> str:
        if name not in self._known:
            self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
            self._known.add(name)
        return name

    def ints(self, *values: int) -> str:
        return self.constant("i_" + "_".join(map(str, values)).replace("-", "m"), np.array(values, np.int64))

    def input(self, name: str, kind: int, *shape: int | str) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, source: str, *shape: int | str) -> None:
        self.nodes.append(helper.make_node("Identity", [source], [name]))
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def weight(self, name: str) -> Array:
        """A weight in fp32. Raises `ModelError` if it holds a NaN or an infinity, which int8 would hide."""
        value = self.source.tensors[name].astype(np.float32)
        if not np.isfinite(value).all():
            raise ModelError(f"{self.source.name}: {name} holds a value that is not finite")
        return value

    def stored(self, name: str) -> str:
        """A weight as it stands in the folder's safetensors file, which the graph points into."""
        if name not in self._known:
            value = self.source.tensors[name]
            tensor = TensorProto(name=name, dims=value.shape, data_location=TensorProto.EXTERNAL)
            tensor.data_type = helper.np_dtype_to_tensor_dtype(value.dtype)
            offset, length = self.source.spans[name]
            for key, text in (("location", self.source.name), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(text))
            self.constants.append(tensor)
            self._known.add(name)
        return name

    def linear(self, x: str, name: str) -> str:
        """x (..., I) times the stored matrix (O, I): in fp32, or with int8 weights and int8 activations."""
        if self.precision == "fp32":
            # Folded into a constant when the graph is loaded.
            matrix_OI = self.node("Cast", self.stored(name), to=TensorProto.FLOAT)
            return str(self.node("MatMul", x, self.node("Transpose", matrix_OI, perm=[1, 0])))
        matrix = self.weight(name)
        levels, scale = quantize_matrix(matrix, BLOCK)
        unsigned = levels.view(np.uint8) ^ 128  # -127 to 127 around 128, as `MatMulNBits` wants them
        inputs = (x, self.constant(name + ".q8", unsigned), self.constant(name + ".scale", scale.reshape(-1)))
        outputs_N, inputs_K = matrix.shape
        # Accuracy level 4: activations are rounded to int8 as well, each row by itself.
        options = {"bits": 8, "block_size": BLOCK, "accuracy_level": 4}
        return str(self.node("MatMulNBits", *inputs, domain=CONTRIB, K=inputs_K, N=outputs_N, **options))

    def norm(self, x: str, size: int) -> str:
        ones = self.constant(f"ones_{size}", np.ones(size, np.float32))
        return str(self.node("SimplifiedLayerNormalization", x, ones, axis=-1, epsilon=EPSILON))

    def silu(self, x: str) -> str:
        return str(self.node("QuickGelu", x, domain=CONTRIB, alpha=1.0))

    def add_norm(self, x: str, y: str) -> tuple[str, str]:
        """(norm(x + y), x + y) in one node."""
        ones = self.constant(f"ones_{self.config.width}", np.ones(self.config.width, np.float32))
        names = [f"addnorm_{self._count}", "", "", f"sum_{self._count}"]
        self._count += 1
        kind = "SkipSimplifiedLayerNormalization"
        self.nodes.append(helper.make_node(kind, [x, y, ones], names, domain=CONTRIB, epsilon=EPSILON))
        return names[0], names[3]


def convolution(g: GraphBuilder, mixed: str, state: str, taps_KM: Array) -> tuple[str, str]:
    """Causal depthwise convolution with SiLU: (result (B, T, M), next state (B, K-1, M))."""
    taps = len(taps_KM)
    seen = g.node("Concat", state, mixed, axis=1)
    end, time = g.ints(2**62), g.ints(1)
    total = ""
    for tap in range(taps):
        until = end if tap == taps - 1 else g.ints(tap + 1 - taps)
        part = g.node("Slice", seen, g.ints(tap), until, time)
        part = g.node("Mul", part, g.constant(f"{mixed}.tap_{tap}", taps_KM[tap]))
        total = g.node("Add", total, part) if total else part
    return g.silu(total), str(g.node("Slice", seen, g.ints(1 - taps), end, time))


def recurrence(g: GraphBuilder, x: str, layer: int) -> str:
    """The recurrent mixer of `layer` on a normed x (B, T, D)."""
    config, prefix = g.config, f"blocks.{layer}.mixer."
    heads, keys, values = config.heads, config.key_dim, config.head_dim
    channels = 2 * heads * keys + heads * values
    conv_in = g.input(f"conv_{layer}", TensorProto.FLOAT, "B", config.conv_width - 1, channels)
    memory_in = g.input(f"memory_{layer}", TensorProto.FLOAT, "B", heads, keys, values)

    projected = g.linear(x, prefix + "inputs.weight")
    mixed, gate = g.node("Split", projected, g.ints(channels, heads * values), outputs=2, axis=-1)
    convolved, conv_out = convolution(g, mixed, conv_in, g.weight(prefix + "conv"))
    sizes = g.ints(heads * keys, heads * keys, heads * values)
    query, key, value = g.node("Split", convolved, sizes, outputs=3, axis=-1)
    rate = g.node("MatMul", x, g.constant(prefix + "rate.weight", g.weight(prefix + "rate.weight").T))
    bias = g.constant(prefix + "rate.bias", g.weight(prefix + "rate.bias"))
    speed = g.constant(prefix + "speed", -np.exp(g.weight(prefix + "log_decay")))
    log_decay = g.node("LinearAttentionGate", rate, bias, speed, domain=CONTRIB)
    ones = g.constant(f"ones_{heads}", np.ones(heads, np.float32))
    write = g.node("LinearAttentionGate", rate, bias, ones, domain=CONTRIB)
    spread = g.constant("spread", np.repeat(np.eye(heads, dtype=np.float32), keys, axis=1))
    written = g.node("Mul", key, g.node("MatMul", write, spread))
    inputs = (query, written, value, memory_in, log_decay)
    options = {"update_rule": "gated", "q_num_heads": heads, "kv_num_heads": heads, "scale": keys**-0.5}
    read, memory_out = g.node("LinearAttention", *inputs, outputs=2, domain=CONTRIB, **options)
    skip = g.constant(prefix + "skip", np.repeat(g.weight(prefix + "skip"), values))
    read = g.node("Add", read, g.node("Mul", value, skip))
    normed = g.norm(g.node("Reshape", read, g.ints(0, 0, heads, values)), values)
    normed = g.node("Reshape", normed, g.ints(0, 0, heads * values))
    gated = g.node("Mul", normed, g.silu(gate))
    g.output(f"conv_{layer}_out", conv_out, "B", config.conv_width - 1, channels)
    g.output(f"memory_{layer}_out", memory_out, "B", heads, keys, values)
    return g.linear(gated, prefix + "output.weight")


def attention(g: GraphBuilder, x: str, layer: int) -> str:
    """The attention mixer of `layer` on a normed x (B, T, D): over the ring, then over the tokens fed."""
    config, prefix = g.config, f"blocks.{layer}.mixer."
    heads, size, window = config.heads, config.head_dim, config.window
    keys_in = g.input(f"keys_{layer}", TensorProto.FLOAT, "B", 1, window, size)
    values_in = g.input(f"values_{layer}", TensorProto.FLOAT, "B", 1, window, size)

    projected = g.linear(x, prefix + "inputs.weight")
    both, value = g.node("Split", projected, g.ints((heads + 1) * size, size), outputs=2, axis=-1)
    both = g.norm(g.node("Reshape", both, g.ints(0, 0, heads + 1, size)), size)
    half = size // 2
    turn = np.zeros((size, size), np.float32)  # (left, right) -> (-right, left)
    turn[half:, :half], turn[:half, half:] = -np.eye(half), np.eye(half)
    turned = g.node("Mul", g.node("MatMul", both, g.constant("turn", turn)), "sin")
    rotated = g.node("Add", g.node("Mul", both, "cos"), turned)
    gain = np.concatenate([g.weight(prefix + "gain") * size**-0.5, np.ones((1, 1))]).astype(np.float32)
    scaled = g.node("Mul", rotated, g.constant(prefix + "gain", gain))
    query, key = g.node("Split", scaled, g.ints(heads, 1), outputs=2, axis=2)
    new_keys = g.node("Reshape", key, g.ints(0, 1, -1, size))
    new_values = g.node("Reshape", value, g.ints(0, 1, -1, size))
    ring_score = g.node("FusedMatMul", query, keys_in, domain=CONTRIB, transB=1)
    new_score = g.node("FusedMatMul", query, new_keys, domain=CONTRIB, transB=1)
    score = g.node("Add", g.node("Concat", ring_score, new_score, axis=-1), "bias")
    weight = g.node("Softmax", score, axis=-1)
    last = g.ints(-1)
    on_ring = g.node("Slice", weight, g.ints(0), g.ints(window), last)
    on_new = g.node("Slice", weight, g.ints(window), g.ints(2**62), last)
    mixed = g.node("Add", g.node("MatMul", on_ring, values_in), g.node("MatMul", on_new, new_values))
    g.output(f"keys_{layer}_out", g.node("Reshape", key, g.ints(0, 0, size)), "B", "T", size)
    g.output(f"values_{layer}_out", value, "B", "T", size)
    return g.linear(g.node("Reshape", mixed, g.ints(0, 0, heads * size)), prefix + "output.weight")


def build_graph(config: ModelConfig, source: WeightFile, precision: str) -> onnx.ModelProto:
    """The decode graph of a network in `fp32` or `int8`.

    The embedding table, and in fp32 every matrix, stay in the weights file beside the graph; int8 matrices are
    written into the graph. Raises `ModelError` for a weight that is not finite.
    """
    g = GraphBuilder(config, source, precision)
    tokens = g.input("tokens", TensorProto.INT64, "B", "T")
    take = g.input("take", TensorProto.INT64, "taken")
    if "A" in config.pattern:
        for name in ("cos", "sin"):
            g.input(name, TensorProto.FLOAT, "B", "T", 1, config.head_dim)
        g.input("bias", TensorProto.FLOAT, "B", "T", 1, "W_plus_T")
    # Rows are looked up in the file's fp16 and widened then, which keeps the table at half its size.
    embedded = g.node("Cast", g.node("Gather", g.stored("embedding.weight"), tokens), to=TensorProto.FLOAT)
    stream = g.norm(embedded, config.width)
    normed = g.norm(stream, config.width)
    for layer, kind in enumerate(config.pattern):
        mixed = recurrence(g, normed, layer) if kind == "R" else attention(g, normed, layer)
        normed, stream = g.add_norm(stream, mixed)
        up = g.node("Relu", g.linear(normed, f"blocks.{layer}.up.weight"))
        down = g.linear(g.node("Mul", up, up), f"blocks.{layer}.down.weight")
        normed, stream = g.add_norm(stream, down)
    last = g.node("Gather", normed, take, axis=1)
    g.output("logits", g.linear(last, "embedding.weight"), "B", "taken", config.vocab_size)
    graph = helper.make_graph(g.nodes, "story", g.inputs, g.outputs, g.constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="write-me-a-story")
