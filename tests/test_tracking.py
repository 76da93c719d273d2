"""Trackers: what arrives in them, that a run gone on with is one run there, and that no failure of theirs reaches the training."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.small_study import Killed, crash_on_call, run_cli, train_tables, write_toml

from rlprior import tracking
from rlprior.cli import main
from rlprior.runs.files import read_jsonl
from rlprior.runs.folder import Run
from rlprior.runs.identity import RunIdentity
from rlprior.tracking import TRACKERS, TrackedRun, Trackers
from rlprior.training import language_model
from rlprior.world import World

IDENTITY = RunIdentity(stage="pretrain", config={"rate": 0.5}, inputs={}, code="")


def open_run(directory: Path, *names: str, world: World | None = None) -> Run:
    config = {"rate": 0.5, "data": {"sources": ["a", "b"]}}
    return Run(directory, IDENTITY, config, world=world or World(), trackers=Trackers(names))


def log_steps(run: Run, first: int, last: int) -> None:
    """What a process does that goes on from a checkpoint of step `first - 1`."""
    run.resume_metrics(first - 1)
    for step in range(first, last + 1):
        record = {"step": step, "loss": 1 / step, "tokens_by_source": {"a": 8 * step}, "load": [[1.0]]}
        run.log(record, timing={"tokens_per_second": 100.0 * step})


def interrupt_and_finish(directory: Path, *names: str) -> None:
    """Steps 1 to 5, then from the checkpoint of step 3 to 8."""
    with open_run(directory, *names) as run:
        log_steps(run, 1, 5)
    with open_run(directory, *names) as run:
        log_steps(run, 4, 8)
        run.finish({})


EXPECTED = {
    "loss": [(step, 1 / step) for step in range(1, 9)],
    "tokens_by_source/a": [(step, 8.0 * step) for step in range(1, 9)],
    "tokens_per_second": [(step, 100.0 * step) for step in range(1, 9)],
}


def approximately(expected: Mapping[str, list[tuple[int, float]]]) -> dict[str, Any]:
    """Within float32, which TensorBoard keeps."""
    return {
        name: [(step, pytest.approx(value, rel=1e-6)) for step, value in points]
        for name, points in expected.items()
    }


def tensorboard_points(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself shows of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


# TensorBoard, really


def test_tensorboard_shows_every_step_once_after_a_run_was_gone_on_with(tmp_path: Path) -> None:
    interrupt_and_finish(tmp_path / "run", "tensorboard")
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 2
    assert tensorboard_points(tmp_path / "run") == approximately(EXPECTED)


def test_a_tracker_that_joins_late_gets_the_steps_before(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        log_steps(run, 1, 5)
    with open_run(tmp_path, "tensorboard") as run:
        log_steps(run, 4, 8)
    assert tensorboard_points(tmp_path) == approximately(EXPECTED)


def test_what_is_logged_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    """A kill must not lose what a checkpoint will take for done."""
    program = (
        "import os, sys; from pathlib import Path; from tests.test_tracking import log_steps, open_run\n"
        "run = open_run(Path(sys.argv[1]), 'tensorboard').__enter__()\n"
        "log_steps(run, 1, 2)\nos._exit(9)\n"
    )
    root = Path(__file__).parents[1]
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=root, check=False)
    assert killed.returncode == 9
    assert [step for step, _ in tensorboard_points(tmp_path)["tokens_per_second"]] == [1, 2]


def test_a_killed_training_gone_on_with_is_one_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_toml(tmp_path / "train.toml", train_tables())
    arguments = ["train", str(path), "--out", str(tmp_path / "run"), "--track", "tensorboard"]
    with monkeypatch.context() as patch:
        patch.setattr(language_model, "train_step", crash_on_call(6, False, language_model.train_step))
        with pytest.raises(Killed):
            main(arguments)
    assert main(arguments) == 0
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    shown = tensorboard_points(tmp_path / "run")
    expected = [(record["step"], record["loss"]) for record in records]
    assert [step for step, _ in expected] == [1, 2, 3, 4, 5, 6]
    assert {"loss": shown["loss"]} == approximately({"loss": expected})
    assert {"gradient_norm", "learning_rate", "tokens_per_second"} <= shown.keys()
    # tracked or not: the same run, the same bytes
    assert main(["train", str(path), "--out", str(tmp_path / "plain")]) == 0
    for name in ("manifest.json", "metrics.jsonl"):
        one, other = (tmp_path / run / name for run in ("run", "plain"))
        assert one.read_bytes() == other.read_bytes()


def test_only_the_first_of_several_processes_tracks(tmp_path: Path) -> None:
    class Second(World):
        def on_main(self, function: Any) -> Any:
            return None

    with open_run(tmp_path, "tensorboard", world=Second(rank=1, size=2)) as run:
        log_steps(run, 1, 2)
    assert not list(tmp_path.iterdir())


# Failures


class Failing:
    """A tracker that works until one of its methods raises."""

    def __init__(self, method: str, calls: list[str]) -> None:
        self.method, self.calls = method, calls

    def _call(self, method: str) -> None:
        self.calls.append(method)
        if method == self.method and self.calls.count(method) == (2 if method == "log" else 1):
            raise ConnectionError("no route to host\nat line 3 of somewhere")

    def open(self, run: TrackedRun) -> int:
        self._call("open")
        return 0

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._call("log")

    def close(self, *, is_finished: bool) -> None:
        self._call("close")


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("open", ["open"]),
        ("log", ["open", "log", "log"]),
        ("close", ["open", *["log"] * 8, "close"]),
    ],
)
def test_a_failing_tracker_is_told_once_and_the_rest_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    method: str,
    expected: list[str],
) -> None:
    calls: list[str] = []
    monkeypatch.setitem(TRACKERS, "wandb", (lambda: Failing(method, calls), "wandb"))
    with open_run(tmp_path, "wandb", "tensorboard") as run:
        log_steps(run, 1, 8)
    assert calls == expected
    assert capsys.readouterr().err == (
        "rlprior: warning: wandb: no route to host; the run goes on without wandb, its own files are complete\n"
    )
    assert tensorboard_points(tmp_path) == approximately(EXPECTED)
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 8


def test_a_missing_package_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = tracking.importlib.util.find_spec
    monkeypatch.setattr(
        tracking.importlib.util, "find_spec", lambda name: None if name == "mlflow" else original(name)
    )
    path = write_toml(tmp_path / "train.toml", train_tables())
    assert main(["train", str(path), "--out", str(tmp_path / "run"), "--track", "tensorboard", "mlflow"]) == 2
    assert capsys.readouterr().err == (
        "rlprior: --track mlflow: the package mlflow is not installed; pip install mlflow, or leave mlflow out\n"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["train.toml"]


def test_an_unknown_tracker_is_told_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--track", "neptune"]) == 2
    error = capsys.readouterr().err
    assert "invalid choice: 'neptune'" in error
    assert all(name in error for name in TRACKERS)
    assert error.count("\n") == 1


def test_asking_for_trackers_imports_none_of_them() -> None:
    program = (
        "import sys; from rlprior.tracking import Trackers, require_packages; require_packages(['tensorboard'])\n"
        "Trackers(['tensorboard']); assert not {'torch', 'tensorboard'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
def test_the_runs_of_a_study_are_tracked_one_by_one(tmp_path: Path) -> None:
    from tests.small_study import study_tables

    path = write_toml(tmp_path / "study.toml", study_tables())
    done = run_cli("study", path, "--out", tmp_path / "out", "--track", "tensorboard", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    tracked = {folder.parent.name.rsplit("-", 1)[0] for folder in tmp_path.rglob("tensorboard")}
    stages = ("pretrain", "midtrain", "rl")
    assert tracked == {f"{stage}-{arm}-s0" for stage in stages for arm in ("ce", "sharp")}


# The others, by doubles of the parts of their interfaces that are used


class FakeWandb:
    """`wandb.init` and what it returns; steps below the run's own are dropped, as the service does."""

    def __init__(self) -> None:
        self.runs: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.inits: list[dict[str, Any]] = []
        self.exit_codes: list[int] = []

    def Settings(self, **options: Any) -> dict[str, Any]:
        return options

    def init(self, **options: Any) -> Any:
        self.inits.append(options)
        history = self.runs.setdefault(options["id"], [])

        def log(values: dict[str, float], step: int) -> None:
            assert not history or step > history[-1][0], "wandb warns of steps that do not rise"
            history.append((step, values))

        next_step = history[-1][0] + 1 if history else 0
        return SimpleNamespace(
            step=next_step, log=log, finish=lambda exit_code: self.exit_codes.append(exit_code)
        )


