"""Optimisers: parameter groups, Muon, the learning-rate schedule and the average of the weights."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from model.architecture.folder import ModelConfig
from model.architecture.network import StoryNetwork
from tests.training.runs import MODEL
from training.trainer.optim import (
    Average,
    Optimizers,
    PreciseMuon,
    group_parameters,
    has_bf16,
    orthogonalize,
    rate_share,
)
from training.trainer.recipe import OptimizerRecipe, load_recipe, preset_names


def network(config: ModelConfig = MODEL) -> StoryNetwork:
    torch.manual_seed(0)
    return StoryNetwork(config)


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def set_gradients(net: StoryNetwork, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=rng)


def steps(net: StoryNetwork, optimizers: Optimizers, seeds: range) -> None:
    for seed in seeds:
        set_gradients(net, seed)
        optimizers.set_rate(1.0)
        optimizers.step()


@pytest.mark.parametrize("preset", preset_names())
def test_the_groups_hold_every_parameter_exactly_once(preset: str) -> None:
    net = StoryNetwork(load_recipe(preset).model)
    groups = group_parameters(net)
    grouped = [id(parameter) for group in groups.values() for parameter in group]
    assert sorted(grouped) == sorted(id(parameter) for parameter in net.parameters())
    assert len(set(grouped)) == len(grouped)


def test_the_groups_are_what_their_names_say() -> None:
    net = network()
    role = {id(parameter): name for name, group in group_parameters(net).items() for parameter in group}
    by_name = {name: role[id(parameter)] for name, parameter in net.named_parameters()}
    assert by_name["embedding.weight"] == "table"
    assert {name for name, role in by_name.items() if role == "matrix"} == {
        f"blocks.{block}.{part}.weight" for block in (0, 1) for part in ("mixer.inputs", "mixer.output", "up", "down")
    }
    assert by_name["blocks.0.mixer.conv"] == by_name["blocks.0.mixer.rate.weight"] == "vector"


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_the_optimisers_hold_every_parameter_exactly_once(name: str) -> None:
    net = network()
    optimizers = Optimizers(net, OptimizerRecipe(name=name))  # type: ignore[arg-type]
    held = [id(p) for part in optimizers.parts for group in part.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in net.parameters())


def test_muon_moves_a_matrix_by_a_nearly_orthogonal_update() -> None:
    net = network()
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    optimizers = Optimizers(net, OptimizerRecipe(matrix_lr=1.0, weight_decay=0.0))
    steps(net, optimizers, range(1))
    matrices = {id(parameter) for parameter in group_parameters(net)["matrix"]}
    for name, parameter in net.named_parameters():
        update = (parameter.detach() - before[name]).double()
        if id(parameter) in matrices:
            rows, columns = update.shape
            singular = torch.linalg.svdvals(update) / max(1.0, rows / columns) ** 0.5
            # Five Newton-Schulz steps with Jordan's coefficients end between 0.68 and 1.13, in bf16 a little off.
            assert 0.6 < float(singular.min()) <= float(singular.max()) < 1.25, name
            gradient = parameter.grad
            assert gradient is not None
            # An orthogonal matrix that is nearest to the gradient's downhill direction, and no other one.
            left, _, right = torch.linalg.svd(-gradient.double(), full_matrices=False)
            cosine = torch.nn.functional.cosine_similarity((left @ right).flatten(), update.flatten(), dim=0)
            assert float(cosine) > 0.95, name


def test_decay_touches_the_matrices_and_the_embedding_each_by_its_own_share() -> None:
    net = network()
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    recipe = OptimizerRecipe(matrix_lr=0.5, weight_decay=0.2, table_lr=0.4, table_decay=0.3)
    optimizers = Optimizers(net, recipe)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers.step()
    groups = group_parameters(net)
    factors = {id(parameter): 1 - 0.5 * 0.2 for parameter in groups["matrix"]}
    factors |= {id(parameter): 1 - 0.4 * 0.3 for parameter in groups["table"]}
    for name, parameter in net.named_parameters():
        factor = factors.get(id(parameter), 1.0)
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_the_rate_scales_each_group_from_its_own_peak() -> None:
    recipe = OptimizerRecipe(matrix_lr=0.3, table_lr=0.2, vector_lr=0.1)
    optimizers = Optimizers(network(), recipe)
    optimizers.set_rate(0.25)
    optimizers.set_rate(0.5)  # of the peak, not of what was set before
    rates = [group["lr"] for part in optimizers.parts for group in part.param_groups]
    assert rates == [0.15, 0.1, 0.05]


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_restored_state_goes_on_as_if_nothing_had_been(name: str) -> None:
    recipe = OptimizerRecipe(name=name)  # type: ignore[arg-type]
    whole = network()
    optimizers = Optimizers(whole, recipe)
    steps(whole, optimizers, range(3))
    restored = copy.deepcopy(whole)
    again = Optimizers(restored, recipe)
    again.load_state_dict(through_a_file(optimizers.state_dict()))
    steps(whole, optimizers, range(3, 6))
    steps(restored, again, range(3, 6))
    for one, other in zip(whole.parameters(), restored.parameters(), strict=True):
        assert torch.equal(one, other)
    forgetful = copy.deepcopy(whole)
    steps(forgetful, Optimizers(forgetful, recipe), range(6, 7))
    steps(whole, optimizers, range(6, 7))
    assert any(not torch.equal(a, b) for a, b in zip(whole.parameters(), forgetful.parameters(), strict=True))


def test_a_restored_state_does_not_bring_back_the_old_rates() -> None:
    net = network()
    old = Optimizers(net, OptimizerRecipe(matrix_lr=0.5, weight_decay=0.5, momentum=0.5, beta1=0.5))
    steps(net, old, range(1))
    new = Optimizers(net, OptimizerRecipe(matrix_lr=0.01, weight_decay=0.1, momentum=0.9, beta1=0.8))
    new.load_state_dict(old.state_dict())
    new.set_rate(1.0)
    muon, adamw = (part.param_groups for part in new.parts)
    assert (muon[0]["lr"], muon[0]["weight_decay"], muon[0]["momentum"]) == (0.01, 0.1, 0.9)
    assert adamw[0]["betas"][0] == 0.8


def test_the_rate_warms_up_stays_and_comes_down_in_a_line() -> None:
    recipe = OptimizerRecipe(warmup_steps=10, warmdown=0.4, final_lr=0.1)
    total = 100
    shares = [rate_share(recipe, step, step / total) for step in range(total + 1)]
    assert shares[:11] == pytest.approx([(step + 1) / 11 for step in range(11)])
    assert shares[10:61] == pytest.approx([1.0] * 51)
    assert shares[60:] == pytest.approx([1 - 0.9 * step / 40 for step in range(41)])
    assert shares[total] == pytest.approx(0.1)


def test_no_warm_up_and_no_warm_down_is_a_constant_rate() -> None:
    recipe = OptimizerRecipe(warmup_steps=0, warmdown=0.0)
    assert [rate_share(recipe, step, step / 10) for step in range(11)] == [1.0] * 11


@given(
    warmup=st.integers(0, 50),
    warmdown=st.floats(0, 1),
    final=st.floats(0, 1),
    step=st.integers(0, 10**6),
    progress=st.floats(0, 1.5),
)
def test_the_rate_is_always_a_share_of_the_peak(
    warmup: int, warmdown: float, final: float, step: int, progress: float
) -> None:
    recipe = OptimizerRecipe(warmup_steps=warmup, warmdown=warmdown, final_lr=final)
    assert 0.0 <= rate_share(recipe, step, progress) <= 1.0 + 1e-9


JORDAN = (3.4445, -4.7750, 2.0315)


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), seed=st.integers(0, 999), scale=st.floats(1e-3, 1e3))
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
def test_only_where_bf16_is_emulated_its_own_products_are_used(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    # A machine is of one kind only.
    monkeypatch.setattr("training.trainer.optim.has_bf16", lambda device: fast)
    (muon, _) = Optimizers(StoryNetwork(MODEL), OptimizerRecipe()).parts
    assert type(muon) is (torch.optim.Muon if fast else PreciseMuon)


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_is_what_the_processor_says_it_can(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx2": True, "avx512_bf16": fast})
    assert has_bf16(torch.device("cpu")) is fast


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
    again = Average(network, 0.9)
    again.load_state_dict(through_a_file(average.state_dict()))
    put(network, 7.0)
    average.update()
    again.update()
    assert averaged(network, again) == averaged(network, average) != 7.0
