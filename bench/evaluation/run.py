"""Seconds of sampling an evaluation's pools against lm-evaluation-harness's `repeats`, in turn, on one thread.

    python -m bench.evaluation.run --data-dir DIR                    # DIR/gsm8k/{train,test}.jsonl; about an hour
    python -m bench.evaluation.run --data-dir DIR --questions 10 --samples 32 --rounds 2

Both draw `samples` responses to each of the first questions of GSM8K's test set from one small model, trained before on its training set
so that responses end by themselves: at temperature 0.7, top-p 0.95, without worked examples, at most 256 new tokens, ended by the
end-of-text token or "Question:". Each side is measured whole: `answer_problems` with its store and its grading; `simple_evaluate` with
its filters and metric, without bootstrap, without logging samples, and without reading definitions of tasks.

lm-evaluation-harness gets, of the batch sizes tried first on fewer questions, the one with the most responses a second (its `auto` is 64
wherever that fits, after trial passes of the longest length), and no stop string but the one. With `repeats` it sends each request so many
times to `generate`, batches of equal prompts in a row: each row prefills its prompt again, and a batch goes on until its longest response
ends. It scores the first response of each question alone.

In each round both sides answer the same share of the questions, one after the other. Seconds are those of the process on its one thread,
because other programs may share the machine; wall-clock seconds are beside them. The ratio is of all seconds for equally many responses,
and of each round for its spread; tokens are counted up to the end of each response.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TEMPERATURE, TOP_P, MAX_NEW_TOKENS, STOP = 0.7, 0.95, 256, "Question:"
MAX_POSITIONS = 1024
BATCH_ROWS, BATCH_TOKENS, LEARNING_RATE = 16, 320, 3e-3
Measurement = dict[str, float]


def main() -> None:
    """Train, measure, print, and write what there is after each round."""
    arguments = _parse()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    import torch

    from rlprior.evaluation.harness import require_harness
    from rlprior.runs.files import write_json
    from rlprior.runs.provenance import provenance

    report: dict[str, Any] = {
        "command": "python -m bench.evaluation.run " + " ".join(sys.argv[1:]),
        **provenance(),
        "lm_eval": require_harness(),
        "threads": 1,
        "note": arguments.note,
        "preset": arguments.preset,
        "questions": arguments.questions,
        "samples_per_question": arguments.samples,
        "decoding": {
            "temperature": TEMPERATURE,
            "top_p": TOP_P,
            "max_new_tokens": MAX_NEW_TOKENS,
            "stop": STOP,
        },
    }
    torch.set_num_threads(1)
    model, tokenizer, report["training"] = _train(arguments)
    problems, documents = _read_questions(arguments.data_dir, arguments.questions)
    batch_size, report["lm_eval_responses_per_second"] = _choose_batch_size(
        model, tokenizer, documents, arguments
    )
    report |= {"lm_eval_batch_size": batch_size, "rounds": []}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for number in range(arguments.rounds):
        share = slice(number, None, arguments.rounds)
        calls = {
            "rlprior": functools.partial(_answer, model, tokenizer, problems[share], arguments.samples),
            "lm_eval": functools.partial(
                _repeat, model, tokenizer, documents[share], arguments.samples, batch_size
            ),
        }
        order = list(calls)[:: 1 if number % 2 else -1]
        measured = {name: _measure(functools.partial(calls[name], seed=number)) for name in order}
        report["rounds"].append({**measured, "load_average": os.getloadavg()[0]})
        report["speed_ratio"] = _ratios(report["rounds"])
        write_json(arguments.out, report)
        print(f"round {number + 1}: {json.dumps(report['rounds'][-1])}", flush=True)
    print(f"{json.dumps(report['speed_ratio'])}\nwritten: {arguments.out}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with gsm8k/{train,test}.jsonl")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--steps", type=int, default=150, help="of training")
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--samples", type=int, default=128, help="of each question")
    parser.add_argument(
        "--rounds", type=int, default=5, help="parts of the questions, each asked by both sides in turn"
    )
    parser.add_argument(
        "--batch-sizes",
        nargs="+",
        default=["32", "64", "128", "256", "512"],
        help="of lm-evaluation-harness",
    )
    parser.add_argument(
        "--trial-questions", type=int, default=2, help="questions that each batch size is tried on"
    )
    parser.add_argument("--note", default="", help="what else the machine did, for the report")
    parser.add_argument("--out", type=Path, default=Path("bench/results/evaluation-cpu.json"))
    return parser.parse_args()


def _train(arguments: argparse.Namespace) -> tuple[Any, Any, dict[str, float]]:
    """A model of the preset after some steps on GSM8K's training set, its tokenizer, and how the training went."""
    import torch

    from rlprior.data.tokenizer import train_tokenizer
    from rlprior.models.causal_lm import build_model
    from rlprior.models.presets import ModelConfig
    from rlprior.tasks.benchmarks.mathematics import GSM8K
    from rlprior.tasks.benchmarks.sources import read_source

    assert isinstance(GSM8K.shots, tuple)
    records = [record for source in GSM8K.shots for record in read_source(source, arguments.data_dir)]
    texts = [GSM8K.read(record).text for record in records]
    tokenizer: Any = train_tokenizer(texts, vocab_size=2048)
    model: Any = build_model(
        ModelConfig(preset=arguments.preset), tokenizer, max_positions=MAX_POSITIONS, seed=0
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    start, loss = time.perf_counter(), float("nan")
    rows = itertools.cycle(texts)
    for step in range(arguments.steps):
        for group in optimizer.param_groups:  # linearly down to a tenth
            group["lr"] = LEARNING_RATE * (1 - 0.9 * step / arguments.steps)
        batch = [tokenizer(text)["input_ids"] for text in itertools.islice(rows, BATCH_ROWS)]
        batch = [[*ids, tokenizer.eos_token_id][:BATCH_TOKENS] for ids in batch]
        padded = tokenizer.pad({"input_ids": batch}, padding_side="right", return_tensors="pt")
        labels = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)
        output = model(**padded, labels=labels)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = output.loss.item()
    print(
        f"trained {arguments.steps} steps in {time.perf_counter() - start:.0f} s: loss {loss:.2f}", flush=True
    )
    return model.eval(), tokenizer, {"steps": arguments.steps, "last_loss_nats": loss}


