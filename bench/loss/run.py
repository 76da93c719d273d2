"""Time and peak memory of losses on hidden states, forward and backward, all contenders in turn in one process.

    python -m bench.loss.run --device cpu                        # about half an hour on an idle core
    python -m bench.loss.run --device cuda --chunk-sizes 2048 4096
    python -m bench.loss.run --sizes 4096x256x8192 --repeats 15 --threads 1
    python -m bench.loss.run --table bench/results/loss-cpu.json   # the table of docs/loss.md

Writes JSON with every repeat, the machine and the versions, and a picture beside it. Ratios are taken repeat by repeat,
between runs that were next to each other, and reported as their median with quartiles. Contenders that take more than three times
as long as the plain loss run in the first three repeats only.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from bench.loss.contenders import Loss, find_contenders, label
from torch import Tensor

CPU_SIZES = ["4096x256x8192", "1024x512x151936"]
GPU_SIZES = [f"{rows}x{width}x151936" for rows in (8192, 32768) for width in (1536, 2560, 4096)]
REFERENCES = ("plain", "rlprior_cross_entropy", "rlprior_triton_cross_entropy")
SLOW = {"more_than_plain": 3.0, "repeats": 3}


def make_inputs(size: str, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and targets whose logits have about the spread of a trained model's."""
    num_rows, width, vocabulary = map(int, size.split("x"))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, width, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator) * (2 / width**0.5)
    targets = torch.randint(vocabulary, (num_rows,), generator=generator).to(device)
    return hidden, weight.to(device, dtype).requires_grad_(), targets