def test_wandb_goes_on_with_the_run_of_that_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    interrupt_and_finish(tmp_path / "run", "wandb")
    (history,) = fake.runs.values()
    shown = {name: [(step, values[name]) for step, values in history] for name in EXPECTED}
    assert shown == EXPECTED
    assert set(history[0][1]) == set(EXPECTED)
    for options in fake.inits:
        assert options["id"] == IDENTITY.id
        assert options["name"] == f"run-{IDENTITY.id}"
        assert options["resume"] == "allow"
        assert options["project"] == "rlprior"
        assert options["dir"] == str(tmp_path / "run")
        assert options["config"]["rate"] == 0.5
    assert fake.exit_codes == [1, 0], "stopped, then finished"


class FakeMlflow:
    """`mlflow.MlflowClient` over a dictionary."""

    def __init__(self) -> None:
        self.found: list[Any] = []
        self.points: list[tuple[str, float, int]] = []
        self.params: dict[str, str] = {}
        self.status: list[str] = []
        self.queries: list[str] = []

    def MlflowClient(self) -> FakeMlflow:
        return self

    def set_experiment(self, name: str) -> Any:
        assert name == "rlprior"
        return SimpleNamespace(experiment_id="7")

    def search_runs(self, experiments: list[str], query: str) -> list[Any]:
        self.queries.append(query)
        return self.found

    def create_run(self, experiment: str, tags: dict[str, str], run_name: str) -> Any:
        assert (experiment, tags) == ("7", {"rlprior.id": IDENTITY.id})
        info, data = SimpleNamespace(run_id="r"), SimpleNamespace(metrics={"loss": 0.0})
        self.found.append(SimpleNamespace(info=info, data=data))
        return self.found[0]

    def get_metric_history(self, run_id: str, name: str) -> list[Any]:
        return [SimpleNamespace(step=step) for key, _, step in self.points if key == name]

    def log_batch(self, run_id: str, metrics: list[Any] = [], params: list[Any] = []) -> None:  # noqa: B006
        assert len(params) <= 100
        self.points += [(metric.key, metric.value, metric.step) for metric in metrics]
        self.params |= {param.key: param.value for param in params}

    def update_run(self, run_id: str, status: str) -> None:
        self.status.append(status)

    def set_terminated(self, run_id: str, status: str) -> None:
        self.status.append(status)


