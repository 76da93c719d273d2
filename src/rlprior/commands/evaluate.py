"""`rlprior evaluate`: a suite of benchmarks, or held-out likelihood and tasks of your own, on a Hugging Face folder."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlprior.commands.options import add_out, at_least_one, load_file, make_alone
from rlprior.config import UsageError

SUMMARY = "a suite of benchmarks, or held-out likelihood and tasks of your own, on a Hugging Face folder"
EXAMPLES = [
    "rlprior evaluate MODEL --suite paper-base --data-dir data --out runs/ce-paper",
    "rlprior evaluate MODEL --suite paper-base --benchmarks gsm8k mmlu --samples 8 --max-questions 200",
    "rlprior evaluate MODEL --suite paper-rl --samples 128 --max_new_tokens=16384",
    "rlprior evaluate runs/ce/checkpoints/step-00000400 --config evaluate.toml --out runs/ce-eval",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes beside settings."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--suite",
        metavar="NAME",
        help="benchmarks: paper-base, paper-rl, remit-base, remit-post or remit-extra",
    )
    what.add_argument(
        "--config", type=Path, metavar="FILE.toml", help="held-out text and tasks of your own instead"
    )
    parser.add_argument(
        "--samples",
        type=at_least_one,
        metavar="M",
        help="answers drawn to each question of a suite (default: 128); asking for more later goes on with those there are",
    )
    parser.add_argument(
        "--max-questions",
        type=at_least_one,
        metavar="N",
        help="of each benchmark, at random, the same for every model (default: all)",
    )
    parser.add_argument("--benchmarks", nargs="+", metavar="NAME", help="of the suite these alone")
    parser.add_argument(
        "--skip-missing", action="store_true", help="leave out the benchmarks whose data is not there"
    )
    parser.add_argument(
        "--unsafe-exec", action="store_true", help="run programs of the model where they cannot be isolated"
    )
    add_out(parser)


def run(known: argparse.Namespace, overrides: list[str]) -> int:
    """Measure one model."""
    return _evaluate_suite(known, overrides) if known.suite else _evaluate_config(known, overrides)


def _evaluate_suite(known: argparse.Namespace, overrides: list[str]) -> int:
    from rlprior.config import apply_overrides, decode
    from rlprior.evaluation import suite
    from rlprior.models.causal_lm import require_model_folder
    from rlprior.reports.suite_table import write_table
    from rlprior.runs.identity import input_identity
    from rlprior.study.plan import plan_run

    request = {
        "samples_per_question": known.samples,
        "max_questions": known.max_questions,
        "benchmarks": known.benchmarks,
        "skip_missing": known.skip_missing,
    }
    settings: dict[str, Any] = {
        "target": str(known.model.resolve()),
        "suite": known.suite,
        "request": {name: value for name, value in request.items() if value is not None},
        "unsafe_exec": known.unsafe_exec,
    }
    if known.data_dir:
        settings["data_dir"] = str(Path(known.data_dir).resolve())
    config = decode(
        suite.SuiteRunConfig, apply_overrides(settings, overrides), source=f"evaluate --suite {known.suite}"
    )
    config = replace(config, precision=suite.resolve_precision(config.precision))
    require_model_folder(known.model)
    what = suite.describe_request(config)  # before a folder is claimed: what is missing is told at once
    label = f"evaluate {known.model.name} on {known.suite}"
    planned = plan_run(
        "suite",
        config,
        label=label,
        directory=(known.out or Path("runs") / label.replace(" ", "-")).resolve(),
        inputs={"target": input_identity(known.model), "data_dir": ""},
    )
    if planned.is_done and not suite.is_answered(planned.directory, config):
        (
            planned.directory / "result.json"
        ).unlink()  # more is asked or less, or the data or the grading has changed
    print(what)
    code = make_alone([planned], known)
    if not known.dry_run:
        print(write_table(planned.directory))
    return code


def _evaluate_config(known: argparse.Namespace, overrides: list[str]) -> int:
    from rlprior.evaluation.stage import EvaluationRunConfig, describe_results
    from rlprior.runs.identity import input_identity
    from rlprior.study.config import EvaluateFile
    from rlprior.study.plan import plan_data, plan_run, task_inputs

    for name in ("samples", "max_questions", "benchmarks", "skip_missing", "unsafe_exec"):
        if getattr(known, name):
            raise UsageError(f"--{name.replace('_', '-')} is for --suite; with --config the file says it")
    file = load_file(EvaluateFile, known.config, known, overrides)
    out = (known.out or Path("runs") / f"evaluate-{known.model.name}").resolve()
    data = plan_data(file.data, out.parent, file.data_dir)
    config = EvaluationRunConfig(
        evaluation=file.evaluation,
        target=str(known.model.resolve()),
        corpus=str(data.directory),
        stage="model",
        window_tokens=file.window_tokens,
        data_dir=file.data_dir,
    )
    inputs = {
        "target": input_identity(known.model),
        "corpus": data.identity.id,
        **task_inputs(file.data_dir, file.evaluation.tasks),
    }
    run = plan_run(
        "evaluate",
        config,
        label=f"evaluate {known.model.name}",
        directory=out,
        inputs=inputs,
        needs=(data.directory,),
    )
    code = make_alone([data, run], known)
    if not known.dry_run:
        print(describe_results(out))
    return code
