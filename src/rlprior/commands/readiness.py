"""`rlprior readiness`: which models would learn under reinforcement learning, and why, before it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rlprior.commands.options import load_file, make_alone
from rlprior.config import UsageError

SUMMARY = "which models would learn under reinforcement learning, and why, before it"
EXAMPLES = [
    "rlprior readiness runs/ce/checkpoints/step-00000400",
    "rlprior readiness CE=runs/ce/checkpoints/step-00000400 sharp=runs/sharp/checkpoints/step-00000400",
    "rlprior readiness MODEL --config evaluate.toml --data-dir data --group-size 8",
    "rlprior readiness --study runs/demo",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes beside settings."""
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


def run(known: argparse.Namespace, overrides: list[str]) -> int:
    """Judge models before RL, and test on a study whether that predicts."""
    from rlprior.evaluation import readiness
    from rlprior.evaluation.judgement import judge_model, read_result
    from rlprior.reports.readiness import check_on_study, describe_readiness, write_page
    from rlprior.study.config import EvaluateFile
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