def run_once(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    """Seconds of one forward and backward pass."""
    hidden, weight, targets = inputs
    hidden.grad = weight.grad = None
    gc.collect()
    if hidden.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    loss(hidden, weight, targets).backward()
    if hidden.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_memory(name: str, loss: Loss, size: str, arguments: argparse.Namespace) -> int:
    """Peak bytes beyond the inputs; on CPU in a process of its own, whose peak starts from nothing."""
    if arguments.device == "cuda":
        inputs = make_inputs(size, "cuda", getattr(torch, arguments.dtype))
        run_once(loss, inputs)
        inputs[0].grad = inputs[1].grad = None
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run_once(loss, inputs)
        return torch.cuda.max_memory_allocated() - before
    options = [f"--{key}={getattr(arguments, key)}" for key in ("dtype", "threads")]
    chunks = ["--chunk-sizes", *map(str, arguments.chunk_sizes)]
    command = [
        sys.executable,
        "-m",
        "bench.loss.run",
        "--memory-of",
        name,
        "--sizes",
        size,
        *options,
        *chunks,
    ]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_own_peak(name: str, size: str, arguments: argparse.Namespace) -> None:
    """Peak resident bytes of one pass beyond those before it; compiled code is compiled on a small problem first."""
    loss = find_contenders("cpu", arguments.chunk_sizes)[0][name]
    _, width, vocabulary = map(int, size.split("x"))
    if name.startswith("compiled"):  # at full width, so that nothing is compiled during the pass that counts
        rows_of_chunk = int(re.findall(r"\[(\d+)\]", name)[0])
        run_once(
            loss, make_inputs(f"{rows_of_chunk}x{width}x{vocabulary}", "cpu", getattr(torch, arguments.dtype))
        )
        gc.collect()
    else:
        run_once(loss, make_inputs(f"8x{width}x64", "cpu", getattr(torch, arguments.dtype)))
    inputs = make_inputs(size, "cpu", getattr(torch, arguments.dtype))
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    run_once(loss, inputs)
    [peak] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(int(peak) * 1024 - before)


def measure(size: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All contenders at one size: seconds of every repeat, peak bytes, and ratios with their quartiles."""
    contenders, missing = find_contenders(arguments.device, arguments.chunk_sizes)
    inputs = make_inputs(size, arguments.device, getattr(torch, arguments.dtype))
    second_run: dict[str, float] = {}
    for name, loss in list(contenders.items()):
        try:
            run_once(loss, inputs)
            second_run[name] = run_once(loss, inputs)
        except (
            RuntimeError,
            TypeError,
            ValueError,
            ImportError,
        ) as error:  # out of memory, another version, no such chunk
            missing[name] = (str(error) or type(error).__name__).splitlines()[0][:200]
            del contenders[name]
    limit = SLOW["more_than_plain"] * second_run.get("plain", float("inf"))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(arguments.repeats):
        for name, loss in contenders.items():
            if repeat < SLOW["repeats"] or second_run[name] <= limit:
                seconds[name].append(run_once(loss, inputs))
        print(f"{size}: repeat {repeat + 1} of {arguments.repeats}", file=sys.stderr)
    del inputs
    rows: dict[str, Any] = {}
    for name, loss in contenders.items():
        rows[name] = {
            "seconds": seconds[name],
            "median_seconds": statistics.median(seconds[name]),
            "peak_bytes": measure_memory(name, loss, size, arguments),
        }
        for reference in find_references(contenders):
            ratios = [own / other for own, other in zip(seconds[name], seconds[reference], strict=False)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            rows[name][f"time_over_{reference}"] = {"median": middle, "quartiles": [low, high]}
    return {"size": size, "contenders": rows, "not_measured": missing}


def find_references(contenders: Collection[str]) -> list[str]:
    """The contenders that all are compared to, of those that could be measured."""
    return [name for name in REFERENCES if name in contenders]


def describe_machine(device: str) -> dict[str, Any]:
    """Hardware and versions."""
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        [processor, *_] = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) or [processor]
    machine = {"processor": processor, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if device == "cuda":
        import triton

        machine |= {"gpu": torch.cuda.get_device_name(), "triton": triton.__version__}
    return machine


def format_table(results: list[dict[str, Any]]) -> str:
    """Times relative to this project's own cross-entropy and peak memory, one line a contender, in Markdown."""
    sizes = [result["size"].replace("x", " x ") for result in results]
    names = dict.fromkeys(
        name for result in results for name in (*result["contenders"], *result["not_measured"])
    )
    lines = [
        "| positions x width x vocabulary | " + " | memory | ".join(sizes) + " | memory |",
        "|---" * (1 + 2 * len(results)) + "|",
    ]
    for name in names:
        cells = [cell for result in results for cell in _cells(name, result)]
        lines.append("| " + " | ".join((label(name), *cells)) + " |")
    return "\n".join(lines)


def _cells(name: str, result: dict[str, Any]) -> tuple[str, str]:
    row = result["contenders"].get(name)
    if row is None:
        return f"not measured: {result['not_measured'].get(name, 'not asked for')}", ""
    reference = find_references(result["contenders"])[-1]
    memory = f"{row['peak_bytes'] / 1e6:.0f} MB"
    if name == reference:
        return f"1 ({row['median_seconds'] * 1e3:.4g} ms)", memory
    ratio = row[f"time_over_{reference}"]
    return "{:.2f} ({:.2f}-{:.2f})".format(ratio["median"], *ratio["quartiles"]), memory


def draw(results: list[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
    """Time and memory of every contender relative to the plain loss where it ran, one row of panels a size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), 2, squeeze=False)
    for (left, right), result in zip(panels, results, strict=True):
        names = list(result["contenders"])[::-1]
        rows = [result["contenders"][name] for name in names]
        colors = ["#1f77b4" if name.startswith("rlprior") else "#999999" for name in names]
        reference = find_references(names)[0]
        middles = [row[f"time_over_{reference}"]["median"] for row in rows]
        spread = [
            [
                abs(row[f"time_over_{reference}"]["quartiles"][side] - middle)
                for row, middle in zip(rows, middles, strict=True)
            ]
            for side in (0, 1)
        ]
        left.barh(names, middles, xerr=spread, color=colors, capsize=2)
        left.set_title(f"time, {result['size']}", loc="left")
        left.set_xlabel(f"relative to {reference} (median, quartiles)")
        reference_bytes = max(
            result["contenders"][reference]["peak_bytes"], 1
        )  # the smallest problems show none
        right.barh(names, [row["peak_bytes"] / reference_bytes for row in rows], color=colors)
        right.set_yticklabels([])
        right.set_title("peak memory beyond the inputs", loc="left")
        right.set_xlabel(f"relative to {reference}")
        for panel in (left, right):
            panel.axvline(1, color="black", linewidth=0.8)
    figure.suptitle(
        f"forward and backward, {machine.get('gpu', machine['processor'])}, torch {machine['torch']}"
    )
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default=None, help="default: float32 on cpu, bfloat16 on cuda")
    parser.add_argument("--sizes", nargs="+", default=None, metavar="NxDxV")
    parser.add_argument("--chunk-sizes", nargs="+", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument(
        "--table", type=Path, metavar="JSON", help="print the table of earlier results and stop"
    )
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.repeats < 2:
        parser.error("--repeats must be at least 2: quartiles need two numbers")
    if arguments.table:
        print(format_table(json.loads(arguments.table.read_text())["results"]))
        return
    on_cpu = arguments.device == "cpu"
    arguments.dtype = arguments.dtype or ("float32" if on_cpu else "bfloat16")
    arguments.chunk_sizes = arguments.chunk_sizes or ([128, 256, 512, 1024] if on_cpu else [2048, 4096])
    arguments.out = arguments.out or Path(f"bench/results/loss-{arguments.device}.json")
    sizes = arguments.sizes or (CPU_SIZES if on_cpu else GPU_SIZES)
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print_own_peak(arguments.memory_of, sizes[0], arguments)
        return
    results = [measure(size, arguments) for size in sizes]
    machine = describe_machine(arguments.device)
    print(format_table(results))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    options = {
        "device": arguments.device,
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "sizes": " ".join(sizes),
        "chunk-sizes": " ".join(map(str, arguments.chunk_sizes)),
    }
    content = {
        "command": " ".join(
            ["python -m bench.loss.run", *(f"--{key} {value}" for key, value in options.items())]
        ),
        "dtype": arguments.dtype,
        "machine": machine,
        "repeats": arguments.repeats,
        "slow": SLOW,
        "results": results,
    }
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    draw(results, machine, arguments.out.with_suffix(".png"))
    print(f"\nwritten: {arguments.out} and {arguments.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
