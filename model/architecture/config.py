"""The network's shape, as a small frozen record that travels with every checkpoint.

A block pattern is a string with one letter a layer: `R` is a gated recurrence with a constant-size state, `A`
is attention over a sliding window. `"RRARRA"` is the hybrid that we ship (Griffin, De et al. 2024: two recurrent
layers to one of local attention); `"AAAAAA"` and `"RRRRRR"` are its controls, and nothing else changes.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from model.errors import ModelError

END_ID = 0
"""The token that stands before every story; its prediction ends the story."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes of one network. Raises `ModelError` when they do not fit together."""

    vocab_size: int = 4096
    width: int = 256
    """D: size of the residual stream."""
    pattern: str = "RRARRA"
    """One letter a layer: R recurrence, A attention."""
    mlp_width: int = 896
    """Hidden size of the ReLU² MLP that follows each mixer."""
    heads: int = 4
    """H: heads of the recurrence and query heads of attention, which all share one key and value head."""
    head_dim: int = 64
    """P: values a head."""
    key_dim: int = 32
    """N: keys a head of the recurrence; its state is N x P a head."""
    conv_width: int = 4
    """Taps of the causal convolution in front of the recurrence."""
    window: int = 256
    """W: tokens that attention sees, the present one included."""
    chunk: int = 64
    """Length of the chunks in which the recurrence is trained in parallel; changes no result."""
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if field.name not in ("pattern", "rope_base") and not (whole and value >= 1):
                raise ModelError(f"model.{field.name} must be a whole number of at least 1, got {value!r}")
        if not isinstance(self.pattern, str) or not self.pattern or set(self.pattern) - set("RA"):
            raise ModelError(f"model.pattern must be letters R and A, one a layer, got {self.pattern!r}")
        if isinstance(self.rope_base, bool) or not (
            isinstance(self.rope_base, int | float) and 1 <= self.rope_base < math.inf
        ):
            raise ModelError(f"model.rope_base must be a number of at least 1, got {self.rope_base!r}")
        if self.head_dim % 2:
            raise ModelError(f"model.head_dim must be even for rotary positions, got {self.head_dim}")

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The reverse of `as_dict`; an unknown name is an error that says which are known."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ModelError(f"model.{unknown[0]} is not known; allowed are {', '.join(sorted(known))}")
        return cls(**values)
