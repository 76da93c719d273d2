"""The commands of evaluation: what they take, and what they do."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlprior.commands import load_file, make_alone
from rlprior.config import UsageError

if TYPE_CHECKING:
    from rlprior.evaluation.browser import Page

COMMANDS: dict[str, tuple[str, list[str]]] = {
    "evaluate": (
        "a suite of benchmarks, or held-out likelihood and tasks of your own, on a Hugging Face folder",
        [
            "rlprior evaluate MODEL --suite paper-base --data-dir data --out runs/ce-paper",
            "rlprior evaluate MODEL --suite paper-base --benchmarks gsm8k mmlu --samples 8 --max-questions 200",
            "rlprior evaluate MODEL --suite paper-rl --samples 128 --max_new_tokens=16384",
            "rlprior evaluate runs/ce/checkpoints/step-00000400 --config evaluate.toml --out runs/ce-eval",
        ],
    ),
    "samples": (
        "read a run's questions, responses and verdicts in one HTML page, tokens coloured by what a model says of them",
        [
            "rlprior samples runs/ce-eval",
            "rlprior samples runs/ce-eval --model runs/ce/checkpoints/step-00000400",
            "rlprior samples runs/rl-eval --model runs/rl/checkpoints/step-00000100 --against runs/ce/checkpoints/step-00000400",
            "rlprior samples runs/ce-eval --task gsm8k --max-questions 500 --out gsm8k.html --parquet gsm8k.parquet",
        ],
    ),
    "compare": (
        "whether two evaluations of the same questions differ by more than chance, benchmark by benchmark",
        [
            "rlprior compare runs/ce-eval runs/sharp-eval",
            "rlprior compare runs/ce-eval runs/sharp-eval --metric pass@8 --out runs/ce-sharp.json",
        ],
    ),
    "crosscheck": (
        "an evaluation's stored GSM8K and MMLU samples, scored by lm-evaluation-harness, and why what differs does",
        ["rlprior crosscheck runs/ce-eval --data-dir data"],
    ),
    "readiness": (
        "which models would learn under reinforcement learning, and why, before it",
        [
            "rlprior readiness runs/ce/checkpoints/step-00000400",
            "rlprior readiness CE=runs/ce/checkpoints/step-00000400 sharp=runs/sharp/checkpoints/step-00000400",
            "rlprior readiness MODEL --config evaluate.toml --data-dir data --group-size 8",
            "rlprior readiness --study runs/demo",
        ],
    ),
}

WITHOUT_SETTINGS = ("samples", "compare", "crosscheck")


def add_arguments(parsers: dict[str, argparse.ArgumentParser]) -> None:
    """What each command takes beside settings."""
    for name, add in _ARGUMENTS.items():
        add(parsers[name])


def at_least_one(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text!r}")
    return int(text)


def _add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
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


def _add_samples_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory", type=Path, metavar="RUN", help="the folder of an evaluation, or of any run with samples/"
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="MODEL",
        help="a Hugging Face folder that says how probable each token is",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="OTHER",
        help="another with the same tokenizer, to show the difference",
    )
    parser.add_argument("--task", nargs="+", default=(), metavar="NAME", help="these tasks alone")
    parser.add_argument(
        "--max-questions", type=int, default=100, metavar="N", help="of each task and step (default: 100)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.html", help="the page to write (default: RUN/samples.html)"
    )
    parser.add_argument(
        "--parquet", type=Path, metavar="FILE", help="also all samples as a table, a row each"
    )


def _add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    for name, label in (("first", "A"), ("second", "B")):
        parser.add_argument(name, type=Path, metavar=label, help="a folder that `rlprior evaluate` wrote")
    parser.add_argument(
        "--metric",
        default="avg",
        metavar="avg|pass@K|cons",
        help="share of correct samples (default), Pass@K, or majority votes",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write every number there too")


def _add_crosscheck_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory", type=Path, metavar="RUN", help="folder that 'rlprior evaluate --suite' wrote"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="folder of the benchmarks' files, from which gold answers are read anew (default: the hub)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="every response that differs (default: RUN/crosscheck.json)",
    )


def _add_readiness_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="Hugging Face folders; LABEL=FOLDER names one on the page"
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE.toml",
        help="settings of `rlprior evaluate` (default: arithmetic of three difficulties, and English)",
    )
    parser.add_argument(
        "--samples",
        dest="num_samples",
        type=int,
        metavar="M",
        help="samples a question (default: the file's, or 128)",
    )
    parser.add_argument(
        "--group-size", type=int, default=16, metavar="G", help="samples of a GRPO group (default: 16)"
    )
    parser.add_argument(
        "--study",
        type=Path,
        metavar="STUDY",
        help="test on the runs of a study whether what is measured before RL predicts what RL does",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/readiness"), metavar="DIR", help="default: runs/readiness"
    )
    parser.add_argument("--data-dir", metavar="DIR", help="folder that relative paths of data start from")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and what it costs, and stop")


def run_evaluate(known: argparse.Namespace, overrides: list[str]) -> int:
    """Measure one model."""
    return _evaluate_suite(known, overrides) if known.suite else _evaluate_config(known, overrides)


def _evaluate_suite(known: argparse.Namespace, overrides: list[str]) -> int:
    from rlprior.config import apply_overrides, decode
    from rlprior.evaluation import suite
    from rlprior.evaluation.suite_table import write_table
    from rlprior.models.causal_lm import require_model_folder
    from rlprior.runs import input_identity
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
    from rlprior.runs import input_identity
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


def run_samples(known: argparse.Namespace, overrides: list[str]) -> int:
    """Write the page of a run's samples, and their table."""
    from rlprior.evaluation.browser import collect, write_page
    from rlprior.evaluation.pools import find_stores, read_pool, write_parquet

    if known.max_questions < 1:
        raise UsageError("--max-questions must be at least 1")
    if known.against and not known.model:
        raise UsageError("--against needs --model: the difference is of the two")
    pools = [read_pool(path) for path in find_stores(known.directory, known.task)]
    if known.parquet:
        print(f"table: {known.parquet} ({write_parquet(pools, known.parquet):,} samples)")
    page = collect(pools, known.max_questions)
    if known.model:
        _color(page, known)
    out = known.out or known.directory / "samples.html"
    write_page(page, pools, out, title=known.directory.resolve().name)
    print(f"page: {out} ({page.num_samples:,} samples of {len(page.cards):,} questions)")
    return 0


