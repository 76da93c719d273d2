"""What each command does: read its settings, plan its runs, make them, and say where things are."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlprior.config import UsageError

if TYPE_CHECKING:
    from rlprior.evaluation.browser import Page
    from rlprior.study.plan import PlannedRun


def _load(config_type: Any, path: Path, known: argparse.Namespace, overrides: list[str]) -> Any:
    from rlprior.config import load_config

    extra = list(overrides)
    if getattr(known, "init_from", None):
        extra.append(f"init_from={Path(known.init_from).resolve()}")
    if getattr(known, "samples", None):
        extra.append(f"samples={Path(known.samples).resolve()}")
    if known.data_dir:
        extra.append(f"data_dir={Path(known.data_dir).resolve()}")
    if getattr(known, "seeds", None):
        extra.append(f"seeds={known.seeds}")
    return load_config(config_type, path, extra)


def _output_directory(known: argparse.Namespace) -> Path:
    return (known.out or Path("runs") / known.file.stem).resolve()


def run_demo(known: argparse.Namespace, overrides: list[str]) -> int:
    """The built-in study."""
    known.file = Path(__file__).parent / "study" / "demo.toml"
    known.out = known.out or Path("runs/demo")
    return run_study(known, overrides)


def run_study(known: argparse.Namespace, overrides: list[str]) -> int:
    """Arms x seeds, and the report."""
    from rlprior.study.config import StudyConfig
    from rlprior.study.plan import plan_study
    from rlprior.study.report import write_report
    from rlprior.study.runner import write_study_file

    if known.workers < 1 or known.threads < 1:
        raise UsageError("--workers and --threads must be at least 1")
    config = _load(StudyConfig, known.file, known, overrides)
    directory = _output_directory(known)
    plan = plan_study(config, directory)
    if _describe_plan(plan, known, num_workers=known.workers):
        return 0
    directory.mkdir(parents=True, exist_ok=True)
    command = "rlprior " + " ".join(sys.argv[1:])
    write_study_file(config, directory, plan, command=command)
    _execute(plan, known)
    write_study_file(config, directory, plan, command=command)
    report = write_report(directory, directory / "report.html")
    _print_stage_times(plan)
    print(f"report: {report}")
    return 0


def run_train(known: argparse.Namespace, overrides: list[str]) -> int:
    """One language-model stage."""
    from rlprior.runs import input_identity
    from rlprior.study.config import TrainFile
    from rlprior.study.plan import plan_data, plan_run
    from rlprior.training.language_model import LanguageModelConfig

    file = _load(TrainFile, known.file, known, overrides)
    out = _output_directory(known)
    data = plan_data(file.data, out.parent, file.data_dir)
    config = LanguageModelConfig(
        training=file.training,
        corpus=str(data.directory),
        seed=file.seed,
        model=file.model,
        init_from=file.init_from,
    )
    inputs = {
        "corpus": data.identity.id,
        "init_from": input_identity(Path(file.init_from)) if file.init_from else "",
    }
    stage = "midtrain" if file.init_from else "pretrain"
    run = plan_run(
        stage, config, label=f"{stage} {out.name}", directory=out, inputs=inputs, needs=(data.directory,)
    )
    return _make_alone([data, run], known)


def run_rl(known: argparse.Namespace, overrides: list[str]) -> int:
    """Reinforcement learning."""
    from rlprior.rl.engines import check_engine
    from rlprior.rl.loop import RLRunConfig
    from rlprior.runs import input_identity
    from rlprior.study.plan import plan_run, task_inputs

    config = _load(RLRunConfig, known.file, known, overrides)
    check_engine(config.rl.rollout)
    out = _output_directory(known)
    inputs = {
        "init_from": input_identity(Path(config.init_from)),
        **task_inputs(config.data_dir, {"rl": config.rl.task}),
    }
    run = plan_run("rl", config, label=f"rl {out.name}", directory=out, inputs=inputs)
    return _make_alone([run], known)


def run_export_rl(known: argparse.Namespace, overrides: list[str]) -> int:
    """The same for another engine."""
    from rlprior.rl.export import HeldOut, export_to_verl
    from rlprior.rl.loop import RLRunConfig

    config = _load(RLRunConfig, known.file, known, overrides)
    held_out = HeldOut(num_problems=known.validation_problems, path=known.validation_file)
    export = export_to_verl(config, known.out.resolve(), held_out=held_out, source=known.file.name)
    for caution in export.cautions:
        print(f"rlprior: warning: {caution}", file=sys.stderr)
    print(f"{export.summary}\nhow to run it and what differs: {export.directory / 'README.md'}")
    return 0


def run_sft(known: argparse.Namespace, overrides: list[str]) -> int:
    """Supervised fine-tuning."""
    from rlprior.posttraining import require_trl
    from rlprior.posttraining.sft import SFTRunConfig
    from rlprior.runs import input_identity
    from rlprior.study.plan import plan_run, task_inputs
    from rlprior.tasks.config import resolve_path

    require_trl("sft")
    config = _load(SFTRunConfig, known.file, known, overrides)
    out = _output_directory(known)
    inputs = {
        "init_from": input_identity(Path(config.init_from)),
        **task_inputs(config.data_dir, {"sft": config.sft.task} if config.sft.task else {}),
    }
    if config.sft.path:
        data_dir = Path(config.data_dir) if config.data_dir else None
        inputs["file"] = input_identity(resolve_path(config.sft.path, data_dir))
    run = plan_run("sft", config, label=f"sft {out.name}", directory=out, inputs=inputs)
    return _make_alone([run], known)


def run_dpo(known: argparse.Namespace, overrides: list[str]) -> int:
    """Direct preference optimization."""
    from rlprior.posttraining import require_trl
    from rlprior.posttraining.dpo import DPORunConfig, describe_pairs
    from rlprior.runs import input_identity
    from rlprior.samples.grades import grades_of
    from rlprior.study.plan import plan_run, task_inputs

    require_trl("dpo")
    config = _load(DPORunConfig, known.file, known, overrides)
    out = _output_directory(known)
    store = Path(config.samples) if config.samples else None
    inputs = {
        "init_from": input_identity(Path(config.init_from)),
        "samples": input_identity(store) if store else "",
        "grades": input_identity(grades_of(store)) if store else "",
        **task_inputs(config.data_dir, {"dpo": config.dpo.task}),
    }
    run = plan_run("dpo", config, label=f"dpo {out.name}", directory=out, inputs=inputs)
    code = _make_alone([run], known)
    if not known.dry_run:
        print(describe_pairs(out))
    return code


def run_evaluate(known: argparse.Namespace, overrides: list[str]) -> int:
    """Measure one model."""
    return _evaluate_suite(known, overrides) if known.suite else _evaluate_config(known, overrides)


def _evaluate_suite(known: argparse.Namespace, overrides: list[str]) -> int:
    from rlprior.config import apply_overrides, decode
    from rlprior.evaluation import suite
    from rlprior.evaluation.suite_table import write_table
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
    label = f"evaluate {known.model.name} on {known.suite}"
    planned = plan_run(
        "suite",
        config,
        label=label,
        directory=(known.out or Path("runs") / label.replace(" ", "-")).resolve(),
        inputs={"target": input_identity(known.model), "data_dir": ""},
    )
    if planned.is_done and not suite.is_answered(planned.directory, config.request):
        (planned.directory / "result.json").unlink()  # it is asked for more, or less
    code = _make_alone([planned], known)
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
    file = _load(EvaluateFile, known.config, known, overrides)
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
    code = _make_alone([data, run], known)
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
        file = _load(EvaluateFile, known.config or default, known, [*overrides, *samples])
        plans = plan_readiness(models, file, out / "runs", group_size=known.group_size)
        _make_alone([run for plan in plans.values() for run in plan], known)
        if known.dry_run:
            return 0
        judged = [
            judge_model(label, read_result(plan[-1].directory), group_size=known.group_size)
            for label, plan in plans.items()
        ]
    page = write_page(out, judged, section, command="rlprior " + " ".join(sys.argv[1:]))
    print(f"{describe_readiness(judged, section)}\n\npage: {page}")
    return 0


def run_watch(known: argparse.Namespace, overrides: list[str]) -> int:
    """Show a run or a study."""
    from rlprior.study.watch_view import watch

    with contextlib.suppress(KeyboardInterrupt):
        watch(known.directory, is_once=known.once)
    return 0


def run_report(known: argparse.Namespace, overrides: list[str]) -> int:
    """Write the report of a study."""
    from rlprior.study.report import write_report

    print(f"report: {write_report(known.directory, known.out or known.directory / 'report.html')}")
    return 0


def _make_alone(plan: list[PlannedRun], known: argparse.Namespace) -> int:
    """Make runs one after the other, in this process or in those that torchrun started."""
    from rlprior.study.plan import DISTRIBUTED_STAGES
    from rlprior.study.progress import show_alone
    from rlprior.world import join_world

    with join_world() as world:
        if world.size > 1 and plan[-1].stage not in DISTRIBUTED_STAGES:
            raise UsageError(f"'rlprior {known.command}' runs in one process; start it without torchrun")
        if (world.is_main and _describe_plan(plan, known, num_workers=1)) or known.dry_run:
            return 0
        for planned in plan:
            show_alone(planned, world, getattr(known, "track", ()))
        if world.is_main:
            print(f"outputs: {plan[-1].directory}")
    return 0


def _describe_plan(plan: Sequence[PlannedRun], known: argparse.Namespace, *, num_workers: int) -> bool:
    """Print what there is to do; True where that is all (`--dry-run`)."""
    from rlprior.study.estimate import describe_plan

    print(describe_plan(plan, num_workers=num_workers, is_dry_run=known.dry_run))
    return known.dry_run


def _execute(plan: Sequence[PlannedRun], known: argparse.Namespace) -> None:
    from rlprior.study.progress import StudyDisplay
    from rlprior.study.runner import execute_plan

    with StudyDisplay(plan) as display:
        execute_plan(
            plan,
            num_workers=known.workers,
            threads_per_worker=known.threads,
            on_change=display.update,
            on_finish=display.finish,
            track=known.track,
        )


def _print_stage_times(plan: Sequence[PlannedRun]) -> None:
    from rlprior.study.runner import stage_seconds

    times = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in stage_seconds(plan).items())
    print(f"processor time by stage, all arms: {times}")
