"""Command line: the commands with their options, and how they end."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rlprior import commands, evaluation_commands, plan_command
from rlprior.config import RunError, UsageError

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
        [
            "rlprior rl rl.toml --init-from runs/ce/checkpoints/step-00000400 --out runs/ce-rl",
            "torchrun --nproc-per-node 8 -m rlprior rl rl.toml --init-from MODEL --out runs/ce-rl",
        ],
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
    **evaluation_commands.COMMANDS,
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

WITHOUT_SETTINGS = ("watch", "report", *evaluation_commands.WITHOUT_SETTINGS)
WITHOUT_SETTINGS = ("samples", "crosscheck", "watch", "report")


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
            setting = item.removeprefix("--").replace("-", "_") if item.startswith("--") else "section.key"
            raise UsageError(
                f"{item!r} is not an option of 'rlprior {command}'; write --{setting}=value for a setting, "
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
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers: dict[str, argparse.ArgumentParser] = {}
    for name, (summary, examples) in COMMANDS.items():
        lines = "\n".join(f"  {example}" for example in examples)
        parsers[name] = subparsers.add_parser(
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
    parsers["watch"].add_argument(
        "directory", type=Path, metavar="RUN_OR_STUDY", help="the folder that --out named"
    )
    parsers["watch"].add_argument(
        "--once", action="store_true", help="print what there is and stop, as where the output is no terminal"
    )
    parsers["report"].add_argument("directory", type=Path, metavar="STUDY", help="a study's folder")
    parsers["report"].add_argument("--out", type=Path, help="the page to write (default: STUDY/report.html)")
    plan_command.add_arguments(parsers["plan"])
    evaluation_commands.add_arguments(parsers)
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


_RUN = {
    "demo": commands.run_demo,
    "study": commands.run_study,
    "train": commands.run_train,
    "rl": commands.run_rl,
    "export-rl": commands.run_export_rl,
    "sft": commands.run_sft,
    "dpo": commands.run_dpo,
    **evaluation_commands.RUN,
    "watch": commands.run_watch,
    "plan": plan_command.run,
    "report": commands.run_report,
}

if __name__ == "__main__":
    sys.exit(main())