def test_mlflow_goes_on_with_the_run_of_that_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeMlflow()
    entities = SimpleNamespace(
        Metric=lambda key, value, timestamp, step: SimpleNamespace(key=key, value=value, step=step),
        Param=lambda key, value: SimpleNamespace(key=key, value=value),
    )
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    for name in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "rlprior" if "NAME" in name else "1")
    interrupt_and_finish(tmp_path / "run", "mlflow")
    shown = {name: [(step, value) for key, value, step in fake.points if key == name] for name in EXPECTED}
    assert shown == EXPECTED
    assert {key for key, _, _ in fake.points} == set(EXPECTED)
    assert fake.params == {"stage": "pretrain", "rate": "0.5", "data.sources": '["a", "b"]'}
    assert fake.queries == [f"tags.`rlprior.id` = '{IDENTITY.id}'"] * 2
    assert fake.status == ["KILLED", "RUNNING", "FINISHED"]


# The others, really, where they are installed

READ_BACK = {
    "mlflow": """
os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{root}/mlflow.db"
interrupt_and_finish(root / "run", "mlflow")
import mlflow
client = mlflow.MlflowClient()
(run,) = client.search_runs([client.get_experiment_by_name("rlprior").experiment_id])
assert run.info.status == "FINISHED"
assert run.data.params["data.sources"] == '["a", "b"]'
id = run.info.run_id
shown = {name: [(m.step, m.value) for m in client.get_metric_history(id, name)] for name in run.data.metrics}
""",
    "trackio": """
os.environ["TRACKIO_DIR"] = f"{root}/trackio"
interrupt_and_finish(root / "run", "trackio")
from trackio.sqlite_storage import SQLiteStorage
(name,) = SQLiteStorage.get_runs("rlprior")
assert name == f"run-{IDENTITY.id}", name
logs = SQLiteStorage.get_logs("rlprior", name)
shown = {key: [(log["step"], log[key]) for log in logs] for key in EXPECTED}
""",
}


@pytest.mark.parametrize("name", READ_BACK)
def test_the_real_package_shows_every_step_once(tmp_path: Path, name: str) -> None:
    """In a process of its own: the packages warn of their own dependencies, and read where they write when imported."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    program = (
        "import os, sys; from pathlib import Path; root = Path(sys.argv[1])\n"
        "from tests.test_tracking import EXPECTED, IDENTITY, interrupt_and_finish\n"
        f"{READ_BACK[name]}\nassert shown == EXPECTED, shown\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=Path(__file__).parents[1])
