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
    from rlprior.study.plan import PlannedRun


def load_file(config_type: Any, path: Path, known: argparse.Namespace, overrides: list[str]) -> Any:
    """The settings of a file, with what the command line replaces."""
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
    config = load_file(StudyConfig, known.file, known, overrides)
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

    file = load_file(TrainFile, known.file, known, overrides)
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
    return make_alone([data, run], known)


def run_rl(known: argparse.Namespace, overrides: list[str]) -> int:
    """Reinforcement learning."""
    from rlprior.rl.engines import check_engine
    from rlprior.rl.loop import RLRunConfig
    from rlprior.runs import input_identity
    from rlprior.study.plan import plan_run, task_inputs

    config = load_file(RLRunConfig, known.file, known, overrides)
    check_engine(config.rl.rollout)
    out = _output_directory(known)
    inputs = {
        "init_from": input_identity(Path(config.init_from)),
        **task_inputs(config.data_dir, {"rl": config.rl.task}),
    }
    run = plan_run("rl", config, label=f"rl {out.name}", directory=out, inputs=inputs)
    return make_alone([run], known)


def run_export_rl(known: argparse.Namespace, overrides: list[str]) -> int:
    """The same for another engine."""
    from rlprior.rl.export import HeldOut, export_to_verl
    from rlprior.rl.loop import RLRunConfig

    config = load_file(RLRunConfig, known.file, known, overrides)
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
    from rlprior.tasks.config import data_folder, resolve_path

    require_trl("sft")
    config = load_file(SFTRunConfig, known.file, known, overrides)
    out = _output_directory(known)
    inputs = {
        "init_from": input_identity(Path(config.init_from)),
        **task_inputs(config.data_dir, {"sft": config.sft.task} if config.sft.task else {}),
    }
    if config.sft.path:
        inputs["file"] = input_identity(resolve_path(config.sft.path, data_folder(config.data_dir)))
    run = plan_run("sft", config, label=f"sft {out.name}", directory=out, inputs=inputs)
    return make_alone([run], known)


def run_dpo(known: argparse.Namespace, overrides: list[str]) -> int:
    """Direct preference optimization."""
    from rlprior.posttraining import require_trl
    from rlprior.posttraining.dpo import DPORunConfig, describe_pairs
    from rlprior.runs import input_identity
    from rlprior.samples.grades import grades_of
    from rlprior.study.plan import plan_run, task_inputs

    require_trl("dpo")
    config = load_file(DPORunConfig, known.file, known, overrides)
    out = _output_directory(known)
    store = Path(config.samples) if config.samples else None
    inputs = {
        "init_from": input_identity(Path(config.init_from)),
        "samples": input_identity(store) if store else "",
        "grades": input_identity(grades_of(store)) if store else "",
        **task_inputs(config.data_dir, {"dpo": config.dpo.task}),
    }
    run = plan_run("dpo", config, label=f"dpo {out.name}", directory=out, inputs=inputs)
    code = make_alone([run], known)
    if not known.dry_run:
        print(describe_pairs(out))
    return code


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


def make_alone(plan: list[PlannedRun], known: argparse.Namespace) -> int:
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
