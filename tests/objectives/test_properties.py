"""What must not matter, does not: chunks, order, padding, splits, a constant added to the logits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.objectives.conftest import PATHS

from rlprior.objectives import (
    CrossEntropy,
    DynamicFineTuning,
    Focal,
    LabelSmoothing,
    RewardShaping,
    SampledReward,
    chunk_sizes,
    linear_shaped_cross_entropy,
)

finite = st.floats(-2, 2, allow_nan=False)
shapings = st.builds(
    RewardShaping,
    beta=st.floats(-0.95, 3),
    head_reward=finite,
    tail_reward=finite,
    top_k=st.integers(1, 40),
)
objectives = st.one_of(
    shapings,
    st.builds(LabelSmoothing, smoothing=st.floats(0, 0.99)),
    st.builds(Focal, gamma=st.floats(0, 5)),
    st.just(CrossEntropy()),
    st.just(DynamicFineTuning()),
)
seeds = st.integers(0, 2**20)
paths = st.sampled_from(PATHS)
quick = settings(max_examples=40, deadline=None, derandomize=True)

# Reordered float64 sums of some hundred terms whose size is up to a thousand times that of the result.
TOLERANCE = 1e-11


@given(objective_=objectives, seed=seeds, path=paths)
@quick
def test_any_settings_match_the_oracle(bench, objective_, seed, path):
    inputs = bench.make_inputs(seed=seed, n=6, v=17, d=4)
    expected = bench.oracle(objective_, inputs, "sum", 1.0)
    bench.assert_agree(bench.compute(path, objective_, inputs, "sum"), expected, TOLERANCE)


@given(objective_=objectives, seed=seeds, rows=st.integers(1, 30), elements=st.integers(1, 400))
@quick
def test_chunks_do_not_matter(bench, objective_, seed, rows, elements):
    inputs = bench.make_inputs(seed=seed)
    whole = bench.compute("chunked", objective_, inputs, "sum")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunk_sizes, "CPU_CHUNK_ROWS", rows)
        patch.setattr(chunk_sizes, "CPU_BLOCK_ELEMENTS", elements)
        parts = bench.compute("chunked", objective_, inputs, "sum")
        per_token = bench.compute("chunked", objective_, inputs, "none")
    bench.assert_agree(parts, whole, TOLERANCE)
    bench.assert_close(per_token.weight_gradient, whole.weight_gradient, TOLERANCE, "recomputed gradient")
    for field in dataclasses.fields(parts.metrics):
        torch.testing.assert_close(
            getattr(parts.metrics, field.name), getattr(whole.metrics, field.name), equal_nan=True
        )


def test_chunks_do_not_change_the_draws(bench):
    sampled = SampledReward(beta=0.5, head_reward=0.3, tail_reward=-0.3, top_k=4, num_samples=4)
    inputs = bench.make_inputs()
    whole = bench.compute("chunked", sampled, inputs, "none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunk_sizes, "CPU_CHUNK_ROWS", 5)
        patch.setattr(chunk_sizes, "CPU_BLOCK_ELEMENTS", 74)
        bench.assert_agree(bench.compute("chunked", sampled, inputs, "none"), whole, TOLERANCE)


@given(objective_=objectives, seed=seeds, path=paths)
@quick
def test_order_of_the_rows_does_not_matter(bench, objective_, seed, path):
    inputs = bench.make_inputs(seed=seed)
    order = torch.randperm(len(inputs.targets), generator=torch.Generator().manual_seed(seed))
    shuffled = bench.inputs(
        inputs.hidden[order], inputs.weight, inputs.targets[order], inputs.token_weights[order]
    )
    expected = bench.compute(path, objective_, inputs, "none")
    actual = bench.compute(path, objective_, shuffled, "none")
    bench.assert_close(actual.loss, expected.loss[order], TOLERANCE, "loss")
    bench.assert_close(
        actual.hidden_gradient, expected.hidden_gradient[order], TOLERANCE, "gradient of hidden"
    )
    bench.assert_close(actual.weight_gradient, expected.weight_gradient, TOLERANCE, "gradient of weight")


@given(objective_=objectives, seed=seeds, path=paths, ties=st.booleans())
@quick
def test_order_of_the_vocabulary_does_not_matter(bench, objective_, seed, path, ties):
    inputs = bench.make_inputs(seed=seed)
    if ties:
        inputs = dataclasses.replace(inputs, hidden=inputs.hidden.round(), weight=inputs.weight.round())
    order = torch.randperm(37, generator=torch.Generator().manual_seed(seed))
    places = torch.argsort(order)
    targets = torch.where(inputs.targets == -100, -100, places[inputs.targets.clamp_min(0)])
    shuffled = dataclasses.replace(inputs, weight=inputs.weight[order], targets=targets)
    expected = bench.compute(path, objective_, inputs, "sum")
    actual = bench.compute(path, objective_, shuffled, "sum")
    bench.assert_close(actual.loss, expected.loss, TOLERANCE, "loss")
    bench.assert_close(actual.hidden_gradient, expected.hidden_gradient, TOLERANCE, "gradient of hidden")
    bench.assert_close(
        actual.weight_gradient, expected.weight_gradient[order], TOLERANCE, "gradient of weight"
    )
    assert torch.equal(actual.metrics.target_rank.nan_to_num(0), expected.metrics.target_rank.nan_to_num(0))


@given(objective_=objectives, seed=seeds, path=paths, padding=st.integers(1, 50))
@quick
def test_ignored_positions_are_padding(bench, objective_, seed, path, padding):
    inputs = bench.make_inputs(seed=seed)
    padded = bench.inputs(
        torch.cat([inputs.hidden, torch.full((padding, 5), 7.0, dtype=torch.float64)]),
        inputs.weight,
        torch.cat([inputs.targets, torch.full((padding,), -100)]),
        torch.cat([inputs.token_weights, torch.ones(padding, dtype=torch.float64)]),
    )
    expected = bench.compute(path, objective_, inputs, "mean")
    actual = bench.compute(path, objective_, padded, "mean")
    bench.assert_close(actual.loss, expected.loss, TOLERANCE, "loss")
    bench.assert_close(actual.hidden_gradient[:23], expected.hidden_gradient, TOLERANCE, "gradient of hidden")
    bench.assert_close(actual.weight_gradient, expected.weight_gradient, TOLERANCE, "gradient of weight")


@given(objective_=objectives, seed=seeds, path=paths, cut=st.integers(0, 23))
@quick
def test_sums_over_micro_batches_add_up(bench, objective_, seed, path, cut):
    inputs = bench.make_inputs(seed=seed)
    whole = bench.compute(path, objective_, inputs, "sum")
    first, second = (
        bench.compute(
            path,
            objective_,
            bench.inputs(
                inputs.hidden[part], inputs.weight, inputs.targets[part], inputs.token_weights[part]
            ),
            "sum",
        )
        for part in (slice(None, cut), slice(cut, None))
    )
    bench.assert_close(first.loss + second.loss, whole.loss, TOLERANCE, "loss")
    hidden_gradient = torch.cat([first.hidden_gradient, second.hidden_gradient])
    bench.assert_close(hidden_gradient, whole.hidden_gradient, TOLERANCE, "gradient of hidden")
    weight_gradient = first.weight_gradient + second.weight_gradient
    bench.assert_close(weight_gradient, whole.weight_gradient, TOLERANCE, "gradient of weight")


@given(objective_=objectives, seed=seeds, path=paths, shift=st.integers(-1000, 1000))
@quick
def test_a_constant_added_to_the_logits_does_not_matter(bench, objective_, seed, path, shift):
    # The constant enters through one more hidden unit; the logits lose three of sixteen digits to it.
    inputs = bench.make_inputs(seed=seed)
    constant = torch.full((23, 1), float(shift), dtype=torch.float64)
    shifted = dataclasses.replace(
        inputs,
        hidden=torch.cat([inputs.hidden, constant], 1),
        weight=torch.cat([inputs.weight, torch.ones(37, 1, dtype=torch.float64)], 1),
    )
    expected = bench.compute(path, objective_, inputs, "sum")
    actual = bench.compute(path, objective_, shifted, "sum")
    bench.assert_close(actual.loss, expected.loss, 1e-9, "loss")
    bench.assert_close(actual.hidden_gradient[:, :5], expected.hidden_gradient, 1e-9, "gradient of hidden")


def test_token_weights_are_factors_and_the_mean_ignores_them(bench, objective, path):
    inputs = bench.make_inputs()
    ones = dataclasses.replace(inputs, token_weights=torch.ones_like(inputs.token_weights))
    plain = bench.compute(path, objective, ones, "none")
    weighted = bench.compute(path, objective, inputs, "none")
    bench.assert_close(weighted.loss, plain.loss * inputs.token_weights, 1e-15, "loss")
    mean = bench.compute(path, objective, inputs, "mean")
    bench.assert_close(
        mean.loss, weighted.loss.sum() / int((inputs.targets != -100).sum()), 1e-13, "mean loss"
    )


def test_leading_dimensions_are_flattened_and_restored(bench, objective):
    inputs = bench.make_inputs(n=24)
    flat = bench.compute("chunked", objective, inputs, "none")
    hidden = inputs.hidden.T.contiguous().T.unflatten(0, (2, 3, 4))  # nor is it contiguous
    loss, metrics = linear_shaped_cross_entropy(
        hidden,
        inputs.weight,
        inputs.targets.view(2, 3, 4),
        objective,
        token_weights=inputs.token_weights.view(2, 3, 4),
        reduction="none",
        return_metrics=True,
    )
    assert loss.shape == metrics.entropy.shape == (2, 3, 4)
    bench.assert_close(loss.reshape(-1), flat.loss, 1e-13, "loss")


def test_one_position_needs_no_dimension(bench, path):
    inputs = bench.make_inputs(n=1)
    flat = bench.compute(path, CrossEntropy(), inputs, "none")
    single = bench.inputs(inputs.hidden[0], inputs.weight, inputs.targets[0], inputs.token_weights[0])
    outcome = bench.compute(path, CrossEntropy(), single, "none")
    assert outcome.loss.shape == ()
    assert outcome.loss == flat.loss[0]
