from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from training.trainer.optim import Average


def one_weight(value: float) -> nn.Linear:
    network = nn.Linear(1, 1, bias=False).double()
    put(network, value)
    return network


def put(network: nn.Linear, value: float) -> None:
    with torch.no_grad():
        network.weight.fill_(value)


def averaged(network: nn.Linear, average: Average) -> float:
    with average.applied():
        return float(network.weight.detach())


@given(values=st.lists(st.floats(-100, 100), min_size=1, max_size=60), keep=st.sampled_from([0.5, 0.9, 0.99]))
def test_it_is_the_weighted_mean_of_all_weights_seen(values: list[float], keep: float) -> None:
    network = one_weight(values[0])
    average = Average(network, keep)
    shares = [1.0]
    for count, value in enumerate(values):
        put(network, value)
        average.update()
        kept = min(keep, (1 + count) / (10 + count))
        shares = [share * kept for share in shares] + [1 - kept]
    assert sum(shares) == pytest.approx(1.0)
    expected = sum(share * value for share, value in zip(shares, [values[0], *values], strict=True))
    assert averaged(network, average) == pytest.approx(expected, abs=1e-9)


def test_the_weights_it_began_with_are_soon_forgotten() -> None:
    network = one_weight(1000.0)
    average = Average(network, 0.999)
    put(network, 1.0)
    for _ in range(50):
        average.update()
    assert averaged(network, average) == pytest.approx(1.0, abs=1e-3)


def test_weights_that_jump_about_a_point_are_averaged_to_it() -> None:
    network = one_weight(0.0)
    average = Average(network, 0.99)
    rng = torch.Generator().manual_seed(0)
    for _ in range(1000):
        put(network, 3.0 + float(torch.randn(1, generator=rng)))
        average.update()
    assert abs(averaged(network, average) - 3.0) < 0.25 < 1.0, "a tenth of the spread of one step's weights"


def test_the_network_gets_its_own_weights_back_bit_for_bit_even_after_an_error() -> None:
    network = nn.Linear(8, 8)
    average = Average(network, 0.5)
    held = network.weight
    with torch.no_grad():
        held.mul_(1.1)
    before = held.detach().clone()

    def interrupted() -> None:
        with average.applied():
            assert not torch.equal(held, before)
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        interrupted()
    assert torch.equal(held, before)
    assert network.weight is held, "optimisers hold this very tensor"


def test_a_restored_average_goes_on_as_if_nothing_had_been() -> None:
    network = one_weight(1.0)
    average = Average(network, 0.9)
    for value in (2.0, 5.0, 3.0):
        put(network, value)
        average.update()
    file = io.BytesIO()
    torch.save(average.state_dict(), file)
    file.seek(0)
    again = Average(network, 0.9)
    again.load_state_dict(torch.load(file, weights_only=True))
    put(network, 7.0)
    average.update()
    again.update()
    assert averaged(network, again) == averaged(network, average) != 7.0
