from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.architecture.network import StoryNetwork
from tests.training.runs import MODEL
from training.trainer.optim import Optimizers, PreciseMuon, has_bf16, orthogonalize
from training.trainer.recipe import OptimizerRecipe

JORDAN = (3.4445, -4.7750, 2.0315)


@given(
    rows=st.integers(1, 40), columns=st.integers(1, 40), seed=st.integers(0, 999), scale=st.floats(1e-3, 1e3)
)
def test_the_singular_values_come_near_one_and_their_vectors_stay(
    rows: int, columns: int, seed: int, scale: float
) -> None:
    rng = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=rng, dtype=torch.float64) * scale
    result = orthogonalize(matrix, JORDAN, 5, 1e-7)
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    # The same polynomial of each singular value, computed one by one.
    a, b, c = JORDAN
    value = singular / singular.norm()
    for _ in range(5):
        value = a * value + b * value**3 + c * value**5
    torch.testing.assert_close(result, left @ value.diag() @ right, rtol=1e-6, atol=1e-6)
    assert float(value[singular > 0.02 * singular.norm()].min()) > 0.6
    assert float(value.max()) < 1.25


def test_a_matrix_of_zeros_stays_one() -> None:
    assert torch.equal(orthogonalize(torch.zeros(4, 3), JORDAN, 5, 1e-7), torch.zeros(4, 3))


@pytest.mark.parametrize("nesterov", [True, False])
def test_it_takes_the_steps_of_torchs_own_up_to_the_rounding_of_bf16(nesterov: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    shapes = ((24, 8), (8, 24), (16, 16))
    theirs = [torch.nn.Parameter(torch.randn(shape, generator=rng)) for shape in shapes]
    ours = [torch.nn.Parameter(matrix.detach().clone()) for matrix in theirs]
    start = [matrix.detach().clone() for matrix in ours]
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
    one, other = torch.optim.Muon(theirs, **options), PreciseMuon(ours, **options)  # type: ignore[arg-type]
    for _ in range(4):
        for first, second in zip(theirs, ours, strict=True):
            first.grad = torch.randn(first.shape, generator=rng)
            second.grad = first.grad.clone()
        one.step()
        other.step()
    for first, second, before in zip(theirs, ours, start, strict=True):
        moved = float((second - before).detach().abs().max())
        assert float((first - second).detach().abs().max()) < 0.03 * moved


def test_a_matrix_without_a_gradient_stays_as_it_is() -> None:
    still, moving = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    moving.grad = torch.ones(2, 2)
    PreciseMuon([still, moving], lr=0.1).step()
    assert torch.equal(still, torch.ones(2, 2))
    assert not torch.equal(moving, torch.ones(2, 2))


@pytest.mark.parametrize("fast", [True, False])
def test_only_where_bf16_is_emulated_its_own_products_are_used(
    monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    # A machine is of one kind only.
    monkeypatch.setattr("training.trainer.optim.has_bf16", lambda device: fast)
    (muon, _) = Optimizers(StoryNetwork(MODEL), OptimizerRecipe()).parts
    assert type(muon) is (torch.optim.Muon if fast else PreciseMuon)


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_is_what_the_processor_says_it_can(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx2": True, "avx512_bf16": fast})
    assert has_bf16(torch.device("cpu")) is fast
