"""One optimizer update: what decays, what is clipped, and what happens to numbers that are none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.small_study import Vocabulary

from rlprior.config import RunError
from rlprior.models.presets import ModelConfig
from rlprior.training.update import OptimizerConfig, Updater, build_optimizer


def small_model() -> torch.nn.Module:
    """A matrix, a bias and a norm, all of ones."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    return model


def set_gradients(model: torch.nn.Module, value: float) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)


def adamw_step(weight: float, gradient: float, rate: float, config: OptimizerConfig, decay: float) -> float:
    """The first AdamW update of one number, by the formula of Loshchilov and Hutter 2019, algorithm 2."""
    moment = (1 - config.beta1) * gradient / (1 - config.beta1)
    second = (1 - config.beta2) * gradient**2 / (1 - config.beta2)
    return weight - rate * (moment / (math.sqrt(second) + config.epsilon) + decay * weight)


def test_the_first_update_is_adamw_with_decay_on_matrices_alone() -> None:
    model, config = small_model(), OptimizerConfig(weight_decay=0.3, max_gradient_norm=1e9, epsilon=0.1)
    updater = Updater(model, config)
    set_gradients(model, 0.5)
    norm = updater.apply(1.0, 0.01, step=1)
    assert norm == pytest.approx(0.5 * math.sqrt(6 + 2 + 2 + 2))
    for name, parameter in model.named_parameters():
        decay = 0.3 if name == "0.weight" else 0.0
        expected = adamw_step(1.0, 0.5, 0.01, config, decay)
        # float32
        torch.testing.assert_close(parameter, torch.full_like(parameter, expected), rtol=1e-6, atol=0)


def test_gradients_are_scaled_down_to_the_norm_and_never_up() -> None:
    # a large epsilon makes the update nearly proportional to the gradient, so that its scale shows
    config = OptimizerConfig(weight_decay=0.0, max_gradient_norm=1.0, epsilon=1.0)
    for value, expected_gradient in ((4.0, 1 / math.sqrt(12)), (0.01, 0.01)):
        model = small_model()
        updater = Updater(model, config)
        set_gradients(model, value)
        norm = updater.apply(1.0, 0.5, step=1)
        assert norm == pytest.approx(value * math.sqrt(12))  # before clipping
        expected = adamw_step(1.0, expected_gradient, 0.5, config, 0.0)
        for parameter in model.parameters():
            torch.testing.assert_close(parameter, torch.full_like(parameter, expected), rtol=1e-5, atol=0)


def test_gradients_are_dropped_after_each_update() -> None:
    model = small_model()
    updater = Updater(model, OptimizerConfig())
    for loss, gradient in ((1.0, 0.5), (math.nan, 0.5), (1.0, math.inf)):
        set_gradients(model, gradient)
        updater.apply(loss, 0.1, step=1)
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("loss", "gradient"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, -math.inf)]
)
def test_a_step_that_is_not_finite_moves_nothing(loss: float, gradient: float) -> None:
    model = small_model()
    updater = Updater(model, OptimizerConfig())
    set_gradients(model, 0.5)
    updater.apply(1.0, 0.1, step=1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    moments = [value.clone() for state in updater.optimizer.state.values() for value in state.values()]
    set_gradients(model, gradient)
    updater.apply(loss, 0.1, step=2)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    after = [value for state in updater.optimizer.state.values() for value in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
    assert (updater.num_skipped, updater.num_skipped_in_a_row) == (1, 1)


def test_one_number_that_is_none_is_enough_to_skip() -> None:
    model = small_model()
    updater = Updater(model, OptimizerConfig())
    set_gradients(model, 0.5)
    gradient = next(model.parameters()).grad
    assert gradient is not None
    gradient[1, 2] = math.nan
    assert math.isnan(updater.apply(1.0, 0.1, step=1))
    assert all((parameter == 1).all() for parameter in model.parameters())


def test_the_third_in_a_row_ends_the_run() -> None:
    model = small_model()
    updater = Updater(model, OptimizerConfig())

    def step(loss: float, number: int) -> None:
        set_gradients(model, 0.5)
        updater.apply(loss, 0.1, step=number)

    for number, loss in enumerate((math.nan, math.nan, 1.0, math.nan, math.nan), start=1):
        step(loss, number)
    assert (updater.num_skipped, updater.num_skipped_in_a_row) == (4, 2)
    with pytest.raises(
        RunError,
        match=r"step 6: .* not finite 3 times in a row \(loss inf, gradient norm 1\.7.*learning rate",
    ):
        step(math.inf, 6)


def test_the_rate_is_that_of_the_step() -> None:
    model = small_model()
    updater = Updater(model, OptimizerConfig(weight_decay=0.0))
    set_gradients(model, 0.5)
    updater.apply(1.0, 0.0, step=1)
    assert all((parameter == 1).all() for parameter in model.parameters())
    set_gradients(model, 0.5)
    updater.apply(1.0, 0.25, step=2)
    # Adam's update of a constant gradient is the rate itself
    for parameter in model.parameters():
        torch.testing.assert_close(parameter, torch.full_like(parameter, 0.75))


def test_frozen_parameters_and_models_without_vectors_are_fine() -> None:
    model = torch.nn.Linear(3, 2, bias=False)
    model.weight.requires_grad_(False)
    matrices, vectors = build_optimizer(
        torch.nn.Sequential(model, small_model()), OptimizerConfig()
    ).param_groups
    assert [p.shape for p in matrices["params"]] == [(2, 3)]
    assert len(vectors["params"]) == 3
    only_matrix = torch.nn.Linear(3, 2, bias=False)
    updater = Updater(only_matrix, OptimizerConfig())
    set_gradients(only_matrix, 1.0)
    updater.apply(1.0, 0.1, step=1)


def test_qwens_norms_do_not_decay() -> None:
    from rlprior.models.causal_lm import build_model

    model = build_model(ModelConfig(num_layers=1), Vocabulary(8), max_positions=8, seed=0)
    matrices, vectors = build_optimizer(model, OptimizerConfig()).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert all("norm" not in names[id(parameter)] for parameter in matrices["params"])
    assert all("norm" in names[id(parameter)] for parameter in vectors["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta1": 1.0}, "beta1 must be at least 0 and below 1, not 1.0"),
        ({"beta2": -0.1}, "beta2 must be at least 0 and below 1, not -0.1"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or more and finite, not -1.0"),
        ({"weight_decay": math.nan}, "weight_decay must be 0 or more and finite, not nan"),
        ({"max_gradient_norm": 0.0}, "max_gradient_norm and epsilon must be above 0"),
        ({"epsilon": math.nan}, "max_gradient_norm and epsilon must be above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**changes)
