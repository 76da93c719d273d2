"""`rlprior watch`: what it says of runs and studies that are made, finished, stopped, stuck or none, from their files alone."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.small_study import command, environment, make_runs, study_config

from rlprior.cli import main
from rlprior.reports.watch import RecordFile, WatchedRun, WatchedStudy, open_run_or_study
from rlprior.reports.watch_view import draw, sparkline, watch
from rlprior.runs.folder import Run, is_being_written
from rlprior.runs.identity import RunIdentity
from rlprior.study.plan import plan_study
from rlprior.study.runner import write_study_file


def open_run(directory: Path, stage: str = "pretrain") -> Run:
    return Run(directory, RunIdentity(stage=stage, config={}, inputs={}, code=""), {})


def log_steps(run: Run, last: int, total: int = 100) -> None:
    run.resume_metrics(0)
    for step in range(5, last + 1, 5):
        record = {
            "step": step,
            "cross_entropy_nats": 6 - step / 20,
            "load": [[1.0]],
            "tokens_by_source": {"a": step},
        }
        run.log(record, timing={"tokens_per_second": 12345.6})
        run._last_progress = 0.0  # every one reaches the disk
        run.progress(step, total, unit="steps", rate=2.0, note=f"loss {6 - step / 20:.3f}")


def show(directory: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `rlprior watch --once` prints."""
    capsys.readouterr()
    assert main(["watch", str(directory), "--once"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def age(directory: Path, seconds: float) -> None:
    """Make the run's signs of life so old."""
    for name in ("progress.json", "lock"):
        os.utime(directory / name, (time.time() - seconds,) * 2)


# A run


def test_a_run_while_it_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "ce"
    with open_run(directory) as run:
        assert "starting" in show(directory, capsys)
        log_steps(run, 40)
        text = show(directory, capsys)
        assert "pretrain ce  running" in text
        # 60 steps at that rate, less the seconds since the last of them
        assert re.search(r"40 of 100 steps, loss 4\.000, 2\.0 steps/s, (30|2\d) s left\n", text)
        assert " 40%" in text
        assert "cross_entropy_nats, steps 5 to 40\n5.75 █▇▆▅▄▃▂▁ 4\n" in text
        assert "tokens_by_source/a" in text
        assert "12,346" in text
        assert "load" not in text.replace("tokens_by_source", "")
        assert "!" not in text


def test_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_run(tmp_path) as run:
        log_steps(run, 100)
        run.finish({})
    text = show(tmp_path, capsys)
    assert "  done\n" in text
    assert "100%" in text
    assert "left" not in text
    assert "!" not in text


def test_a_stopped_run_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_run(tmp_path) as run:
        log_steps(run, 40)
    text = show(tmp_path, capsys)
    assert "  not running\n" in text
    assert (
        "! not running, stopped at 40 of 100 steps; the same command goes on from the last checkpoint" in text
    )
    assert "left" not in text


def test_silence_is_told_when_it_is_long_for_the_pace_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A record each 5 steps of half a second: 2.5 s, so that the floor of a minute holds."""
    with open_run(tmp_path) as run:
        log_steps(run, 40)
        age(tmp_path, 50)
        text = show(tmp_path, capsys)
        assert re.search(r"last news 5\d s ago", text)
        assert "!" not in text
        age(tmp_path, 170)
        assert "! no progress for 3 min, though its process is there" in show(tmp_path, capsys)
        # a step of 20 s
        progress = json.loads((tmp_path / "progress.json").read_text())
        (tmp_path / "progress.json").write_text(json.dumps({**progress, "rate": 0.05}))
        age(tmp_path, 900)
        assert "!" not in show(tmp_path, capsys)
        age(tmp_path, 1085)
        assert "! no progress for 18 min" in show(tmp_path, capsys)


def test_a_run_that_is_gone_on_with_is_not_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_run(tmp_path) as run:
        log_steps(run, 40)
    age(tmp_path, 5000)
    with open_run(tmp_path):
        text = show(tmp_path, capsys)
    assert "running" in text
    assert "!" not in text


def test_looking_does_not_keep_a_run_from_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks holds the lock for an instant; a run that starts in it tries again."""
    assert not is_being_written(tmp_path)
    with open_run(tmp_path):
        assert is_being_written(tmp_path)
    assert not is_being_written(tmp_path)
    with (tmp_path / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        monkeypatch.setattr("rlprior.runs.folder.time.sleep", lambda _: fcntl.flock(lock, fcntl.LOCK_UN))
        with open_run(tmp_path):
            assert is_being_written(tmp_path)


# Files that grow


def test_a_growing_file_is_read_once_and_again_where_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = RecordFile(path, "loss")
    records.update()
    assert records.last == {}
    with path.open("w") as file:
        file.write('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "lo')
    records.update()
    assert (records.steps, records.values, records.last["step"]) == ([1], [3.0], 2)
    with path.open("a") as file:
        file.write('ss": 2.0}\n')
    records.update()
    assert (records.steps, records.values) == ([1, 3], [3.0, 2.0])
    # a run that is gone on with renames a shorter file over the old one
    shorter = tmp_path / "aside"
    shorter.write_text('{"step": 1, "loss": 3.0}\n')
    shorter.replace(path)
    records.update()
    assert (records.steps, records.values, records.last["step"]) == ([1], [3.0], 1)


@pytest.mark.parametrize("text", ["nonsense\n", "[1]\n", '{"loss": 1.0}\n', '"x"\n'])
def test_a_file_that_no_run_writes_shows_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    records = RecordFile(path, "loss")
    records.update()
    assert (records.last, records.steps, records.values) == ({}, [], [])


def test_a_sparkline_keeps_its_ends_whatever_its_length() -> None:
    values = [float(i) for i in range(1000)]
    line = sparkline(values, 16)
    assert len(line) == 16
    assert line == "".join(sorted(line, key="▁▂▃▄▅▆▇█".index))
    assert (line[0], line[-1]) == ("▁", "█")
    assert sparkline([2.0, 1.0], 16) == "█▁"


# A study


@pytest.fixture
def study(tmp_path: Path) -> tuple[Path, dict[str, Path]]:
    """A study that is planned, and the folder of each of its runs by label."""
    config = study_config()
    plan = plan_study(config, tmp_path)
    write_study_file(config, tmp_path, plan, command="rlprior study small.toml")
    return tmp_path, {run.label: run.directory for run in plan}


def finish(directory: Path, stage: str, seconds: float) -> None:
    with open_run(directory, stage) as run:
        run.finish({})
    (directory / "sessions.jsonl").write_text(json.dumps({"seconds": seconds}) + "\n")


def test_a_study_from_its_first_sign_to_its_last(
    study: tuple[Path, dict[str, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    root, runs = study
    text = show(root, capsys)
    assert "a small study  not running" in text
    assert "no run is open right now" in text
    os.utime(root / "study.json", (time.time() - 100,) * 2)
    assert "! no run is being made; the same command goes on: rlprior study small.toml" in show(root, capsys)
    for label, seconds in (("data", 1.0), ("pretrain ce s0", 10.0)):
        finish(runs[label], label.split()[0], seconds)
    with open_run(runs["pretrain sharp s0"]) as run, open_run(runs["midtrain ce s0"], "midtrain") as stopped:
        log_steps(run, 40)
        log_steps(stopped, 60)
        stopped.__exit__(None, None, None)
        text = show(root, capsys)
        assert "a small study  running" in text
        assert "1 of 2 runs done" in text
        assert "time left: known once a run of each stage is done" in text
        assert re.search(
            r"pretrain sharp s0\n  40 of 100 steps, loss 4\.000, 2\.0 steps/s, (30|2\d) s left\n", text
        )
        assert "cross_entropy_nats 5.75 █▇▆▅▄▃▂▁ 4" in text
        assert "! midtrain ce s0: not running, stopped at 60 of 100 steps" in text
    for label, directory in runs.items():
        finish(directory, label.split()[0], 1.0)
    text = show(root, capsys)
    assert "a small study  done" in text
    assert f"report: not written yet; rlprior report {root}" in text
    assert "!" not in text


def test_the_time_left_of_a_study_is_that_of_its_finished_runs(study: tuple[Path, dict[str, Path]]) -> None:
    root, runs = study
    seconds = {"data": 1.0, "pretrain": 100.0, "midtrain": 50.0, "rl": 30.0, "evaluate": 5.0}
    for label, directory in runs.items():
        if "ce" in label or label == "data":
            finish(directory, label.split()[0], seconds[label.split()[0]])
    with open_run(runs["pretrain sharp s0"]) as run:
        log_steps(run, 40)
        watched = open_run_or_study(root)
        assert isinstance(watched, WatchedStudy)
        # one run in progress; three evaluations wait
        assert watched.seconds_left == pytest.approx(0.6 * 100 + 50 + 30 + 3 * 5)


def test_a_study_whose_runs_were_really_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = study_config()
    plan = plan_study(config, tmp_path)
    write_study_file(config, tmp_path, plan, command="rlprior study small.toml")
    data, pretrain = make_runs(tmp_path, "data", "pretrain ce s0")
    text = show(tmp_path, capsys)
    assert "data" in text
    assert "1 of 1 runs done" in text
    assert "1 of 2 runs done" in text
    assert "data" in show(data.directory, capsys)
    text = show(pretrain.directory, capsys)
    assert "num_spikes" in text
    assert "6 of 6 steps" in text


# Folders that are none


def not_a_study(directory: Path, text: str) -> None:
    (directory / "study.json").write_text(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.rmdir(), "{path}: no such folder; give the one that --out names"),
        (lambda path: None, "{path}: neither a run nor a study; give the folder that --out named"),
        (
            lambda path: (path / "manifest.json").write_text('{"sources": []}'),
            "{path}: neither a run nor a study; give the folder that --out named",
        ),
        (
            lambda path: (path / "manifest.json").write_text("{"),
            "{path}/manifest.json: cannot be read as JSON",
        ),
        (lambda path: not_a_study(path, "{"), "{path}/study.json: cannot be read as JSON"),
        (lambda path: not_a_study(path, "[]"), "{path}/study.json: not what `rlprior study` writes"),
        (
            lambda path: not_a_study(path, '{"runs": [1]}'),
            "{path}/study.json: not what `rlprior study` writes",
        ),
    ],
)
def test_another_folder_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Any, message: str
) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    make(path)
    assert main(["watch", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"rlprior: {message.format(path=path)}")
    assert error.count("\n") == 1


# The terminal


def test_watching_imports_neither_torch_nor_numpy(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        log_steps(run, 40)
    program = (
        f"import sys; from rlprior.cli import main; assert main(['watch', {str(tmp_path)!r}, '--once']) == 0\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_a_live_view_ends_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "rlprior.reports.watch_view.Console", lambda **_: Console(force_terminal=True, width=100)
    )
    run = open_run(tmp_path)
    run.__enter__()
    log_steps(run, 40)
    looks: list[float] = []

    def finish_after_two(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            run.finish({})
            run.__exit__(None, None, None)

    monkeypatch.setattr("rlprior.reports.watch_view.time.sleep", finish_after_two)
    watch(tmp_path, is_once=False)
    text = capsys.readouterr().out
    assert "running" in text
    assert "done" in text
    assert len(looks) == 2


def test_ctrl_c_ends_the_looking_quietly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rlprior.reports.watch_view.watch", interrupt)
    assert main(["watch", str(tmp_path)]) == 0


def test_without_a_terminal_it_prints_once(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        log_steps(run, 40)
        done = subprocess.run(
            command("watch", tmp_path),
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    assert done.stdout.count("40 of 100 steps") == 1
    assert "\x1b" not in done.stdout


def test_names_with_brackets_are_shown_as_they_are(tmp_path: Path) -> None:
    directory = tmp_path / "a[bold]b"
    with open_run(directory) as run:
        log_steps(run, 5)
    watched = open_run_or_study(directory)
    assert isinstance(watched, WatchedRun)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(draw(watched))
    assert "a[bold]b" in capture.get()
