"""The checks of the Triton kernels reject the mistakes that are easy to make around them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.objectives.kernel_cases import SHAPING, check, set_small_tiles, small_inputs

from rlprior.objectives import CrossEntropy, LabelSmoothing, fused


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    set_small_tiles(monkeypatch)


def ties_left_out_of_the_head(patch):
    exact = fused._select_head

    def select(*arguments):
        head = exact(*arguments)
        head["threshold"].copy_(
            torch.nextafter(head["threshold"], torch.full_like(head["threshold"], torch.inf))
        )
        return head

    patch.setattr(fused, "_select_head", select)


def one_token_more_in_the_head(patch):
    exact = fused._select_head

    def select(logits, targets, sums, maxima, top_k, softcap):
        return exact(logits, targets, sums, maxima, top_k + 1, softcap)

    patch.setattr(fused, "_select_head", select)


def a_search_that_stops_early(patch):
    patch.setattr(fused, "SHIFTS", {torch.float32: 22})


def target_left_in_the_sum_of_the_others(patch):
    exact = fused._sum_rows

    def sum_rows(*arguments, **options):
        sums, maxima = exact(*arguments, **options)
        sums["other_mass"].add_((sums["target_logit"] - sums["reference"]).exp())
        return sums, maxima

    patch.setattr(fused, "_sum_rows", sum_rows)


def last_block_left_out_of_the_sums(patch):
    exact = fused._sum_rows

    def sum_rows(logits, *arguments, **options):
        shorter = logits.clone()
        shorter[:, 36:] = -torch.inf
        return exact(shorter, *arguments, **options)

    patch.setattr(fused, "_sum_rows", sum_rows)


def mutate_gradient(patch, change):
    exact = fused._write_gradient_

    def write(logits, targets, sums, head, terms, factor, scale, softcap):
        names = ("terms", "factor", "scale", "softcap")
        given = dict(zip(names, (terms, factor, scale, softcap), strict=True))
        given |= change(**given)
        exact(logits, targets, sums, head, *(given[name] for name in names))

    patch.setattr(fused, "_write_gradient_", write)


def head_and_tail_swapped(patch):
    def swap(terms, **others):
        return {"terms": dataclasses.replace(terms, head_scale=terms.tail_scale, tail_scale=terms.head_scale)}

    mutate_gradient(patch, swap)


def token_weight_on_the_target_alone(patch):
    mutate_gradient(patch, lambda factor, scale, **others: {"factor": factor / scale.clamp_min(1e-3)})


def softcap_left_out_of_the_gradient(patch):
    mutate_gradient(patch, lambda **others: {"softcap": None})


def shift_left_out_of_the_gradient(patch):
    mutate_gradient(patch, lambda terms, **others: {"terms": dataclasses.replace(terms, shift=None)})


MUTATIONS = {
    ties_left_out_of_the_head: SHAPING,
    one_token_more_in_the_head: SHAPING,
    a_search_that_stops_early: SHAPING,
    target_left_in_the_sum_of_the_others: CrossEntropy(),
    last_block_left_out_of_the_sums: CrossEntropy(),
    head_and_tail_swapped: SHAPING,
    token_weight_on_the_target_alone: CrossEntropy(),
    softcap_left_out_of_the_gradient: CrossEntropy(),
    shift_left_out_of_the_gradient: LabelSmoothing(smoothing=0.1),
}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_oracle_rejects(bench, monkeypatch, mutation):
    # Unmutated, the same checks pass in test_every_reduction_with_options and test_label_smoothing_under_a_softcap.
    mutation(monkeypatch)
    with pytest.raises(AssertionError, match="largest error"):
        check(bench, MUTATIONS[mutation], small_inputs(bench), logit_softcap=3.0, z_loss=0.01)
