from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.architecture.config import ModelConfig
from model.errors import ModelError

SIZE = st.integers(1, 10_000)


@given(st.text("RA", min_size=1, max_size=30), SIZE, SIZE, SIZE, st.floats(1, 1e9))
def test_a_config_survives_json(pattern: str, width: int, window: int, half: int, base: float) -> None:
    config = ModelConfig(pattern=pattern, width=width, window=window, head_dim=2 * half, rope_base=base)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("width", 0, "at least 1, got 0"),
        ("width", 1.5, "whole number"),
        ("heads", True, "whole number"),
        ("vocab_size", "many", "whole number"),
        ("window", None, "whole number"),
        ("head_dim", 33, "must be even"),
        ("pattern", "", "letters R and A"),
        ("pattern", "RRx", "letters R and A, one a layer, got 'RRx'"),
        ("pattern", ["R", "A"], "letters R and A"),
        ("pattern", 5, "letters R and A"),
        ("rope_base", 0, "at least 1"),
        ("rope_base", "big", "at least 1"),
        ("rope_base", float("nan"), "at least 1"),
        ("rope_base", float("inf"), "at least 1"),
    ],
)
def test_a_wrong_size_is_named_with_what_is_allowed(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(ModelError, match=rf"model\.{name}.*{allowed}"):
        ModelConfig.from_dict({name: value})


def test_an_unknown_name_is_told_with_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"model\.depth is not known; allowed are chunk, .*window"):
        ModelConfig.from_dict({"width": 64, "depth": 6})
