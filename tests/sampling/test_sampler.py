"""The sampler against the model's own distribution: what is drawn, how likely it says it was, and when it stops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from rlprior.config import RunError
from rlprior.models.causal_lm import evaluation_mode
from rlprior.sampling.sampler import Decoding, Response, draw, keep_nucleus, sample
from rlprior.seeding import torch_generator

# R rows, V vocabulary

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15], [16, 17, 18, 19, 20, 21, 22], [23, 24]]
NEVER = -1  # no token has this id, so nothing ends


def draw_samples(
    model: Any, prompts: Sequence[Sequence[int]] = PROMPTS, **changes: Any
) -> list[list[Response]]:
    decoding = Decoding(
        **{
            name: changes.pop(name)
            for name in ("temperature", "top_p", "max_new_tokens", "stop")
            if name in changes
        }
    )
    samples_per_prompt, seed = changes.pop("samples_per_prompt", 4), changes.pop("seed", 0)
    settings: dict[str, Any] = {
        "eos_token_id": NEVER,
        "generators": [
            [torch_generator(seed, number, index) for index in range(samples_per_prompt)]
            for number in range(len(prompts))
        ],
        **changes,
    }
    with evaluation_mode(model):
        return sample(model, prompts, decoding=decoding, **settings)


def flat(groups: list[list[Response]]) -> list[Response]:
    return [response for group in groups for response in group]


def forward_log_probs(model: Any, prompt: Sequence[int], response: Response, decoding: Decoding) -> Tensor:
    """Of each response token, by one forward pass over the whole text without cache, batch or padding."""
    ids = torch.tensor([*prompt, *response.token_ids])
    with torch.no_grad():
        logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
    log_probs = torch.log_softmax(logits.double() / decoding.temperature, -1)
    if decoding.top_p < 1:
        log_probs = nucleus_by_hand(log_probs, decoding.top_p)
    return log_probs[torch.arange(len(response.token_ids)), ids[len(prompt) :]]


def nucleus_by_hand(log_probs_RV: Tensor, top_p: float) -> Tensor:
    result = torch.full_like(log_probs_RV, -torch.inf)
    for row, log_probs in enumerate(log_probs_RV):
        mass, kept = 0.0, []
        for token in sorted(range(len(log_probs)), key=lambda v: (-log_probs[v].item(), v)):
            if mass >= top_p:
                break
            kept.append(token)
            mass += log_probs[token].exp().item()
        result[row, kept] = torch.log_softmax(log_probs[kept], 0)
    return result


# against the model's forward pass


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.3, 0.9)])
def test_log_probs_are_those_of_the_full_forward_pass(model: Any, temperature: float, top_p: float) -> None:
    decoding = Decoding(temperature=temperature, top_p=top_p, max_new_tokens=12)
    groups = draw_samples(model, temperature=temperature, top_p=top_p, max_new_tokens=12)
    spread = []
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for response in group:
            expected = forward_log_probs(model, prompt, response, decoding)
            # float32 sums in another order; logits here reach about 10
            torch.testing.assert_close(
                torch.tensor(response.log_probs, dtype=torch.float64), expected, atol=1e-5, rtol=1e-5
            )
            spread.append(expected)
    assert torch.cat(spread).std() > 0.5  # far from uniform: a wrong position or mask would show


def test_rows_that_end_early_leave_the_others_as_they_were(model: Any) -> None:
    """Every response up to its own end is what it is when nobody ends, although rows are dropped on the way."""
    endless = draw_samples(model, max_new_tokens=12)
    tokens = [token for group in endless for response in group for token in response.token_ids]
    eos = max(set(tokens), key=tokens.count)
    ended = draw_samples(model, max_new_tokens=12, eos_token_id=eos)
    lengths = set()
    for whole, cut in zip(flat(endless), flat(ended), strict=True):
        stop = whole.token_ids.index(eos) + 1 if eos in whole.token_ids else 12
        assert cut.token_ids == whole.token_ids[:stop]
        # the matrix products of fewer rows may be summed in another order
        assert cut.log_probs == pytest.approx(whole.log_probs[:stop], abs=1e-5)
        assert cut.finish_reason == ("stop" if eos in whole.token_ids else "length")
        lengths.add(stop)
    assert len(lengths) > 3  # ragged indeed
    assert 12 in lengths


def test_what_shares_the_batch_does_not_matter(model: Any) -> None:
    """The same uniform numbers draw the same tokens from a prompt alone and beside shorter and longer ones."""
    alone = draw_samples(model, [PROMPTS[2]] * 5, max_new_tokens=8)
    for place in range(5):
        prompts = [*PROMPTS[:2], *PROMPTS[3:]]
        prompts.insert(place, PROMPTS[2])
        beside = draw_samples(model, prompts, max_new_tokens=8)[place]
        assert [r.token_ids for r in beside] == [r.token_ids for r in alone[place]]
        for one, other in zip(beside, alone[place], strict=True):
            assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)


def test_samples_of_a_prompt_have_the_models_distribution(model: Any) -> None:
    """Two tokens drawn 4,000 times against the product of the two exact distributions."""
    prompt, num_samples = [5, 6], 4000
    groups = draw_samples(
        model, [prompt, [9]], samples_per_prompt=num_samples, max_new_tokens=2, temperature=0.7
    )
    with torch.no_grad():
        first = torch.softmax(model(input_ids=torch.tensor([prompt])).logits[0, -1].double() / 0.7, -1)
        size = len(first)
        pairs = torch.cat([torch.tensor([prompt] * size), torch.arange(size)[:, None]], 1)
        second = torch.softmax(model(input_ids=pairs).logits[:, -1].double() / 0.7, -1)
    # pairs are too many to count one by one: eight classes of first tokens by eight of second ones
    classes = torch.nn.functional.one_hot(torch.arange(size) % 8).double()
    joint = classes.T @ (first[:, None] * second) @ classes
    drawn = torch.tensor([response.token_ids for response in groups[0]])
    assert_distribution(drawn[:, 0], first)
    assert_distribution(drawn[:, 0] % 8 * 8 + drawn[:, 1] % 8, joint.flatten())


def assert_distribution(drawn: Tensor, probabilities: Tensor) -> None:
    """Chi-square at 1e-4, which a fixed seed meets or not for ever; places expected less than 5 times are counted as one."""
    counts = torch.bincount(drawn, minlength=len(probabilities)).double()
    expected = probabilities * len(drawn)
    is_rare = expected < 5
    observed = [*counts[~is_rare].tolist(), counts[is_rare].sum().item()]
    wanted = [*expected[~is_rare].tolist(), expected[is_rare].sum().item()]
    if wanted[-1] < 5:
        observed[-2:], wanted[-2:] = [sum(observed[-2:])], [sum(wanted[-2:])]
    assert len(wanted) > 3
    assert counts[probabilities == 0].sum() == 0
    assert stats.chisquare(observed, wanted).pvalue > 1e-4


# the draw of one token


def uniform(num_rows: int, seed: int = 0) -> Tensor:
    return torch.rand(num_rows, generator=torch_generator(seed, "u"), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.3])
def test_draws_have_the_exact_distribution(temperature: float, top_p: float) -> None:
    logits = torch.randn(20, generator=torch_generator(1, "logits")) * 1.5
    exact = torch.log_softmax(logits.double() / temperature, -1)[None]
    exact = nucleus_by_hand(exact, top_p)[0] if top_p < 1 else exact[0]
    decoding = Decoding(temperature=temperature, top_p=top_p)
    tokens, log_probs = draw(logits.expand(20_000, -1), uniform(20_000), decoding)
    # float32 logits
    torch.testing.assert_close(log_probs.double(), exact[tokens], atol=1e-5, rtol=1e-5)
    if (exact > -torch.inf).sum() > 4:
        assert_distribution(tokens, exact.exp())
    else:
        assert set(tokens.tolist()) == set((exact > -torch.inf).nonzero().flatten().tolist())


def test_the_draw_inverts_the_cumulative_distribution() -> None:
    logits = torch.tensor([0.25, 0.5, 0.25]).log()
    u = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-53], dtype=torch.float64)
    tokens, log_probs = draw(logits.expand(6, -1), u, Decoding())
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(log_probs, logits[tokens])


LARGEST = 1 - 2**-53  # the largest number that torch.rand can give in float64


@pytest.mark.parametrize("u", [0.0, 0.5, LARGEST])
def test_a_token_without_mass_is_never_drawn(u: float) -> None:
    inf = torch.inf
    logits = torch.tensor(
        [[-inf, 1.0, -inf, 2.0, -inf], [-inf, -inf, -inf, 0.0, -inf], [0.0, -inf, -inf, -inf, -inf]]
    )
    tokens, log_probs = draw(logits, torch.full((3,), u, dtype=torch.float64), Decoding())
    assert tokens.tolist() == [3 if u > 0.4 else 1, 3, 0]
    assert log_probs[1:].tolist() == [0.0, 0.0]
    assert log_probs[0].isfinite()


@given(
    st.lists(st.floats(-120, 40, width=32) | st.just(float("-inf")), min_size=1, max_size=40).filter(
        lambda logits: max(logits) > -120
    ),
    st.floats(0, LARGEST) | st.sampled_from([0.0, LARGEST]),
    st.floats(0.05, 20),
    st.floats(0.01, 1.0),
)
def test_whatever_is_drawn_could_be_drawn(
    logits: list[float], u: float, temperature: float, top_p: float
) -> None:
    logits_RV = torch.tensor([logits])
    decoding = Decoding(temperature=temperature, top_p=top_p)
    token, log_prob = draw(logits_RV, torch.tensor([u], dtype=torch.float64), decoding)
    assert 0 <= token.item() < len(logits)
    assert -torch.inf < log_prob.item() <= 0
    full = torch.log_softmax(logits_RV / temperature, -1)[0, token].item()
    # renormalised over a nucleus at least as heavy as top_p, up to float32 rounding
    assert full - 1e-4 <= log_prob.item() <= full - torch.log(torch.tensor(top_p)).item() + 1e-4


def test_each_rare_token_after_a_likely_one_has_its_own_interval() -> None:
    """Float32 cumulative sums near 1 are 6e-8 apart, the intervals here 2e-9 wide."""
    logits = torch.full((1001,), -20.0)
    logits[0] = 0.0
    rare = torch.softmax(logits.double(), -1)[1]
    after = torch.tensor([0, 1, 300, 301, 999], dtype=torch.float64)  # how many tokens follow
    tokens, _ = draw(logits.expand(5, -1), 1 - (after + 0.5) * rare, Decoding())
    # float32 log-probabilities: the width of 1,000 intervals is known to 1e-6 of itself, far less than half of one
    assert tokens.tolist() == (1000 - after).tolist()


def test_every_token_of_a_large_vocabulary_is_reached() -> None:
    size = 150_000
    middles = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    chosen = torch.tensor([0, 1, 77_777, size - 2, size - 1])
    tokens, _ = draw(torch.zeros(len(chosen), size), middles[chosen], Decoding())
    assert tokens.tolist() == chosen.tolist()


@pytest.mark.parametrize("size", [1, 31, 32, 33, 1000, 4096])
@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_the_draw_is_that_of_one_cumulative_sum(size: int, temperature: float) -> None:
    """Sums over blocks invert the same function as float64 sums over all tokens, at its edges too."""
    logits = torch.randn(200, size, generator=torch_generator(2, "logits")) * 3
    mass = torch.softmax(logits / temperature, -1).double()
    until = mass.cumsum(-1)
    edges = (until[:, ::7] / until[:, -1:]).flatten()[:2000]
    rows = torch.arange(200).repeat_interleave(len(range(0, size, 7)))[:2000]
    for u in (uniform(len(rows)), edges, edges - 1e-12, edges + 1e-12):
        u = u.clamp(0, LARGEST)
        tokens, log_probs = draw(logits[rows], u, Decoding(temperature=temperature))
        goal = u * until[rows, -1]
        drawn_mass, drawn_until = mass[rows, tokens], until[rows, tokens]
        assert (drawn_mass > 0).all()
        # float64 sums of 4,096 numbers, in another order
        assert (goal < drawn_until + 1e-13).all()
        assert (goal >= drawn_until - drawn_mass - 1e-13).all()
        exact = torch.log_softmax(logits[rows].double() / temperature, -1)
        exact = exact.gather(1, tokens[:, None]).squeeze(1)
        # float32 logits up to 40
        torch.testing.assert_close(log_probs.double(), exact, atol=1e-5, rtol=1e-6)


def test_the_nucleus_by_hand() -> None:
    log_probs = torch.tensor([[0.1, 0.5, 0.25, 0.15], [0.25, 0.25, 0.25, 0.25]]).log()
    kept = keep_nucleus(log_probs, 0.6).exp()
    # the token that crosses is in; equal ones go by their place
    torch.testing.assert_close(kept, torch.tensor([[0.0, 2 / 3, 1 / 3, 0.0], [1 / 3, 1 / 3, 1 / 3, 0.0]]))
    assert (keep_nucleus(log_probs, 1e-9) > -torch.inf).sum(1).tolist() == [1, 1]
    # reached exactly: nothing more is needed
    assert (keep_nucleus(log_probs, 0.5) > -torch.inf).sum(1).tolist() == [1, 2]


# shape, seeds, ends


def test_groups_have_the_shape_asked_for(model: Any) -> None:
    groups = draw_samples(model, samples_per_prompt=3, max_new_tokens=5)
    assert [len(group) for group in groups] == [3] * len(PROMPTS)
    for response in flat(groups):
        assert len(response.token_ids) == len(response.log_probs) == 5
        assert response.finish_reason == "length"
        assert all(type(token) is int for token in response.token_ids)
    assert len({tuple(r.token_ids) for r in groups[0]}) > 1  # samples of a group differ


def test_one_new_token_is_enough(model: Any) -> None:
    for response in flat(draw_samples(model, max_new_tokens=1)):
        assert len(response.token_ids) == 1


def test_nothing_follows_the_end(model: Any) -> None:
    tokens = [t for r in flat(draw_samples(model, max_new_tokens=8)) for t in r.token_ids]
    eos = max(set(tokens), key=tokens.count)
    responses = flat(draw_samples(model, max_new_tokens=8, eos_token_id=eos))
    assert {r.finish_reason for r in responses} == {"stop", "length"}
    for response in responses:
        assert eos not in response.token_ids[:-1]
        assert (response.token_ids[-1] == eos) == (response.finish_reason == "stop")
        assert len(response.token_ids) == 8 or response.finish_reason == "stop"


def test_an_end_at_the_last_token_is_a_stop(model: Any) -> None:
    whole = draw_samples(model, max_new_tokens=6)[0][0].token_ids
    position = next(i for i in range(1, 6) if whole[i] not in whole[:i])
    cut = draw_samples(model, max_new_tokens=position + 1, eos_token_id=whole[position])[0][0]
    assert cut.token_ids == whole[: position + 1]
    assert cut.finish_reason == "stop"


def test_a_batch_that_has_ended_is_not_drawn_further(model: Any) -> None:
    first = [r.token_ids[0] for r in flat(draw_samples(model, [PROMPTS[0]], max_new_tokens=1))]
    drawn: list[int] = []
    responses = draw_samples(
        model,
        [PROMPTS[0]],
        samples_per_prompt=1,
        max_new_tokens=50,
        eos_token_id=first[0],
        progress=drawn.append,
    )[0]
    assert drawn == [1]
    assert responses[0].token_ids == first[:1]


def test_progress_counts_the_tokens(model: Any) -> None:
    drawn: list[int] = []
    tokens = [t for r in flat(draw_samples(model, max_new_tokens=8)) for t in r.token_ids]
    eos = max(set(tokens), key=tokens.count)
    groups = draw_samples(model, max_new_tokens=8, eos_token_id=eos, progress=drawn.append)
    assert sum(drawn) == sum(len(r.token_ids) for r in flat(groups))
    assert drawn == sorted(drawn, reverse=True)


def test_the_seed_decides_everything(model: Any) -> None:
    def tokens(seed: int) -> list[list[int]]:
        groups = draw_samples(model, max_new_tokens=6, seed=seed)
        return [r.token_ids for r in flat(groups)]

    before = torch.get_rng_state()
    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_sample_draws_does_not_depend_on_the_others(model: Any) -> None:
    """So that ranks, batches and later runs can share samples out as they like. Past the first block of uniform numbers too."""
    together = draw_samples(model, max_new_tokens=70)
    for number, index in ((0, 0), (3, 2)):
        generators = [[torch_generator(0, number, index)]]
        [[alone]] = draw_samples(model, [PROMPTS[number]], max_new_tokens=70, generators=generators)
        assert alone.token_ids == together[number][index].token_ids


@pytest.mark.parametrize("counts", [[1], [1, 1, 1, 1, 2], [0, 0, 0, 0, 0]])
def test_each_prompt_has_as_many_generators(model: Any, counts: list[int]) -> None:
    with pytest.raises(ValueError, match="generators for 5 prompts"):
        draw_samples(model, generators=[[torch_generator(0)] * count for count in counts])


def test_an_empty_prompt_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="a prompt is empty"):
        draw_samples(model, [[5], []])


class DivergedModel(torch.nn.Linear):
    """Gives logits that are not numbers."""

    def __init__(self, model: Any) -> None:
        super().__init__(1, 1)
        self.inner = [model]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner[0](*args, **kwargs)
        output.logits.fill_(torch.nan)
        return output


def test_a_diverged_model_is_named(model: Any) -> None:
    with pytest.raises(RunError, match="logits are not numbers"):
        draw_samples(DivergedModel(model), max_new_tokens=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0, not 0.0"),
        ({"temperature": float("nan")}, "temperature must be above 0, not nan"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, not 0.0"),
        ({"top_p": 1.01}, "top_p must be above 0 and at most 1, not 1.01"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
    ],
)
def test_decoding_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoding(**changes)


# stop strings


def letters(token_ids: Sequence[int]) -> str:
    """A tokenizer whose tokens are single letters."""
    return "".join(chr(ord("a") + token_id % 26) for token_id in token_ids)


@pytest.mark.parametrize("stop", [("e",), ("ab", "q"), ("xyz", "m")])
def test_the_first_stop_string_ends_a_response(model: Any, stop: tuple[str, ...]) -> None:
    free = flat(draw_samples(model, max_new_tokens=90))
    ended = flat(draw_samples(model, max_new_tokens=90, stop=stop, decode=letters))
    assert any(any(string in letters(response.token_ids) for string in stop) for response in free)
    for whole, cut in zip(free, ended, strict=True):
        text = letters(whole.token_ids)
        ends = [text.find(string) + len(string) for string in stop if string in text]
        assert cut.token_ids == whole.token_ids[: min(ends, default=90)]
        assert cut.finish_reason == ("stop" if ends else "length")
        assert cut.log_probs == pytest.approx(whole.log_probs[: len(cut.log_probs)], abs=1e-5)


def test_stop_strings_need_the_tokens_text(model: Any) -> None:
    with pytest.raises(ValueError, match="needs `decode`"):
        draw_samples(model, stop=("e",))
    with pytest.raises(ValueError, match="empty string"):
        Decoding(stop=("",))
