"""The comparison with the oracle rejects the mistakes that are easy to make in these formulas."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from rlprior.objectives import RewardShaping, closed_form, formulas, linear, reference, registry

SHAPING = RewardShaping(beta=-0.25, head_reward=0.3, tail_reward=-0.2, top_k=5)


def replace_terms(patch: pytest.MonkeyPatch, mutate: Callable) -> None:
    """Wrap the closed form: `mutate(settings, statistics)` returns what it is called with instead."""
    entry = registry.REGISTRY["reward_shaping"]

    def terms(settings, row):
        return entry.terms(*mutate(settings, row))

    patch.setitem(registry.REGISTRY, "reward_shaping", dataclasses.replace(entry, terms=terms))


def focal_form_of_eq_11(patch):
    def weight(log_prob, log_other_prob, beta):
        return torch.exp(beta * log_other_prob)

    patch.setattr(formulas, "positive_weight", weight)
    patch.setattr(reference, "positive_weight", weight)


def exponent_without_its_complement(patch):
    def weight(log_prob, log_other_prob, beta):
        return torch.exp(torch.exp(beta * log_other_prob) * log_prob)

    patch.setattr(formulas, "positive_weight", weight)
    patch.setattr(reference, "positive_weight", weight)


def sign_of_the_tail(patch):
    replace_terms(patch, lambda s, row: (dataclasses.replace(s, tail_reward=-s.tail_reward), row))


def head_and_tail_swapped(patch):
    replace_terms(
        patch,
        lambda s, row: (
            dataclasses.replace(s, head_reward=s.tail_reward, tail_reward=s.head_reward),
            row,
        ),
    )


def target_rewarded_as_a_negative_too(patch):
    replace_terms(patch, lambda s, row: (s, dataclasses.replace(row, head_mass=row.head_mass + row.prob)))


def target_left_in_the_sum_of_the_others(patch):
    replace_terms(patch, lambda s, row: (s, dataclasses.replace(row, other_prob=row.other_prob + row.prob)))


def negatives_left_out_of_the_baseline(patch):
    replace_terms(
        patch,
        lambda s, row: (s, dataclasses.replace(row, tail_mass=torch.zeros_like(row.tail_mass))),
    )


def missing_stop_gradient(patch):
    patch.setattr(reference, "stop_gradient", lambda tensor: tensor)


def ties_left_out_of_the_head(patch):
    def threshold(candidates, scratch):
        kth = candidates.logits_NV.topk(candidates.top_k, dim=1).values[:, -1:]
        return torch.nextafter(kth, torch.full_like(kth, torch.inf))

    patch.setattr(closed_form, "head_threshold", threshold)


def one_token_more_in_the_head(patch):
    exact = closed_form.find_candidates
    patch.setattr(closed_form, "find_candidates", lambda logits, top_k: exact(logits, top_k + 1))


def mean_over_the_sum_of_weights(patch):
    exact = linear._present

    def present(loss, metrics, targets, batch, reduction):
        if reduction == "mean":
            loss = loss * batch.num_targets / batch.weights_N[batch.kept].sum()
        return exact(loss, metrics, targets, batch, reduction)

    patch.setattr(linear, "_present", present)


def mean_over_all_positions(patch):
    exact = linear._present

    def present(loss, metrics, targets, batch, reduction):
        if reduction == "mean":
            loss = loss * batch.num_targets / batch.targets_N.numel()
        return exact(loss, metrics, targets, batch, reduction)

    patch.setattr(linear, "_present", present)


def token_weight_on_the_loss_alone(patch):
    exact = closed_form.evaluate_rows_

    def evaluate(logits, batch, plan, scratch, gradient_scale, **shard):
        ones = None if gradient_scale is None else torch.ones_like(gradient_scale)
        return exact(logits, batch, plan, scratch, ones, **shard)

    patch.setattr("rlprior.objectives.chunked.evaluate_rows_", evaluate)


def z_loss_without_the_target(patch):
    exact = formulas.add_z_loss

    def add(terms, row, z_loss):
        return dataclasses.replace(exact(terms, row, z_loss), target_gradient=terms.target_gradient)

    patch.setattr(closed_form, "add_z_loss", add)


def softcap_without_its_slope(patch):
    exact = closed_form._cap_
    patch.setattr(closed_form, "_cap_", lambda *arguments: torch.ones_like(exact(*arguments)))


MUTATIONS = {
    focal_form_of_eq_11: ("logits", "chunked", "reference"),
    exponent_without_its_complement: ("logits", "chunked", "reference"),
    sign_of_the_tail: ("logits", "chunked"),
    head_and_tail_swapped: ("logits", "chunked"),
    target_rewarded_as_a_negative_too: ("logits", "chunked"),
    target_left_in_the_sum_of_the_others: ("logits", "chunked"),
    negatives_left_out_of_the_baseline: ("logits", "chunked"),
    missing_stop_gradient: ("reference",),
    ties_left_out_of_the_head: ("logits", "chunked"),
    one_token_more_in_the_head: ("logits", "chunked"),
    mean_over_the_sum_of_weights: ("logits", "chunked", "reference"),
    mean_over_all_positions: ("logits", "chunked", "reference"),
    token_weight_on_the_loss_alone: ("chunked",),  # given logits get their weights after their gradient
    z_loss_without_the_target: ("logits", "chunked"),
    softcap_without_its_slope: ("logits", "chunked"),
}


@pytest.mark.parametrize(
    ("mutation", "mutated_path"),
    [(mutation, path) for mutation, paths in MUTATIONS.items() for path in paths],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_oracle_rejects(bench, monkeypatch, mutation, mutated_path):
    inputs, options = bench.make_inputs(seed=1), {"logit_softcap": 20.0, "z_loss": 0.01}
    bench.check(mutated_path, SHAPING, inputs, **options)
    mutation(monkeypatch)
    with pytest.raises(AssertionError, match="largest error"):
        bench.check(mutated_path, SHAPING, inputs, **options)
