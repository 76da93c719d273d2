"""Command line: parse, plan, execute, say where things are."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rlprior import plan_command
from rlprior.config import RunError, UsageError

if TYPE_CHECKING:
    from rlprior.study.plan import PlannedRun

OVERRIDES = "any setting of the file can be replaced: --section.key=value (a value is TOML; list items by position, as in --data.sources.0.max_bytes=1000000)"

COMMANDS: dict[str, tuple[str, list[str]]] = {
    "demo": (
        "compare the paper's five objectives end to end on text that Python itself carries",
        [
            "rlprior demo",
            "rlprior demo --dry-run",
            "rlprior demo --seeds 0 1 2 3 4 --out runs/demo-5",
            "rlprior demo --rl.num_steps=20",
        ],
    ),
    "study": (
        "pre-train, mid-train, RL-train and evaluate several objectives, and write the report",
        [
            "rlprior study study.toml",
            "rlprior study study.toml --dry-run",
            "rlprior study study.toml --data-dir data --workers 2",
        ],
    ),
    "train": (
        "one language-model stage: pre-training, or mid-training with --init-from",
        [
            "rlprior train train.toml --out runs/ce",
            "torchrun --nproc-per-node 8 -m rlprior train train.toml --out runs/ce",
            "rlprior train train.toml --out runs/ce --track tensorboard wandb",
            "rlprior train train.toml --out runs/sharp --training.objective='{name=\"reward_shaping\", beta=-0.25}'",
        ],
    ),
    "rl": (
        "reinforcement learning with verifiable rewards, from a Hugging Face folder",
        ["rlprior rl rl.toml --init-from runs/ce/checkpoints/step-00000400 --out runs/ce-rl"],
    ),
    "export-rl": (
        "the same reinforcement learning for a distributed engine: model, prompts, reward and configuration in one folder",
        [
            "rlprior export-rl rl.toml --init-from runs/ce/checkpoints/step-00000400 --engine verl --out verl-run",
            "rlprior export-rl rl.toml --init-from MODEL --out verl-run --validation-file test.jsonl",
        ],
    ),
    "sft": (
        "supervised fine-tuning on worked solutions or a file of pairs, from a Hugging Face folder",
        [
            "rlprior sft sft.toml --init-from runs/ce/checkpoints/step-00000400 --out runs/ce-sft",
            "rlprior sft sft.toml --init-from MODEL --sft.num_epochs=3 --sft.objective.name=dynamic_fine_tuning",
        ],
    ),
    "dpo": (
        "direct preference optimization on correct against wrong answers, from a Hugging Face folder",
        [
            "rlprior dpo dpo.toml --init-from runs/ce-sft/checkpoints/step-00000100 --out runs/ce-dpo",
            "rlprior dpo dpo.toml --init-from MODEL --samples runs/scores/samples/gsm8k-00000000.jsonl",
        ],
    ),
    "evaluate": (
        "held-out likelihood and Avg@m, Cons@m, Pass@k of a Hugging Face folder",
        ["rlprior evaluate runs/ce/checkpoints/step-00000400 --config evaluate.toml --out runs/ce-eval"],
    ),
    "watch": (
        "look at a run or a study while it is made, or after; Ctrl-C ends the looking alone",
        ["rlprior watch runs/ce", "rlprior watch runs/demo --once"],
    ),
    "plan": (
        "memory, time and checkpoints of training on devices that are not rented yet",
        [
            "rlprior plan train.toml --devices 8 --memory 80",
            "rlprior plan --model 4b --devices 64 --tokens 500e9",
            "rlprior plan --model 10b-a0.5b --devices 64 --training.engine.activation_checkpointing=full",
        ],
    ),
    "report": (
        "write report.html of a study, finished or not",
        ["rlprior report runs/demo"],
    ),
}

WITHOUT_SETTINGS = ("watch", "report")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns 0 (after SIGTERM too), 1 for a failure, 2 for a usage error, 130 when interrupted."""
    from rlprior.runs import RunStopped, on_termination
    from rlprior.tracking import require_packages

    try:
        known, rest = _build_parser().parse_known_args(arguments)
        overrides = _overrides(known.command, rest)
        # a damaged checkpoint is the only warning that a user can act on: one line, without the code that raised it
        warnings.showwarning = lambda message, *_, **__: print(
            f"rlprior: warning: {message}", file=sys.stderr
        )
        require_packages(getattr(known, "track", ()))
        with on_termination(_interrupt):
            return _RUN[known.command](known, overrides)
    except UsageError as error:
        print(f"rlprior: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"rlprior: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"rlprior: {error.filename or 'system'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except RunStopped as stop:
        if os.environ.get("RANK", "0") == "0":  # of several processes one says it
            print(f"rlprior: {stop}", file=sys.stderr)
        return 0
    except KeyboardInterrupt as interrupt:
        print("\nrlprior: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 0 if isinstance(interrupt, _Terminated) else 130


class _Terminated(KeyboardInterrupt):
    """SIGTERM came: what a scheduler sends before it takes the machine away, and no failure."""


def _interrupt() -> NoReturn:
    """SIGTERM stops as Ctrl-C does; training loops, which save first, take it themselves."""
    raise _Terminated


def _overrides(command: str, rest: Sequence[str]) -> list[str]:
    for item in rest:
        if not item.startswith("--") or "=" not in item:
            raise UsageError(
                f"{item!r} is not an option of 'rlprior {command}'; write --section.key=value for a setting, "
                f"or see 'rlprior {command} --help'"
            )
    if rest and command in WITHOUT_SETTINGS:
        raise UsageError(f"{rest[0]!r}: 'rlprior {command}' has no settings")
    return [item.removeprefix("--") for item in rest]


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line as this package reports everything: in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see '{self.prog} --help'")


def _build_parser() -> argparse.ArgumentParser:
    import rlprior
    from rlprior.tracking import TRACKERS

    parser = _Parser(
        prog="rlprior",
        description="Which next-token objective leaves the best starting point for reinforcement learning?",
    )
    parser.add_argument("--version", action="version", version=f"rlprior {rlprior.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers: dict[str, argparse.ArgumentParser] = {}
    for name, (summary, examples) in COMMANDS.items():
        lines = "\n".join(f"  {example}" for example in examples)
        parsers[name] = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"examples:\n{lines}" + ("" if name in WITHOUT_SETTINGS else f"\n\n{OVERRIDES}"),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
    parsers["study"].add_argument("file", type=Path, metavar="FILE.toml", help="the study's settings")
    parsers["train"].add_argument(
        "file", type=Path, metavar="FILE.toml", help="data, model and training settings"
    )
    parsers["rl"].add_argument("file", type=Path, metavar="FILE.toml", help="task and RL settings")
    _add_export_arguments(parsers["export-rl"])
    for name in ("sft", "dpo"):
        parsers[name].add_argument(
            "file",
            type=Path,
            metavar="FILE.toml",
            help=f"{name.upper()} settings and where its examples come from",
        )
    parsers["dpo"].add_argument(
        "--samples", metavar="FILE", help="graded samples of an evaluation (default: the run draws its own)"
    )
    parsers["evaluate"].add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face folder")
    parsers["evaluate"].add_argument(
        "--config", type=Path, required=True, metavar="FILE.toml", help="data and evaluation settings"
    )
    parsers["watch"].add_argument(
        "directory", type=Path, metavar="RUN_OR_STUDY", help="the folder that --out named"
    )
    parsers["watch"].add_argument(
        "--once", action="store_true", help="print what there is and stop, as where the output is no terminal"
    )
    parsers["report"].add_argument("directory", type=Path, metavar="STUDY", help="a study's folder")
    parsers["report"].add_argument("--out", type=Path, help="the page to write (default: STUDY/report.html)")
    plan_command.add_arguments(parsers["plan"])
    for name in ("train", "rl", "export-rl", "sft", "dpo"):
        parsers[name].add_argument("--init-from", metavar="MODEL", help="Hugging Face folder to start from")
    for name in ("demo", "study"):
        parsers[name].add_argument(
            "--seeds", type=int, nargs="+", metavar="SEED", help="replaces the file's seeds"
        )
        parsers[name].add_argument(
            "--workers", type=int, default=2, metavar="N", help="processes at a time (default: 2)"
        )
        parsers[name].add_argument(
            "--threads", type=int, default=1, metavar="N", help="threads of each (default: 1)"
        )
    for name in ("demo", "study", "train", "rl", "sft", "dpo"):
        parsers[name].add_argument(
            "--track",
            nargs="+",
            default=(),
            choices=tuple(TRACKERS),
            metavar="NAME",
            help=f"send the metrics elsewhere too: {', '.join(TRACKERS)}",
        )
    for name in ("demo", "study", "train", "rl", "sft", "dpo", "evaluate"):
        parsers[name].add_argument(
            "--out",
            type=Path,
            metavar="DIR",
            help=f"folder of all outputs (default: runs/{'FILE' if name != 'demo' else 'demo'})",
        )
        parsers[name].add_argument(
            "--data-dir", metavar="DIR", help="folder that relative paths of data start from"
        )
        parsers[name].add_argument(
            "--dry-run", action="store_true", help="print the plan and what it costs, and stop"
        )
    return parser


def _add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE.toml", help="settings of `rlprior rl`")
    parser.add_argument(
        "--engine", choices=("verl",), default="verl", help="verl 0.9, the only one (default)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--data-dir", metavar="DIR", help="folder that relative paths of data start from")
    parser.add_argument(
        "--validation-problems", type=int, default=128, metavar="N", help="held-out problems (default: 128)"
    )
    parser.add_argument(
        "--validation-file",
        type=Path,
        metavar="FILE.jsonl",
        help="take them from here; a task of kind 'file' needs it",
    )


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


def _run_demo(known: argparse.Namespace, overrides: list[str]) -> int:
    known.file = Path(__file__).parent / "study" / "demo.toml"
    known.out = known.out or Path("runs/demo")
    return _run_study(known, overrides)


def _run_study(known: argparse.Namespace, overrides: list[str]) -> int:
    from rlprior.study.config import StudyConfig
    from rlprior.study.plan import plan_study
    from rlprior.study.report import write_report
    from rlprior.study.runner import write_study_file

    if known.workers < 1 or known.threads < 1:
        raise UsageError("--workers and --threads must be at least 1")
    config = _load(StudyConfig, known.file, known, overrides)
    directory = (known.out or Path("runs") / known.file.stem).resolve()
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


def _run_train(known: argparse.Namespace, overrides: list[str]) -> int:
    from rlprior.runs import input_identity
    from rlprior.study.config import TrainFile
    from rlprior.study.plan import plan_data, plan_run
    from rlprior.training.language_model import LanguageModelConfig

    file = _load(TrainFile, known.file, known, overrides)
    out = (known.out or Path("runs") / known.file.stem).resolve()
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
    return _run_alone([data, run], known)


def _run_rl(known: argparse.Namespace, overrides: list[str]) -> int:
    from rlprior.rl.loop import RLRunConfig
    from rlprior.runs import input_identity
    from rlprior.study.plan import plan_run, task_inputs

    config = _load(RLRunConfig, known.file, known, overrides)
    out = (known.out or Path("runs") / known.file.stem).resolve()
    inputs = {
        "init_from": input_identity(Path(config.init_from)),
        **task_inputs(config.data_dir, {"rl": config.rl.task}),
    }
    run = plan_run("rl", config, label=f"rl {out.name}", directory=out, inputs=inputs)
    return _run_alone([run], known)


def _run_export_rl(known: argparse.Namespace, overrides: list[str]) -> int:
    from rlprior.rl.export import HeldOut, export_to_verl
    from rlprior.rl.loop import RLRunConfig

    config = _load(RLRunConfig, known.file, known, overrides)
    held_out = HeldOut(num_problems=known.validation_problems, path=known.validation_file)
    export = export_to_verl(config, known.out.resolve(), held_out=held_out, source=known.file.name)
    for caution in export.cautions:
        print(f"rlprior: warning: {caution}", file=sys.stderr)
    print(f"{export.summary}\nhow to run it and what differs: {export.directory / 'README.md'}")
    return 0


def _run_sft(known: argparse.Namespace, overrides: list[str]) -> int:
    from rlprior.posttraining import require_trl
    from rlprior.posttraining.sft import SFTRunConfig
    from rlprior.runs import input_identity
    from rlprior.study.plan import plan_run, task_inputs
    from rlprior.tasks.config import resolve_path

    require_trl("sft")
    config = _load(SFTRunConfig, known.file, known, overrides)
    out = (known.out or Path("runs") / known.file.stem).resolve()
    inputs = {
        "init_from": input_identity(Path(config.init_from)),
        **task_inputs(config.data_dir, {"sft": config.sft.task} if config.sft.task else {}),
    }
    if config.sft.path:
        data_dir = Path(config.data_dir) if config.data_dir else None
        inputs["file"] = input_identity(resolve_path(config.sft.path, data_dir))
    run = plan_run("sft", config, label=f"sft {out.name}", directory=out, inputs=inputs)
    return _run_alone([run], known)


def _run_dpo(known: argparse.Namespace, overrides: list[str]) -> int:
    from rlprior.posttraining import require_trl
    from rlprior.posttraining.dpo import DPORunConfig, describe_pairs
    from rlprior.posttraining.pairs import grades_of
    from rlprior.runs import input_identity
    from rlprior.study.plan import plan_run, task_inputs

    require_trl("dpo")
    config = _load(DPORunConfig, known.file, known, overrides)
    out = (known.out or Path("runs") / known.file.stem).resolve()
    store = Path(config.samples) if config.samples else None
    inputs = {
        "init_from": input_identity(Path(config.init_from)),
        "samples": input_identity(store) if store else "",
        "grades": input_identity(grades_of(store)) if store else "",
        **task_inputs(config.data_dir, {"dpo": config.dpo.task}),
    }
    run = plan_run("dpo", config, label=f"dpo {out.name}", directory=out, inputs=inputs)
    code = _run_alone([run], known)
    if not known.dry_run:
        print(describe_pairs(out))
    return code


def _run_evaluate(known: argparse.Namespace, overrides: list[str]) -> int:
    from rlprior.evaluation.stage import EvaluationRunConfig, describe_results
    from rlprior.runs import input_identity
    from rlprior.study.config import EvaluateFile
    from rlprior.study.plan import plan_data, plan_run, task_inputs

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
    code = _run_alone([data, run], known)
    if not known.dry_run:
        print(describe_results(out))
    return code


def _run_watch(known: argparse.Namespace, overrides: list[str]) -> int:
    from rlprior.study.watch_view import watch

    with contextlib.suppress(KeyboardInterrupt):
        watch(known.directory, is_once=known.once)
    return 0


def _run_report(known: argparse.Namespace, overrides: list[str]) -> int:
    from rlprior.study.report import write_report

    print(f"report: {write_report(known.directory, known.out or known.directory / 'report.html')}")
    return 0


def _run_alone(plan: list[PlannedRun], known: argparse.Namespace) -> int:
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


_RUN = {
    "demo": _run_demo,
    "study": _run_study,
    "train": _run_train,
    "rl": _run_rl,
    "export-rl": _run_export_rl,
    "sft": _run_sft,
    "dpo": _run_dpo,
    "evaluate": _run_evaluate,
    "watch": _run_watch,
    "plan": plan_command.run,
    "report": _run_report,
}

if __name__ == "__main__":
    sys.exit(main())