def _color(page: Page, known: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from rlprior.evaluation.coloring import color_tokens

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("reading the models", total=None)
        color_tokens(
            page,
            known.model,
            known.against,
            lambda what, done, total: bars.update(bar, description=what, completed=done, total=total),
        )


def run_compare(known: argparse.Namespace, overrides: list[str]) -> int:
    """Two evaluations, question by question."""
    from rlprior.evaluation.comparison import (
        Metric,
        as_data,
        compare_evaluations,
        describe,
        read_evaluation,
    )
    from rlprior.runs import write_json

    metric = Metric.parse(known.metric)
    first, second = read_evaluation(known.first), read_evaluation(known.second)
    comparison = compare_evaluations(first, second, metric)
    print(f"A: {known.first}\nB: {known.second}\n\n{describe(comparison)}")
    if known.out:
        known.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(known.out, {"a": str(known.first), "b": str(known.second), **as_data(comparison)})
        print(f"\nwritten: {known.out}")
    return 0


def run_crosscheck(known: argparse.Namespace, overrides: list[str]) -> int:
    """Score the samples of an evaluation with lm-evaluation-harness."""
    from rlprior.evaluation.crosscheck import crosscheck, describe_crosscheck
    from rlprior.runs import write_json

    report = crosscheck(known.directory, known.data_dir)
    path = known.out or known.directory / "crosscheck.json"
    write_json(path, report)
    print(f"{describe_crosscheck(report)}\nevery response that differs: {path}")
    return 0


def run_readiness(known: argparse.Namespace, overrides: list[str]) -> int:
    """Judge models before RL, and test on a study whether that predicts."""
    from rlprior.evaluation import readiness
    from rlprior.study.config import EvaluateFile
    from rlprior.study.readiness import judge_model, read_result
    from rlprior.study.readiness_page import check_on_study, describe_readiness, write_page
    from rlprior.study.readiness_plan import name_models, plan_readiness

    models = name_models(known.models)
    if not models and not known.study:
        raise UsageError("rlprior readiness: name a model's folder, or a study with --study")
    section = check_on_study(known.study, group_size=known.group_size) if known.study else None
    out = known.out.resolve()
    judged = []
    if models:
        default = Path(readiness.__file__).with_suffix(".toml")
        samples = [f"evaluation.final.samples_per_problem={known.num_samples}"] if known.num_samples else []
        file = load_file(EvaluateFile, known.config or default, known, [*overrides, *samples])
        plans = plan_readiness(models, file, out / "runs", group_size=known.group_size)
        make_alone([run for plan in plans.values() for run in plan], known)
        if known.dry_run:
            return 0
        judged = [
            judge_model(label, read_result(plan[-1].directory), group_size=known.group_size)
            for label, plan in plans.items()
        ]
    page = write_page(out, judged, section, command="rlprior " + " ".join(sys.argv[1:]))
    print(f"{describe_readiness(judged, section)}\n\npage: {page}")
    return 0


_ARGUMENTS = {
    "evaluate": _add_evaluate_arguments,
    "samples": _add_samples_arguments,
    "compare": _add_compare_arguments,
    "crosscheck": _add_crosscheck_arguments,
    "readiness": _add_readiness_arguments,
}

RUN = {
    "evaluate": run_evaluate,
    "samples": run_samples,
    "compare": run_compare,
    "crosscheck": run_crosscheck,
    "readiness": run_readiness,
}