def _read_questions(data_dir: Path, number: int) -> tuple[list[Any], list[dict[str, Any]]]:
    """The first questions of the test set, as our problems and as their documents; both put them in the same words."""
    from rlprior.evaluation.crosscheck import read_documents
    from rlprior.tasks.benchmarks.benchmark import load_benchmark
    from rlprior.tasks.benchmarks.mathematics import GSM8K

    benchmark = dataclasses.replace(GSM8K, instruction="")
    problems = load_benchmark(benchmark, num_shots=0, data_dir=data_dir)[:number]
    return problems, list(read_documents("gsm8k", data_dir).values())[:number]


def _choose_batch_size(
    model: Any, tokenizer: Any, documents: Sequence[dict[str, Any]], arguments: argparse.Namespace
) -> tuple[str, dict[str, float]]:
    """The batch size with which lm-evaluation-harness is fastest on the first questions, and responses a second of each; one alone is taken untried."""
    few = documents[: arguments.trial_questions]
    _repeat(model, tokenizer, few[:1], 2, "2", seed=0)  # whatever is done once
    tried: dict[str, float] = {}
    if len(arguments.batch_sizes) == 1:
        return arguments.batch_sizes[0], tried
    for batch_size in arguments.batch_sizes:
        call = functools.partial(_repeat, model, tokenizer, few, arguments.samples, batch_size, seed=0)
        found = _measure(call)
        tried[batch_size] = found["responses"] / found["cpu_seconds"]
        print(
            f"lm-evaluation-harness, batch size {batch_size}: {tried[batch_size]:.1f} responses/s", flush=True
        )
    return max(tried, key=lambda size: tried[size]), tried


def _measure(call: Callable[[], tuple[int, int]]) -> Measurement:
    """Responses, their tokens, and the seconds, of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    responses, tokens = call()
    return {
        "responses": responses,
        "tokens": tokens,
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.perf_counter() - wall,
    }


def _answer(
    model: Any, tokenizer: Any, problems: Sequence[Any], samples: int, *, seed: int
) -> tuple[int, int]:
    from rlprior.sampling.answers import answer_problems
    from rlprior.sampling.sampler import Decoding

    with tempfile.TemporaryDirectory() as directory:
        columns = answer_problems(
            model,
            tokenizer,
            problems,
            name="gsm8k",
            path=Path(directory) / "gsm8k.jsonl",
            model_identity="benchmark",
            samples_per_problem=samples,
            decoding=Decoding(
                temperature=TEMPERATURE, top_p=TOP_P, max_new_tokens=MAX_NEW_TOKENS, stop=(STOP,)
            ),
            seed=seed,
            progress=lambda _: None,
        )
    return samples * len(problems), sum(columns["num_tokens"])


def _repeat(
    model: Any,
    tokenizer: Any,
    documents: Sequence[dict[str, Any]],
    samples: int,
    batch_size: str,
    *,
    seed: int,
) -> tuple[int, int]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from rlprior.evaluation.harness import TASK_FILES, make_task

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    counts: list[int] = []

    class CountingLM(HFLM):
        """Counts the tokens of each response, up to its end."""

        def _model_generate(self, context: Any, *rest: Any, **options: Any) -> Any:
            ids = super()._model_generate(context, *rest, **options)
            new = ids[:, context.shape[1] :]
            before_end = (new == tokenizer.eos_token_id).cumsum(1) == 0
            counts.extend((before_end.sum(1) + 1).clamp_max(new.shape[1]).tolist())
            return ids

    task = make_task(
        "gsm8k",
        TASK_FILES["gsm8k"]["gsm8k"],
        documents,
        repeats=samples,
        generation_kwargs={
            "until": [STOP],
            "do_sample": True,
            "temperature": TEMPERATURE,
            "top_p": TOP_P,
            "top_k": 0,
            "max_gen_toks": MAX_NEW_TOKENS,
        },
    )
    simple_evaluate(
        model=CountingLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),  # else it reads all its definitions first
        bootstrap_iters=0,
        log_samples=False,
        torch_random_seed=seed,
    )
    return len(counts), sum(counts)


def _ratios(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many times as fast the built-in evaluation is."""

    def ratio(rounds: Sequence[dict[str, Any]], unit: str, seconds: str) -> float:
        speeds = [
            sum(one[side][unit] for one in rounds) / sum(one[side][seconds] for one in rounds)
            for side in ("rlprior", "lm_eval")
        ]
        return speeds[0] / speeds[1]

    return {
        "of_all_rounds": ratio(rounds, "responses", "cpu_seconds"),
        "of_each_round": [ratio([one], "responses", "cpu_seconds") for one in rounds],
        "of_all_rounds_in_tokens": ratio(rounds, "tokens", "cpu_seconds"),
        "of_all_rounds_by_wall_clock": ratio(rounds, "responses", "wall_seconds"),
    }


if __name__ == "__main__":
    main()
