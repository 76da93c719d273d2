"""The hazards of floating point: extreme margins, ties, -inf, ignored rows, signs, low precision, upstream gradients."""

from __future__ import annotations

import dataclasses
import math
from decimal import Decimal, localcontext

import pytest
import torch
from tests.objectives.conftest import ON_CPU
from torch.nn import functional

from rlprior.objectives import (
    CrossEntropy,
    DynamicFineTuning,
    Focal,
    LabelSmoothing,
    RewardShaping,
    SampledReward,
    closed_form,
    formulas,
    linear_shaped_cross_entropy,
    shaped_cross_entropy,
)

MARGINS = (-1000, -110, -90, 0, 5, 20, 90, 110, 1000)


def exact_three_tokens(margin: int, beta: float) -> tuple[float, float, float]:
    """Loss, dL/dz_target and dL/dz_other for logits (margin, 0, 0), from 1200-digit arithmetic.

    1 - exp(-1000) needs 435 digits before it differs from 1, and as many again for its logarithm.
    """
    with localcontext() as context:
        context.prec = 1200
        other = 2 * (-Decimal(margin)).exp()  # masses relative to the target's
        p, q = 1 / (1 + other), other / (1 + other)
        weight = (p.ln() * (1 - (Decimal(beta) * q.ln()).exp())).exp()
        return float(-weight * p.ln()), float(-weight * q), float(weight * q / 2)


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("beta", [-0.99, -0.25, 0.0, 0.5, 4.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_margins_keep_relative_precision(margin, beta, dtype, tolerance):
    # An exponent of 1000 costs three digits, which leaves 13 and 4.5; below the smallest normal number none are left.
    logits = torch.tensor([[margin, 0, 0]], dtype=dtype, requires_grad=True)
    loss = shaped_cross_entropy(logits, torch.tensor([0]), RewardShaping(beta=beta))
    loss.backward()
    expected = exact_three_tokens(margin, beta)
    actual = (loss.item(), logits.grad[0, 0].item(), logits.grad[0, 1].item())
    # At beta -0.99 the weight depends on q^0.01, whose limit at q = 0 is approached only below any float: there the
    # loss and gradient themselves are below the smallest normal number.
    assert actual == pytest.approx(expected, rel=tolerance, abs=torch.finfo(dtype).tiny * 10)


def test_margins_of_every_objective_are_finite(bench, objective, path):
    logits = torch.zeros(len(MARGINS), 7, dtype=torch.float64)
    logits[:, 0] = torch.tensor(MARGINS, dtype=torch.float64)
    targets = torch.zeros(len(MARGINS), dtype=torch.int64)
    inputs = bench.inputs(
        logits, torch.eye(7, dtype=torch.float64), targets, torch.ones(len(MARGINS)).double()
    )
    bench.check(path, objective, inputs)
    outcome = bench.compute(path, objective, inputs.to(torch.float32), "sum")
    assert torch.isfinite(outcome.loss).all()
    assert torch.isfinite(outcome.hidden_gradient).all()


@pytest.mark.parametrize("beta", [-1.0, -1.5, float("nan"), float("inf"), float("-inf")])
def test_beta_without_a_limit_is_refused(beta):
    with pytest.raises(ValueError, match="beta"):
        RewardShaping(beta=beta)
    with pytest.raises(ValueError, match="beta"):
        SampledReward(beta=beta)


@pytest.mark.parametrize(("beta", "lowest", "highest"), [(-0.25, 1.0, 1.141), (0.5, 0.813, 1.0)])
def test_weight_stays_in_its_range(beta, lowest, highest):
    margins = torch.linspace(-40, 40, 8001, dtype=torch.float64)
    logits = torch.stack([margins, torch.zeros_like(margins)], dim=1)
    targets = torch.zeros(len(margins), dtype=torch.int64)
    shaped = shaped_cross_entropy(logits, targets, RewardShaping(beta=beta), reduction="none")
    weight = shaped / functional.softplus(-margins)
    assert weight.min() >= lowest - 5e-4  # the bounds are given to three decimals
    assert weight.max() <= highest + 5e-4
    assert weight.max() - weight.min() > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ties_with_the_kth_logit_are_in_the_head(bench, path, dtype):
    # k = 2 falls among four equal logits: the head is all five tokens from 3.0 to 2.0, wherever they stand.
    row = torch.tensor([2.0, 0.0, 3.0, 2.0, 1.0, 2.0, -1.0, 2.0], dtype=torch.float64)
    shaping = RewardShaping(head_reward=0.5, tail_reward=-0.5, top_k=2)
    for order in (torch.arange(8), torch.tensor([7, 3, 6, 1, 0, 2, 5, 4])):
        inputs = bench.inputs(
            row[order][None], torch.eye(8, dtype=torch.float64), torch.tensor([1]), torch.ones(1).double()
        )
        outcome = bench.compute(path, shaping, inputs.to(dtype), "sum")
        assert outcome.metrics.head_size.tolist() == [5]
        expected = bench.oracle(shaping, inputs, "sum", 1.0)
        # The logits are exact in bfloat16, the matrix products and gradients carry its 8 bits.
        bench.assert_agree(outcome, expected, {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 1e-2))


@pytest.mark.parametrize("way", ["logits", *ON_CPU])
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_saturated_softcap_leaves_the_order_as_it_was(bench, way, top_k):
    """Capped at 3, logits of 40, 39.75 and 39.5 are all 3.0: the head and the rank are those of the model's own order."""
    weight = torch.tensor([[39.5], [40.0], [39.75], [1.0], [0.0]])
    inputs = bench.inputs(torch.ones(1, 1), weight, torch.tensor([0]), torch.ones(1))
    shaping = RewardShaping(head_reward=0.5, tail_reward=-0.5, top_k=top_k)
    metrics = bench.compute(way, shaping, inputs, "sum", logit_softcap=3.0).metrics
    assert metrics.target_rank.tolist() == [3]
    assert metrics.head_size.tolist() == [top_k]
    total = sum(math.exp(3 * math.tanh(z / 3) - 3) for z in weight[:, 0].tolist())
    assert metrics.head_mass.item() == pytest.approx(top_k / total, rel=1e-6)


@pytest.mark.parametrize("columns", [40, 9000])  # without and with blocks of candidates
def test_the_slope_of_a_softcap_does_not_cancel(columns):
    """1 - tanh(8)^2 is 4.5e-7, of which float32 would keep three bits."""
    logits = torch.linspace(-8, 8, columns)[None].requires_grad_()
    capped = torch.tanh(logits.detach().double()).requires_grad_()
    shaping = RewardShaping(beta=-0.25, head_reward=0.1, tail_reward=-0.1, top_k=columns // 20)
    target = torch.tensor([columns - 1])
    shaped_cross_entropy(logits, target, shaping, logit_softcap=1.0).backward()
    shaped_cross_entropy(capped, target, shaping).backward()
    expected = capped.grad / torch.cosh(logits.detach().double()).square()
    # The float32 capped logits are off by one rounding, and so are the masses.
    torch.testing.assert_close(logits.grad.double(), expected, rtol=1e-5, atol=0)


def test_the_complement_keeps_its_precision_at_both_ends():
    probs = torch.cat([torch.logspace(-30, -1, 30), 1 - torch.logspace(-7, -1, 7)]).float()
    exact = torch.log1p(-probs.double())
    actual = formulas.log_complement(probs, (1 - probs.double()).float())
    torch.testing.assert_close(
        actual.double(), exact, rtol=2e-7, atol=0
    )  # a rounding of q, and one of the logarithm


def test_a_mass_is_never_negative():
    """A head that is all there is may add up to more than the sum over everything, in another order."""
    one = torch.ones(1)
    empty = dict.fromkeys(("other_weighted", "head_weighted", "finite_mean", "num_finite"))
    sums = closed_form.RowSums(
        max=one,
        target=-one,
        target_mass=one,
        other_mass=one,
        head_mass=torch.nextafter(one, 2 * one),
        **empty,
    )
    assert sums.statistics().tail_mass.item() == 0


@pytest.mark.parametrize(
    "objective_", [CrossEntropy(), Focal(gamma=0.5), Focal(gamma=2.0), DynamicFineTuning()]
)
def test_an_impossible_target_has_a_finite_gradient(objective_):
    logits = torch.tensor([[1.0, -torch.inf, 0.5]], requires_grad=True)
    shaped_cross_entropy(logits, torch.tensor([1]), objective_).backward()
    p = torch.tensor([1.0, 0.5]).softmax(0).tolist()
    weight = 0.0 if isinstance(objective_, DynamicFineTuning) else 1.0  # p_x and q^gamma in the limit
    expected = [weight * p[0], -weight, weight * p[1]]
    assert logits.grad.tolist()[0] == pytest.approx(expected, rel=1e-6)


def test_infinitely_unlikely_columns_do_not_exist(bench, objective):
    """Padding the vocabulary with -inf changes nothing and receives no gradient."""
    inputs = bench.make_inputs()
    narrow = inputs.logits.requires_grad_()
    wide = functional.pad(narrow.detach(), (0, 9), value=-torch.inf).requires_grad_()
    options = {"reduction": "none", "return_metrics": True, "token_weights": inputs.token_weights}
    narrow_loss, narrow_metrics = shaped_cross_entropy(narrow, inputs.targets, objective, **options)
    wide_loss, wide_metrics = shaped_cross_entropy(wide, inputs.targets, objective, **options)
    narrow_loss.sum().backward()
    wide_loss.sum().backward()
    bench.assert_close(wide_loss.detach(), narrow_loss.detach(), 1e-13, "loss")
    bench.assert_close(wide.grad[:, :37], narrow.grad, 1e-13, "gradient")
    assert (wide.grad[:, 37:] == 0).all()
    for field in dataclasses.fields(narrow_metrics):
        expected = getattr(narrow_metrics, field.name)
        torch.testing.assert_close(getattr(wide_metrics, field.name), expected, equal_nan=True)


def test_head_counts_finite_logits_only(bench, path):
    logits = torch.tensor([[1.0, -torch.inf, 0.0, -torch.inf]])
    if path == "logits":
        shaping = RewardShaping(head_reward=0.1, top_k=3)
        _, metrics = shaped_cross_entropy(logits, torch.tensor([0]), shaping, return_metrics=True)
        assert metrics.head_size.tolist() == [2]
        assert metrics.head_mass.tolist() == pytest.approx([1.0])
    # A product of finite numbers is -inf only by overflow, in a dtype with room for it.
    inputs = bench.inputs(
        torch.tensor([[1.0, 1e30]]),
        torch.tensor([[1.0, 0.0], [0.0, -1e30]]),
        torch.tensor([0]),
        torch.ones(1),
    )
    outcome = bench.compute(path, RewardShaping(head_reward=0.1, tail_reward=-0.1, top_k=2), inputs, "sum")
    assert outcome.metrics.head_size.tolist() == [1]
    assert torch.isfinite(outcome.loss)


@pytest.mark.parametrize("top_k", [37, 38, 10**6])
def test_a_head_as_large_as_the_vocabulary_has_no_tail(bench, path, top_k):
    inputs = bench.make_inputs()
    everything = bench.compute(
        path, RewardShaping(head_reward=0.3, tail_reward=-7.0, top_k=top_k), inputs, "sum"
    )
    uniform = bench.compute(path, RewardShaping(head_reward=0.3, tail_reward=0.3, top_k=5), inputs, "sum")
    bench.assert_agree(everything, uniform, 1e-13)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_ignored_rows_are_exactly_zero_whatever_they_hold(bench, objective, path, poison, reduction):
    inputs = bench.make_inputs(n=9)
    inputs.targets[:] = torch.tensor([4, -100, 2, 0, -100, 1, -100, -100, 8])
    ignored = inputs.targets == -100
    clean = bench.compute(path, objective, inputs, reduction)
    inputs.hidden[ignored] = poison
    outcome = bench.compute(path, objective, inputs, reduction)
    if (
        path == "logits"
    ):  # the test's own product `hidden @ weight.T` carries nan to the gradient of the weight
        outcome = dataclasses.replace(outcome, weight_gradient=clean.weight_gradient)
    assert (outcome.hidden_gradient[ignored] == 0).all()
    if reduction == "none":
        assert (outcome.loss[ignored] == 0).all()
    bench.assert_agree(outcome, clean, 0.0)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_broken_row_is_nan_and_stays_alone(bench, objective, path, poison):
    """What a training loop must see to skip a step; an error or a finite number would hide it."""
    inputs = bench.make_inputs(n=6)
    inputs.targets.fill_(2)
    clean = bench.compute(path, objective, inputs, "none")
    inputs.hidden[4] = poison
    broken = bench.compute(path, objective, inputs, "none")
    others = torch.arange(6) != 4
    bench.assert_close(broken.loss[others], clean.loss[others], 1e-14, "loss")
    bench.assert_close(broken.hidden_gradient[others], clean.hidden_gradient[others], 1e-13, "gradient")
    assert broken.loss[4].isnan()
    assert broken.hidden_gradient[4].isnan().all()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_nothing_to_learn_from_is_zero_not_nan(bench, objective, path, reduction):
    inputs = bench.make_inputs()
    inputs.targets.fill_(-100)
    outcome = bench.compute(path, objective, inputs, reduction)
    assert (outcome.loss == 0).all()
    assert (outcome.hidden_gradient == 0).all()
    assert (outcome.weight_gradient == 0).all()
    assert outcome.metrics.cross_entropy.isnan().all()


def test_no_positions_at_all(path, bench, objective):
    empty = bench.inputs(
        torch.zeros(0, 5), torch.ones(7, 5), torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    )
    outcome = bench.compute(path, objective, empty, "mean")
    assert outcome.loss.item() == 0
    assert (outcome.weight_gradient == 0).all()


def test_ignore_index_may_be_a_token(bench, path):
    inputs = bench.make_inputs()
    marked = dataclasses.replace(inputs, targets=inputs.targets.masked_fill(inputs.targets == -100, 36))
    others = inputs.targets.masked_fill(inputs.targets == 36, -100)
    shaping = RewardShaping(beta=0.5)
    expected = bench.compute(path, shaping, dataclasses.replace(inputs, targets=others), "sum")
    hidden = marked.hidden.clone().requires_grad_()
    options = {"token_weights": marked.token_weights, "ignore_index": 36, "reduction": "sum"}
    if path == "logits":
        loss = shaped_cross_entropy(hidden @ marked.weight.T, marked.targets, shaping, **options)
    else:
        loss = linear_shaped_cross_entropy(
            hidden, marked.weight, marked.targets, shaping, implementation=path, **options
        )
    loss.backward()
    bench.assert_close(hidden.grad, expected.hidden_gradient, 1e-14, "gradient")


@pytest.mark.parametrize("tail_reward", [-50.0, -3.0, -1.0, 1.0, 50.0])
def test_expected_reward_may_be_negative_or_equal_to_the_tail_reward(bench, path, tail_reward):
    shaping = RewardShaping(tail_reward=tail_reward, top_k=2)
    bench.check(path, shaping, bench.make_inputs(scale=0.1))
    # Two tokens of which one is the tail, with a reward at which C - tail_reward = 0: nothing is divided by it.
    logits = torch.zeros(1, 2, dtype=torch.float64)
    logits[0, 1] = -1.0
    p = float(logits.softmax(1)[0, 0])
    zero = RewardShaping(tail_reward=1 / p, top_k=1)  # C = 1 + q / p = 1 / p
    inputs = bench.inputs(
        logits, torch.eye(2, dtype=torch.float64), torch.tensor([0]), torch.ones(1, dtype=torch.float64)
    )
    outcome = bench.compute(path, zero, inputs, "sum")
    assert outcome.hidden_gradient.abs().max() < 1e-15
    assert torch.isfinite(outcome.loss)


LOW_PRECISION_OBJECTIVES = (
    CrossEntropy(),
    RewardShaping(beta=-0.25),
    RewardShaping(beta=0.5),
    RewardShaping(tail_reward=-0.1, top_k=20),
    RewardShaping(head_reward=0.1, top_k=20),
    LabelSmoothing(smoothing=0.1),
    Focal(gamma=2.0),
    DynamicFineTuning(),
)

LOSS_SCALE = 1024.0  # as in mixed-precision training: without it, float16 gradients of a mean are subnormal


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("objective_", LOW_PRECISION_OBJECTIVES, ids=repr)
def test_low_precision_is_no_worse_than_plain_cross_entropy(bench, dtype, objective_):
    """Budget: the error of `F.cross_entropy(F.linear(...))` in the same dtype, against float64 on the same numbers."""
    inputs = bench.make_inputs(seed=5, n=300, v=211, d=16, scale=0.5).to(dtype)
    # Heads are compared on the logits as rounded: the float64 oracle would break their ties.
    logits = functional.linear(inputs.hidden, inputs.weight)
    budget_loss, budget_hidden, budget_weight = _unfused_errors(inputs, dtype)
    exact = _exact_gradients(objective_, inputs, logits)
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    loss = linear_shaped_cross_entropy(hidden, weight, inputs.targets, objective_, implementation="chunked")
    loss.backward(torch.tensor(LOSS_SCALE))
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    assert loss.dtype == torch.float32
    assert relative_error(loss.detach(), exact[0]) <= budget_loss
    assert relative_error(hidden.grad, exact[1]) <= budget_hidden
    assert relative_error(weight.grad, exact[2]) <= budget_weight


def _exact_gradients(objective_, inputs, logits):
    """Float64 arithmetic on the given numbers: loss of the rounded logits, products with the given hidden and weight."""
    leaf = logits.detach().double().requires_grad_()
    loss = shaped_cross_entropy(leaf, inputs.targets, objective_)
    loss.backward(torch.tensor(LOSS_SCALE, dtype=torch.float64))
    return loss.detach(), leaf.grad @ inputs.weight.double(), leaf.grad.T @ inputs.hidden.double()


def _unfused_errors(inputs, dtype):
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    logits = functional.linear(hidden, weight)
    loss = functional.cross_entropy(logits, inputs.targets)
    loss.backward(torch.tensor(LOSS_SCALE, dtype=dtype))
    exact = _exact_gradients(CrossEntropy(), inputs, logits)
    return tuple(
        relative_error(actual, expected)
        for actual, expected in zip((loss.detach(), hidden.grad, weight.grad), exact, strict=True)
    )


def test_float16_gradients_survive_a_mean_over_many_tokens():
    # 1/N = 1/65536 times a probability of 1/256 is 6e-8, the smallest float16: applied before the product it would
    # leave steps of its own size.
    hidden = torch.ones(65536, 1, dtype=torch.float16)
    weight = torch.zeros(256, 1, dtype=torch.float16, requires_grad=True)
    targets = torch.zeros(65536, dtype=torch.int64)
    linear_shaped_cross_entropy(hidden, weight, targets, CrossEntropy()).backward()
    assert weight.grad[1:, 0].tolist() == pytest.approx([1 / 256] * 255, rel=1e-3)


@pytest.mark.parametrize("implementation", [name for name in ON_CPU if name != "reference"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("factor", [1e-6, 1e5, 1e30])
@pytest.mark.parametrize("by", ["token_weights", "upstream"])
def test_float16_logits_take_factors_of_any_size(bench, implementation, reduction, factor, by):
    """A gradient of float16 logits holds 6e-8 to 65504; the factors of its rows are applied where there is room."""
    inputs = bench.make_inputs(n=6, v=17, scale=0.3)
    inputs.token_weights.copy_(torch.linspace(0.5, 2, 6))
    factors = torch.full((6,), factor, dtype=torch.float64) * torch.linspace(1, 1.5, 6)
    upstream = 1.0
    if by == "token_weights":
        inputs.token_weights.mul_(factors)
    else:
        upstream = factors if reduction == "none" else factor
    expected = bench.oracle(CrossEntropy(), inputs, reduction, upstream)
    with torch.autocast("cpu", dtype=torch.float16):
        actual = bench.compute(
            implementation,
            CrossEntropy(),
            inputs.to(torch.float32),
            reduction,
            torch.as_tensor(upstream).float(),
        )
    # Logits of up to 5 in float16 are off by up to 0.002.
    bench.assert_agree(actual, expected, 5e-3)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_given_float16_logits_get_the_gradient_that_torch_gives(bench, reduction):
    """Token weights and the upstream gradient, 1e5 and 1e-5, meet before either of them is rounded to float16."""
    inputs = bench.make_inputs(n=6, v=17, scale=0.3)
    weights = torch.full((6,), 1e5)
    leaves = [inputs.logits.half().requires_grad_() for _ in range(2)]
    targets, upstream = inputs.targets.clamp_min(0), 1e-5
    loss = shaped_cross_entropy(leaves[0], targets, CrossEntropy(), weights, reduction=reduction)
    (loss * upstream).sum().backward()
    own = functional.cross_entropy(leaves[1].float(), targets, reduction="none")
    (own * weights * upstream).sum().backward()
    assert leaves[0].grad.dtype == torch.float16
    # One rounding to float16 more than torch's, 2^-11 of an entry each.
    bench.assert_close(leaves[0].grad, leaves[1].grad, 2 * 2**-11, "gradient")


def test_upstream_gradient_scales_once(bench, objective, path):
    inputs = bench.make_inputs()
    plain, scaled = (bench.compute(path, objective, inputs, "mean", upstream) for upstream in (1.0, -8.0))
    assert torch.equal(scaled.hidden_gradient, -8 * plain.hidden_gradient)  # a power of two scales exactly
    assert torch.equal(scaled.weight_gradient, -8 * plain.weight_gradient)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_retained_graph_gives_the_same_gradient_again(bench, objective, path, reduction):
    inputs = bench.make_inputs()
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    loss = _loss(path, hidden, weight, inputs.targets, objective, reduction).sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    scaled = torch.autograd.grad(loss * 4, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, weight))
    for one, four, same in zip(first, scaled, again, strict=True):
        assert torch.equal(one, same)
        assert torch.equal(four, 4 * one)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_double_backward_is_refused(bench, objective, path, reduction):
    inputs = bench.make_inputs()
    hidden = inputs.hidden.clone().requires_grad_()
    loss = _loss(path, hidden, inputs.weight, inputs.targets, objective, reduction).sum()
    with pytest.raises(RuntimeError, match="does not support double backward"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def _loss(path, hidden, weight, targets, objective, reduction):
    if path == "logits":
        return shaped_cross_entropy(hidden @ weight.T, targets, objective, reduction=reduction)
    return linear_shaped_cross_entropy(
        hidden, weight, targets, objective, reduction=reduction, implementation=path
    )


@pytest.mark.parametrize(("wants_hidden", "wants_weight"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_frozen_inputs_get_no_gradient(bench, path, wants_hidden, wants_weight, reduction):
    inputs = bench.make_inputs()
    shaping = RewardShaping(tail_reward=-0.1, top_k=5)
    hidden = inputs.hidden.clone().requires_grad_(wants_hidden)
    weight = inputs.weight.clone().requires_grad_(wants_weight)
    inputs.token_weights.fill_(1)
    both = bench.compute(path, shaping, inputs, reduction)
    loss = _loss(path, hidden, weight, inputs.targets, shaping, reduction)
    assert loss.requires_grad == (wants_hidden or wants_weight)
    if loss.requires_grad:
        loss.sum().backward()
    for wanted, leaf, expected in (
        (wants_hidden, hidden, both.hidden_gradient),
        (wants_weight, weight, both.weight_gradient),
    ):
        assert torch.equal(leaf.grad, expected) if wanted else leaf.grad is None


def test_an_upstream_nan_at_an_ignored_position_stays_there(bench, path):
    inputs = bench.make_inputs()
    upstream = torch.ones(len(inputs.targets), dtype=torch.float64)
    clean = bench.compute(path, CrossEntropy(), inputs, "none", upstream)
    upstream[inputs.targets == -100] = torch.nan
    dirty = bench.compute(path, CrossEntropy(), inputs, "none", upstream)
    assert torch.equal(dirty.hidden_gradient, clean.hidden_gradient)
