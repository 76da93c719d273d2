"""What a plan costs, before it is paid: runs, FLOPs, and hours at this machine's own speed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlprior.study.plan import PlannedRun

EFFICIENCY = 0.6
"""Share of a large matrix product's speed that small models reach on a CPU, measured on the demo; larger models reach more."""


def describe_plan(plan: Sequence[PlannedRun], *, num_workers: int, is_dry_run: bool) -> str:
    """A line a stage, with how many runs are there already, and a rough time for the rest."""
    stages = list(dict.fromkeys(run.stage for run in plan))
    lines: list[str] = []
    for stage in stages:
        runs = [run for run in plan if run.stage == stage]
        num_done = sum(run.is_done for run in runs)
        flops = sum(run.cost for run in runs)
        cost = f"{flops:10.2e} FLOPs" if flops else ""
        lines.append(f"  {stage:<10} {len(runs):>4} runs, {num_done:>4} done already {cost}")
    if is_dry_run:
        lines += [
            f"    {run.label:<40} {'done' if run.is_done else 'to do'}  {run.directory}" for run in plan
        ]
    left = sum(run.cost for run in plan if not run.is_done)
    if left:
        seconds = left / (matmul_flops_per_second() * EFFICIENCY) / num_workers
        lines.append(
            f"  about {format_seconds(seconds)} on {num_workers} process(es) of one thread, give or take a factor of 2"
        )
    return "plan:\n" + "\n".join(lines)


def matmul_flops_per_second() -> float:
    """Speed of a float32 matrix product on one thread, measured for a fifth of a second."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        left, right = torch.randn(1024, 512), torch.randn(512, 1024)
        torch.mm(left, right)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < 0.2:
            torch.mm(left, right)
            count += 1
        return count * 2 * 1024 * 512 * 1024 / (time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)


def format_seconds(seconds: float) -> str:
    """A duration for a person.

    >>> format_seconds(42), format_seconds(600), format_seconds(9000), format_seconds(400000)
    ('42 s', '10 min', '2.5 h', '4.6 days')
    """
    for limit, divisor, unit in ((90, 1, "s"), (5400, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            value = seconds / divisor
            return f"{value:.1f} {unit}" if unit == "h" else f"{value:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"
