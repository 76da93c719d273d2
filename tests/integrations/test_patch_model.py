"""A patched model: the model's own loss and gradients where shaping is zero, no logits, and everything else untouched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from tests.integrations.small_models import (
    FAMILIES,
    SHAPING,
    VOCABULARY,
    assert_same_gradients,
    examples,
    expected_gradients,
    expected_loss,
    gradients,
    num_targets,
    pad,
    small_model,
)
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PhiConfig,
    PhiForCausalLM,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from rlprior.integrations.huggingface import patch_model, unpatch_model
from rlprior.objectives import CrossEntropy, RewardShaping, SampledReward


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [None, 7])
def test_zero_shaping_is_the_models_own_loss(family: str, count: int | None):
    """Router losses, softcaps and logit factors included, with and without a count of the whole batch."""
    model, batch = small_model(family), pad(examples())
    own = model(**batch, num_items_in_batch=count)
    own.loss.backward()
    expected = gradients(model)
    patch_model(model, RewardShaping())
    patched = model(**batch, num_items_in_batch=count)
    patched.loss.backward()
    torch.testing.assert_close(
        patched.loss, own.loss, rtol=1e-5, atol=0
    )  # a sum of some fifty float32 losses
    assert_same_gradients(gradients(model), expected)
    assert patched.logits is None
    assert own.get("aux_loss") is None or torch.equal(patched.aux_loss, own.aux_loss)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "cohere"])
def test_shaping_is_that_of_the_models_logits(family: str):
    model = small_model(family)
    patch_model(model, SHAPING, chunk_rows=5)
    model(**pad(examples())).loss.backward()
    assert_same_gradients(gradients(model), expected_gradients(family=family))


def test_shifted_labels_and_token_weights():
    model, batch = small_model(), pad(examples())
    patch_model(model, SHAPING)
    labels = batch.pop("labels")
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    whole = model(**batch, labels=labels).loss
    assert torch.equal(model(**batch, shift_labels=shifted).loss, whole)
    assert torch.equal(model(**batch, labels=labels, shift_labels=shifted).loss, whole)
    weights = torch.zeros_like(labels, dtype=torch.float32)
    weights[0] = 2.0  # the first document alone counts, twice
    first = model(**pad(examples()[:1]), num_items_in_batch=num_targets(examples())).loss
    weighted = model(**batch, labels=labels, token_weights=weights).loss
    torch.testing.assert_close(weighted, 2 * first, rtol=1e-5, atol=0)
    weighted_shifted = model(
        **batch, shift_labels=shifted, token_weights=nn.functional.pad(weights[:, 1:], (0, 1))
    ).loss
    assert torch.equal(weighted_shifted, weighted)


def test_no_label_counts():
    model, batch = small_model(), pad(examples())
    patch_model(model, SHAPING)
    batch["labels"][:] = -100
    outputs = model(**batch)
    outputs.loss.backward()
    assert outputs.loss == 0
    assert all(not gradient.any() for gradient in gradients(model).values())


def test_without_labels_nothing_changes():
    model = small_model().eval()
    prompt = torch.tensor([[5, 6, 7]])
    logits, text = model(prompt).logits, model.generate(prompt, max_new_tokens=4, do_sample=False)
    patch_model(model, SHAPING)
    assert torch.equal(model(prompt).logits, logits)
    assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False), text)


def test_evaluation_returns_logits_unless_told_otherwise():
    model, batch = small_model("gemma2").eval(), pad(examples())
    expected = expected_loss(model, batch, SHAPING, num_targets(examples()))
    logits = model(**batch).logits
    for eval_logits in (True, False):
        patch_model(model, SHAPING, eval_logits=eval_logits)
        outputs = model(**batch)
        torch.testing.assert_close(outputs.loss, expected, rtol=1e-5, atol=0)
        assert torch.equal(outputs.logits, logits) if eval_logits else outputs.logits is None


def test_metrics_are_sums_over_the_targets():
    model, batch = small_model(), pad(examples())
    cross_entropy = model(**batch).loss
    count = num_targets(examples())
    patch_model(model, SHAPING, metrics=True)
    outputs = model(**batch, num_items_in_batch=2 * count)
    assert outputs.num_targets == count
    torch.testing.assert_close(outputs.objective_sum, outputs.loss * 2 * count)
    torch.testing.assert_close(outputs.cross_entropy_sum / count, cross_entropy, rtol=1e-5, atol=0)
    log_probs = (
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        .logits[:, :-1]
        .log_softmax(-1)
    )
    kept = batch["labels"][:, 1:] != -100
    torch.testing.assert_close(outputs.entropy_sum, -(log_probs.exp() * log_probs).sum(-1)[kept].sum())
    torch.testing.assert_close(
        outputs.head_mass_sum, log_probs.exp().topk(SHAPING.top_k).values.sum(-1)[kept].sum()
    )
    assert outputs.num_correct == (log_probs.argmax(-1) == batch["labels"][:, 1:])[kept].sum()
    assert not outputs.entropy_sum.requires_grad


def test_draws_go_on_from_call_to_call():
    """Two calls of one patched model draw differently, and patching again starts from the seed."""
    model, batch = small_model(), pad(examples())
    losses = []
    for _ in range(2):
        patch_model(model, SampledReward(beta=-0.25, head_reward=0.5, tail_reward=-0.5, seed=3))
        losses.append([float(model(**batch).loss.detach()) for _ in range(2)])
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]


def test_unpatching_and_patching_again():
    model, batch = small_model(), pad(examples())
    before = {module: dict(vars(module)) for module in model.modules()}
    own = model(**batch).loss
    patch_model(model, CrossEntropy())
    patch_model(model, SHAPING)
    torch.testing.assert_close(
        model(**batch).loss, expected_loss(model, batch, SHAPING, num_targets(examples())), rtol=1e-5, atol=0
    )
    unpatch_model(model)
    unpatch_model(model)
    assert {module: vars(module).keys() for module in model.modules()} == {
        module: attributes.keys() for module, attributes in before.items()
    }
    assert torch.equal(model(**batch).loss, own)


def test_saved_and_copied_models(tmp_path: Any):
    model, batch = small_model(), pad(examples())
    names = model.state_dict().keys()
    patch_model(model, SHAPING)
    shaped = model(**batch).loss
    assert model.state_dict().keys() == names

    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert torch.equal(twin(**batch).loss, shaped)  # the copy looks at its own head
    twin.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).train()
    assert loaded(**batch).logits is not None
    patch_model(loaded, SHAPING)
    assert torch.equal(loaded(**batch).loss, shaped)
    unpatch_model(twin)
    assert twin(**batch).logits is not None


def test_gradient_checkpointing():
    model = small_model()
    model.activation_checkpointing_enable()
    patch_model(model, SHAPING)
    model(**pad(examples()), use_cache=False).loss.backward()
    assert_same_gradients(gradients(model), expected_gradients())


def test_compiled_model():
    model = small_model()
    patch_model(model, SHAPING)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        compiled(**pad(examples())).loss.backward()
        assert_same_gradients(gradients(model), expected_gradients())


def test_autocast_and_low_precision_weights():
    """The loss is that of bfloat16 logits: two sides that round alike agree to a few of its roundings, 2^-8 each."""
    model, batch = small_model(), pad(examples())
    with torch.autocast("cpu", torch.bfloat16):
        expected = expected_loss(model, batch, SHAPING, num_targets(examples()))
        patch_model(model, SHAPING)
        torch.testing.assert_close(model(**batch).loss, expected, rtol=2e-2, atol=0)
    model.to(torch.bfloat16)
    torch.testing.assert_close(model(**batch).loss, expected, rtol=5e-2, atol=0)


def test_tuples():
    model, batch = small_model(), pad(examples())
    patch_model(model, SHAPING)
    outputs = model(**batch, return_dict=False, use_cache=False)
    assert isinstance(outputs, tuple)
    assert torch.equal(outputs[0], model(**batch).loss)


class SineOfLogits(Qwen3ForCausalLM):
    """Does to its logits what no setting says."""

    def forward(self, input_ids: Any, labels: Any = None, **kwargs: Any) -> Any:
        logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state).sin()
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class LearnedFactor(Qwen3ForCausalLM):
    """Multiplies its logits by a parameter."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, input_ids: Any, labels: Any = None, **kwargs: Any) -> Any:
        logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state) * self.factor
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class TripledLinear(nn.Linear):
    """A linear layer that is none."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(input)


def refused_models() -> dict[str, tuple[Any, str]]:
    shape = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    no_head = small_model()
    no_head.lm_head = nn.Sequential(no_head.lm_head)
    tripled, hooked = small_model(), small_model()
    tripled.lm_head = TripledLinear(16, VOCABULARY, bias=False)
    add_hook_to_module(hooked.lm_head, ModelHook())
    return {
        "bias on the head": (PhiForCausalLM(PhiConfig(**shape, num_attention_heads=2)), "has bias"),
        "head of another kind": (no_head, "has a torch.*Sequential as its head"),
        "head that does more": (tripled, "TripledLinear. has a forward pass of its own"),
        "head with a hook of accelerate": (hooked, "has a forward pass of its own"),
        "no head": (small_model().model, "needs a causal language model"),
        "wrapped": (nn.DataParallel(small_model()), "pass the model inside"),
        "encoder and decoder": (
            T5ForConditionalGeneration(
                T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
            ),
            "needs a causal language model|encoder-decoder",
        ),
    }


@pytest.mark.parametrize("name", refused_models())
def test_models_that_it_cannot_serve(name: str):
    model, message = refused_models()[name]
    with pytest.raises(ValueError, match=message):
        patch_model(model, SHAPING)


def test_calls_that_it_cannot_serve():
    model, batch = small_model(), pad(examples())
    with pytest.raises(ValueError, match="shaping must be an instance"):
        patch_model(model, "cross_entropy")  # pyright: ignore[reportArgumentType]
    patch_model(model, SHAPING)
    with pytest.raises(RuntimeError, match="labels by keyword"):
        model(batch["input_ids"], None, None, None, None, batch["labels"])
    with pytest.raises(ValueError, match="targets must be in"):
        model(input_ids=batch["input_ids"], labels=batch["input_ids"] + VOCABULARY)
    assert model(**batch).loss.isfinite()  # a failed call leaves nothing behind
    model.set_output_embeddings(nn.Linear(16, VOCABULARY, bias=False))
    with pytest.raises(RuntimeError, match="call patch_model again"):
        model(**batch)
    patch_model(model, SHAPING)
    assert model(**batch).loss.isfinite()
    model.forward = lambda *args, **kwargs: None
    with pytest.raises(RuntimeError, match="was replaced since patch_model"):
        unpatch_model(model)


def test_logits_changed_in_an_unknown_way_are_refused():
    model = small_model()
    model.__class__ = SineOfLogits
    patch_model(model, SHAPING)
    with pytest.raises(ValueError, match="changes its logits in a way"):
        model(**{name: value for name, value in pad(examples()).items() if name != "attention_mask"})


def test_a_factor_is_read_at_every_call_and_may_not_be_learned():
    model = LearnedFactor(small_model().config).train()
    batch = {name: value for name, value in pad(examples()).items() if name != "attention_mask"}
    patch_model(model, RewardShaping())
    with torch.no_grad():  # nothing is learned here
        model(**batch)
    with pytest.raises(ValueError, match="is learned, and patch_model knows fixed factors only"):
        model(**batch)
    model.factor.requires_grad_(False)
    losses = []
    for factor in (2.0, 0.5):
        model.factor.fill_(factor)
        losses.append(model(**batch).loss)
    unpatch_model(model)
    torch.testing.assert_close(losses[1], model(**batch).loss, rtol=1e-5, atol=0)
    assert losses[0] != losses[1]


def test_a_head_in_another_place():
    """GPT-2 keeps its layers under another name than `model`."""
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, **shape, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    ).train()
    own = model(**pad(examples())).loss
    patch_model(model, RewardShaping())
    torch.testing.assert_close(model(**pad(examples())).loss, own, rtol=1e-5, atol=0)
