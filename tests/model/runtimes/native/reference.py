"""What the decoder in C computes, a second time: in numpy, one token after the other, without its tricks.

Quantised as there (int8 weights and inputs in blocks of 64), all else in float64. It shares nothing with the C side
but `quantize_matrix`, which is tested by itself. So it differs by rounding alone, and where that tips an input to the
next whole number, by that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from model.architecture.folder import ModelConfig
from model.runtimes.native.library import quantize_matrix

Array = npt.NDArray[Any]


def product(weight_OI: Array, x_I: Array, most: int = 127) -> Array:
    """The quantised product of one row, whose sums of whole numbers are exact."""
    levels_OBI, scale_OB = quantize_matrix(weight_OI)
    x_BI = np.pad(x_I.astype(np.float32), (0, -len(x_I) % 64)).reshape(-1, 64)
    top_B = np.abs(x_BI).max(1)
    levels_BI = np.rint(x_BI * (np.float32(most) / np.where(top_B > 0, top_B, 1))[:, None]).astype(np.int64)
    whole_OB = np.einsum("obi,bi->ob", levels_OBI.astype(np.int64), levels_BI)
    total: Array = (whole_OB * (scale_OB.astype(np.float64) * (top_B / np.float32(most)))).sum(1)
    return total


def rms_norm(x: Array) -> Array:
    normed: Array = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    return normed


def silu(x: Array) -> Array:
    value: Array = x / (1 + np.exp(-x))
    return value


class Reference:
    """A network and one story; `step` takes a token and gives the logits of the next."""

    def __init__(self, config: ModelConfig, weights: dict[str, Array]) -> None:
        self.config = config
        self.weights = {name: value.astype(np.float32) for name, value in weights.items()}
        self.tokens: list[int] = []
        self.past: dict[int, list[Any]] = {}
        self.memory: dict[int, Array] = {}

    def step(self, token: int) -> Array:
        if token == 0:
            self.tokens, self.past, self.memory = [], {}, {}
        self.tokens.append(token)
        x = rms_norm(self.weights["embedding.weight"][token].astype(np.float64))
        for layer, kind in enumerate(self.config.pattern):
            mix = self.recurrence if kind == "R" else self.attention
            x = x + product(self.weights[f"blocks.{layer}.mixer.output.weight"], mix(layer, rms_norm(x)))
            up = product(self.weights[f"blocks.{layer}.up.weight"], rms_norm(x))
            x = x + product(self.weights[f"blocks.{layer}.down.weight"], np.maximum(up, 0) ** 2, 255)
        return product(self.weights["embedding.weight"], rms_norm(x))

    def recurrence(self, layer: int, x: Array) -> Array:
        heads, keys, values = self.config.heads, self.config.key_dim, self.config.head_dim
        names = ("conv", "rate.weight", "rate.bias", "log_decay", "skip")
        part = {name: self.weights[f"blocks.{layer}.mixer.{name}"].astype(np.float64) for name in names}
        projected = product(self.weights[f"blocks.{layer}.mixer.inputs.weight"], x)
        channels = 2 * heads * keys + heads * values
        seen = self.past.setdefault(layer, [np.zeros(channels)] * (self.config.conv_width - 1))
        seen.append(projected[:channels])
        mixed = silu((np.array(seen) * part["conv"]).sum(0))
        seen.pop(0)
        query = mixed[: heads * keys].reshape(heads, keys) * keys**-0.5
        key = mixed[heads * keys : 2 * heads * keys].reshape(heads, keys)
        value = mixed[2 * heads * keys :].reshape(heads, values)
        write = np.log1p(np.exp(part["rate.weight"] @ x + part["rate.bias"]))
        decay = np.exp(-write * np.exp(part["log_decay"]))
        memory = self.memory.get(layer, np.zeros((heads, keys, values))) * decay[:, None, None]
        memory = memory + (key * write[:, None])[:, :, None] * value[:, None, :]
        self.memory[layer] = memory
        read = np.einsum("hn,hnp->hp", query, memory) + part["skip"] * value
        return rms_norm(read).reshape(-1) * silu(projected[channels:])

    def attention(self, layer: int, x: Array) -> Array:
        heads, size, position = self.config.heads, self.config.head_dim, len(self.tokens) - 1
        projected = product(self.weights[f"blocks.{layer}.mixer.inputs.weight"], x).reshape(-1, size)
        angle = position * self.config.rope_base ** (-np.arange(size // 2) / (size // 2))
        normed = rms_norm(projected[: heads + 1])
        left, right = normed[:, : size // 2], normed[:, size // 2 :]
        turned = np.concatenate(
            [left * np.cos(angle) - right * np.sin(angle), right * np.cos(angle) + left * np.sin(angle)], axis=1
        )
        pairs = self.past.setdefault(layer, [])
        pairs.append((turned[heads], projected[heads + 1]))
        seen_keys, seen_values = (np.array(part) for part in zip(*pairs[-self.config.window :], strict=True))
        gain = self.weights[f"blocks.{layer}.mixer.gain"].astype(np.float64)
        score = (turned[:heads] * gain) @ seen_keys.T * size**-0.5
        weight = np.exp(score - score.max(1, keepdims=True))
        mean: Array = (weight / weight.sum(1, keepdims=True)) @ seen_values
        return mean.reshape(-1)
