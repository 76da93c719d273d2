"""Command line: the commands with their options, and how they end."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from rlprior.config import RunError, UsageError

OVERRIDES = "any setting of the file can be replaced: --section.key=value (a value is TOML; list items by position, as in --data.sources.0.max_bytes=1000000)"

COMMANDS = (
    "demo",
    "study",
    "train",
    "rl",
    "export-rl",
    "sft",
    "dpo",
    "evaluate",
    "samples",
    "compare",
    "crosscheck",
    "readiness",
    "watch",
    "plan",
    "report",
)
"""Names in the order of `--help`; each is a file of `rlprior.commands` with SUMMARY, EXAMPLES, add_arguments and run."""


def command_module(name: str) -> Any:
    """The file of a command."""
    return importlib.import_module(f"rlprior.commands.{name.replace('-', '_')}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns 0 (after SIGTERM too), 1 for a failure, 2 for a usage error, 130 when interrupted."""
    from rlprior.runs.signals import RunStopped, on_termination
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
            return command_module(known.command).run(known, overrides)
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
    if rest and not _has_settings(command_module(command)):
        raise UsageError(f"{rest[0]!r}: 'rlprior {command}' has no settings")
    return [item.removeprefix("--") for item in rest]


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line as this package reports everything: in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see '{self.prog} --help'")


def _has_settings(module: Any) -> bool:
    return getattr(module, "HAS_SETTINGS", True)


def _build_parser() -> argparse.ArgumentParser:
    import rlprior

    parser = _Parser(
        prog="rlprior",
        description="Which next-token objective leaves the best starting point for reinforcement learning?",
    )
    parser.add_argument("--version", action="version", version=f"rlprior {rlprior.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = command_module(name)
        lines = "\n".join(f"  {example}" for example in module.EXAMPLES)
        command = subparsers.add_parser(
            name,
            help=module.SUMMARY,
            description=module.SUMMARY[0].upper() + module.SUMMARY[1:] + ".",
            epilog=f"examples:\n{lines}" + (f"\n\n{OVERRIDES}" if _has_settings(module) else ""),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
