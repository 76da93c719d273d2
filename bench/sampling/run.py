"""Tokens a second of the built-in sampler against Hugging Face's `generate`, in turn, on one thread.

    python -m bench.sampling.run                                   # about ten minutes
    python -m bench.sampling.run --presets tiny --rows 128 --rounds 3

All draw from one untrained model of the preset with the demo's vocabulary size, `samples_per_prompt` responses to each prompt (the demo's
addition and subtraction problems) in one batch, at temperature 1 from the whole distribution, with the same end-of-text token and limit.

- ragged: the end-of-text logit has a bias, the same for all, that makes lengths geometric: mean 42, limit 256.
- even: no response ends before 48 tokens, so that no row can be dropped: what is left is the cost of a step.

Contenders: `rlprior`, with oneDNN in its linear layers where `is_onednn_faster`; `generate` with its default cache; with its static
cache; with its default cache and the same linear layers as `rlprior`. None is compiled. Seconds are those of the process on its one thread,
because other programs may share the machine; wall-clock seconds are beside them. Tokens are counted up to the end of each response; a ratio
is of all tokens over all seconds, and of neighbours for its spread. Each contender first makes one short call to warm up.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEAN_TOKENS = 42
MAX_RAGGED_TOKENS, MAX_EVEN_TOKENS = 256, 48
SAMPLES_PER_PROMPT = 8
CONTENDERS = ("rlprior", "generate", "generate_static_cache", "generate_same_linear_layers")


def main() -> None:
    """Measure, print and write."""
    arguments = _parse()
    import torch

    from rlprior.models.onednn import is_onednn_faster
    from rlprior.runs.provenance import provenance

    torch.set_num_threads(1)
    cases = [
        _compare(preset, lengths, num_rows, arguments)
        for preset in arguments.presets
        for lengths in arguments.lengths
        for num_rows in arguments.rows
    ]
    report = {
        "command": "python -m bench.sampling.run " + " ".join(sys.argv[1:]),
        **provenance(),
        "threads": 1,
        "note": arguments.note,
        "onednn_in_linear_layers": is_onednn_faster(),
        "cases": cases,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {arguments.out}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=["tiny", "tiny-moe"])
    parser.add_argument("--lengths", nargs="+", choices=["ragged", "even"], default=["ragged", "even"])
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 128], help="responses in a batch")
    parser.add_argument(
        "--rounds",
        type=int,
        default=4,
        help="measurements of each contender; twice as many of few rows",
    )
    parser.add_argument("--note", default="", help="what else the machine did, for the report")
    parser.add_argument("--out", type=Path, default=Path("bench/results/sampling-cpu.json"))
    return parser.parse_args()


def _compare(preset: str, lengths: str, num_rows: int, arguments: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer, prompts = _set_up(preset, lengths)
    prompts = prompts[: num_rows // SAMPLES_PER_PROMPT]
    limit = MAX_EVEN_TOKENS if lengths == "even" else MAX_RAGGED_TOKENS
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for name in CONTENDERS:
        _measure(name, model, tokenizer, prompts, 4, seed=0)
    # the fewer rows, the more the longest of them decides: more rounds even that out
    for number in range(arguments.rounds * min(2, max(1, 128 // num_rows))):
        for name in CONTENDERS if number % 2 else reversed(CONTENDERS):
            found[name].append(_measure(name, model, tokenizer, prompts, limit, seed=number))
    speeds = {name: _pooled_speed(found[name]) for name in CONTENDERS}
    ratios = {
        name: {
            "of_all_rounds": speeds["rlprior"] / speeds[name],
            "of_each_round": [
                _pooled_speed([ours]) / _pooled_speed([theirs])
                for ours, theirs in zip(found["rlprior"], found[name], strict=True)
            ],
        }
        for name in CONTENDERS[1:]
    }
    tokens = sum(one["tokens"] for name in CONTENDERS for one in found[name])
    mean_tokens = tokens / num_rows / sum(map(len, found.values()))
    print(
        f"{preset}, {lengths} (mean {mean_tokens:.0f}), {num_rows} rows: {speeds['rlprior']:,.0f} tokens/s",
        end="",
    )
    for name, ratio in ratios.items():
        each = ratio["of_each_round"]
        print(f"; {ratio['of_all_rounds']:.2f}x of {name} ({min(each):.2f}-{max(each):.2f})", end="")
    print(flush=True)
    return {
        "preset": preset,
        "lengths": lengths,
        "num_rows": num_rows,
        "max_new_tokens": limit,
        "mean_response_tokens": mean_tokens,
        "tokens_per_second": speeds,
        "speed_ratio": ratios,
        "measurements": found,
    }


def _pooled_speed(measurements: list[dict[str, float]]) -> float:
    """All tokens over all their seconds: long and short responses of few rows even out."""
    return sum(one["tokens"] for one in measurements) / sum(one["cpu_seconds"] for one in measurements)


@functools.cache
def _set_up(preset: str, lengths: str) -> tuple[Any, Any, list[list[int]]]:
    """The model with a bias in its head, its tokenizer, and the prompts."""
    import torch

    from rlprior.data.embedded import read_english
    from rlprior.data.tokenizer import encode_prompt, train_tokenizer
    from rlprior.models.causal_lm import build_model
    from rlprior.models.presets import ModelConfig
    from rlprior.tasks.synthetic import generate_problems

    problems = generate_problems(
        families=["addition", "subtraction"], difficulties=[2, 3], num_problems=2000, split="train", seed=0
    )
    texts = [text for text, _ in itertools.islice(read_english(), 200)]
    tokenizer: Any = train_tokenizer([*texts, *(problem.text for problem in problems)], vocab_size=1024)
    prompts = [encode_prompt(tokenizer, problem.prompt) for problem in problems[:64]]
    # logits so small that the end of text has much the same probability everywhere
    config = ModelConfig(preset=preset, initializer_range=0.02)
    model: Any = build_model(config, tokenizer, max_positions=512, seed=0).eval()
    end_bias = -1e4 if lengths == "even" else math.log((len(tokenizer) - 1) / (MEAN_TOKENS - 1))
    bias = torch.zeros(len(tokenizer))
    bias[tokenizer.eos_token_id] = end_bias
    model.lm_head.bias = torch.nn.Parameter(bias)
    return model, tokenizer, prompts


def _measure(
    name: str, model: Any, tokenizer: Any, prompts: list[list[int]], limit: int, *, seed: int
) -> dict[str, float]:
    """Tokens, their seconds, and the longest response, of one call."""
    from rlprior.models.onednn import multiplying_with_onednn

    call: Callable[..., list[int]] = _sample if name == "rlprior" else _generate
    options = {"cache_implementation": "static"} if name == "generate_static_cache" else {}
    same = name == "generate_same_linear_layers"
    with multiplying_with_onednn(model) if same else contextlib.nullcontext():
        wall, cpu = time.perf_counter(), time.process_time()
        lengths = call(model, tokenizer, prompts, limit, seed, **options)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"tokens": sum(lengths), "longest": max(lengths), "cpu_seconds": cpu, "wall_seconds": wall}


def _sample(model: Any, tokenizer: Any, prompts: list[list[int]], limit: int, seed: int) -> list[int]:

    from rlprior.sampling.sampler import Decoding, sample
    from rlprior.seeding import torch_generator

    groups = sample(
        model,
        prompts,
        decoding=Decoding(max_new_tokens=limit),
        eos_token_id=tokenizer.eos_token_id,
        generators=[
            [torch_generator(seed, number, index) for index in range(SAMPLES_PER_PROMPT)]
            for number in range(len(prompts))
        ],
    )
    return [len(response.token_ids) for group in groups for response in group]


def _generate(
    model: Any, tokenizer: Any, prompts: list[list[int]], limit: int, seed: int, **options: Any
) -> list[int]:
    import torch

    torch.manual_seed(seed)
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    ids = model.generate(
        input_ids=padded["input_ids"],
        attention_mask=padded["attention_mask"],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=limit,
        num_return_sequences=SAMPLES_PER_PROMPT,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    new = ids[:, padded["input_ids"].shape[1] :]
    before_end = (new == tokenizer.eos_token_id).cumsum(1) == 0
    return (before_end.sum(1) + 1).clamp_max(new.shape[1]).tolist()


if __name__ == "__main__":
    main()
