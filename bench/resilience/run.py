"""Kill real training and RL commands at random moments, damage checkpoints at random places, and compare what they end with.

    python -m bench.resilience.run                              # 100 kills and 20 damages, about half an hour
    python -m bench.resilience.run --kills 4 --damages 2 --seed 7

Each of the two commands is made once in peace. Then it is started, killed with SIGKILL and started again until it gets through; every
end is compared with the one in peace, byte for byte: metrics, result, weights, optimizer. When it got through, it begins anew, until
all kills are used up. Damaged is one file of the newest checkpoint of a run that is not finished. Writes JSON with every kill and
every damage; exits with 1 if one of them changed a byte or went unnoticed.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.small_study import (
    environment,
    make_runs,
    outcome,
    rl_tables,
    study_config,
    train_tables,
    write_toml,
)

from rlprior.runs.files import read_jsonl
from rlprior.runs.provenance import provenance
from rlprior.training.checkpoint import checkpoint_directory

Command = list[str | Path]


def main() -> int:
    """Make the measurement; 0 if nothing was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="half of them in training, half in RL")
    parser.add_argument("--damages", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of moments and places")
    parser.add_argument("--out", type=Path, default=Path("bench/results/resilience-cpu.json"))
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        commands = make_commands(Path(folder))
        kills = {
            name: kill_again_and_again(name, one, Path(folder), arguments.kills // 2, draw)
            for name, one in commands.items()
        }
        damages = [damage_once(commands["train"], Path(folder), draw) for _ in range(arguments.damages)]
    report = {
        "command": "python -m bench.resilience.run " + " ".join(sys.argv[1:]),
        **provenance(),
        "seed": arguments.seed,
        "num_kills": sum(found["num_kills"] for found in kills.values()),
        "kills": kills,
        "num_damages": len(damages),
        "damages": damages,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    num_ends = sum(found["num_ends"] for found in kills.values())
    num_same = sum(found["num_same_ends"] for found in kills.values())
    num_named = sum(one["is_named"] and one["is_same_end"] for one in damages)
    print(f"{report['num_kills']} kills: {num_same} of {num_ends} ends are the same bytes")
    print(f"{num_named} of {len(damages)} damages were named and cost nothing but time")
    print(f"written: {arguments.out}")
    return int(num_same < num_ends or num_named < len(damages))


def make_commands(folder: Path) -> dict[str, Command]:
    """A training and an RL command that save often; RL starts from a model that gets some answers right."""
    train = write_toml(
        folder / "train.toml",
        train_tables("training.num_steps=400", "training.save_every=5", "training.eval_every=100"),
    )
    config = study_config("pretrain.num_steps=400", "pretrain.save_every=400", "pretrain.eval_every=0")
    _, pretrain = make_runs(folder / "study", "data", "pretrain ce s0", config=config)
    rl = write_toml(
        folder / "rl.toml",
        rl_tables(
            "rl.num_steps=100",
            "rl.save_every=2",
            "rl.dynamic_sampling=refill",
            "rl.max_refills=1",
            "rl.samples_per_prompt=8",
            "rl.length_schedule=[{until_step=40, max_new_tokens=24}, {max_new_tokens=32}]",
        ),
    )
    start = checkpoint_directory(pretrain.directory, 400)
    return {"train": ["train", train], "rl": ["rl", rl, "--init-from", start]}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "rlprior", *map(str, arguments)]


def finish(arguments: Command, out: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(*arguments, "--out", out), env=environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return done


def num_records(run: Path) -> int:
    return len(read_jsonl(run / "metrics.jsonl"))


def kill_again_and_again(
    name: str, arguments: Command, folder: Path, num_kills: int, draw: random.Random
) -> dict[str, Any]:
    """Kill one command `num_kills` times, over as many runs of it as that takes."""
    whole, killed = folder / f"{name}-whole", folder / f"{name}-killed"
    finish(arguments, whole)
    expected = outcome(whole)
    kills: list[dict[str, Any]] = []
    num_ends = num_same_ends = 0
    while len(kills) < num_kills or killed.exists():
        if len(kills) < num_kills:
            kills += kill_once(arguments, killed, draw)
        else:
            finish(arguments, killed)
        if (killed / "result.json").exists():
            num_ends += 1
            num_same_ends += outcome(killed) == expected
            shutil.rmtree(killed)
        print(
            f"{name}: {len(kills)} of {num_kills} kills, {num_same_ends} of {num_ends} ends the same",
            flush=True,
        )
    return {
        "num_kills": len(kills),
        "num_ends": num_ends,
        "num_same_ends": num_same_ends,
        "kills": kills,
    }


def kill_once(arguments: Command, out: Path, draw: random.Random) -> list[dict[str, Any]]:
    """Start the command and kill it at a random moment: one time in five while it starts, else after it got further.

    Returns one record, or none where the command was faster than the kill.
    """
    before = num_records(out)
    while_starting = draw.random() < 0.2
    delay = draw.uniform(0, 8 if while_starting else 1)
    process = subprocess.Popen(
        command(*arguments, "--out", out),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not while_starting and num_records(out) <= before and process.poll() is None:
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    _, error = process.communicate()
    if process.returncode == 0:
        return []
    if process.returncode != -signal.SIGKILL:
        raise SystemExit(error)
    last = sorted((out / "checkpoints").glob("step-*"))[-1:] if out.exists() else []
    return [
        {
            "moment": "while it started" if while_starting else "after it got further",
            "delay_seconds": round(delay, 3),
            "logged_steps": num_records(out),
            "last_checkpoint": last[0].name if last else None,
            "was_saving": any((out / "checkpoints").glob(".*step-*")) if out.exists() else False,
        }
    ]


def flip(file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def truncate(file: Path, draw: random.Random) -> None:
    with file.open("r+b") as opened:
        opened.truncate(draw.randrange(file.stat().st_size))


def erase_block(file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    start = draw.randrange(len(content))
    stop = min(len(content), start + 4096)
    content[start:stop] = bytes(byte ^ 0xFF for byte in content[start:stop])
    file.write_bytes(content)


def remove(file: Path, draw: random.Random) -> None:
    file.unlink()


def damage_once(arguments: Command, folder: Path, draw: random.Random) -> dict[str, Any]:
    """Damage the newest checkpoint of the run made in peace, as if its result had not been written, and go on."""
    whole, damaged = folder / "train-whole", folder / "train-damaged"
    shutil.copytree(whole, damaged)
    (damaged / "result.json").unlink()
    newest = sorted((damaged / "checkpoints").glob("step-*"))[-1]
    file = draw.choice(sorted(newest.iterdir()))
    # without its moments a checkpoint is what pruning leaves: passed over in silence, rightly
    kinds = [flip, truncate, erase_block, *([] if file.name.startswith("optimizer") else [remove])]
    kind = draw.choice(kinds)
    kind(file, draw)
    done = finish(arguments, damaged)
    found = {
        "file": file.name,
        "kind": kind.__name__,
        "is_named": f"{newest.name}: {file.name} " in done.stderr,
        "is_same_end": outcome(damaged) == outcome(whole),
    }
    shutil.rmtree(damaged)
    print(found, flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
