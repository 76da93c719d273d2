"""Preparing at scale: shards, several processes, and a kill at any moment all end in the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlprior.config import encode
from rlprior.data import corpus as corpus_module
from rlprior.data import prepare as stage
from rlprior.data.config import DataConfig, SourceConfig, TokenizerConfig
from rlprior.data.documents import read_documents
from rlprior.data.prepare import prepare
from rlprior.tasks.config import TaskConfig


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit every few documents, a shard every few commits."""
    monkeypatch.setattr(stage, "BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(stage, "COMMIT_TOKENS", 500)
    monkeypatch.setattr(corpus_module, "SHARD_TOKENS", 2000)


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    # every text comes twice, so that copies of held-out documents come after a commit
    records = [{"text": f"Record {i % 150} says that {i % 150} + 1 = {i % 150 + 1}."} for i in range(300)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return DataConfig(
        sources=(
            SourceConfig(name="records", kind="jsonl", path="r.jsonl"),
            SourceConfig(name="problems", kind="problems", problems=TaskConfig(), num_problems=150),
        ),
        tokenizer=TokenizerConfig(vocab_size=400),
        held_out_fraction=0.2,
        data_dir=str(tmp_path),
    )


def files(directory: Path) -> dict[str, bytes]:
    found = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in found}


class Killed(BaseException):
    """Ends an attempt where SIGKILL would, between two calls to the system; SIGKILL itself is below."""


def count_calls(patch: pytest.MonkeyPatch, kill_at: int | None) -> list[str]:
    """Names of the calls that change the disk so far; the one of number `kill_at` never happens."""
    calls: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if len(calls) == kill_at:
                raise Killed
            calls.append(name)
            return function(*arguments, **options)

        return call

    writer = corpus_module._ArrayWriter
    for target, name in (
        *((writer, name) for name in ("append", "sync", "finish")),
        *((stage, name) for name in ("write_json", "save_tokenizer")),
        *((Path, name) for name in ("rename", "unlink", "mkdir")),
    ):
        patch.setattr(target, name, counted(name, getattr(target, name)))
    return calls


def tear(partial: Path) -> None:
    """Append what a killed process may leave behind its last record: more than was recorded, and not whole."""
    for name, record in read_sources(partial).items():
        if record.get("is_finished"):
            continue
        for side in ("train", "held_out"):
            num_shards = len(record[side]["shards"])
            for file in (partial / "sources" / name).glob(f"{side}.*.npy"):
                if "tokens" not in file.name or int(file.stem[-5:]) >= num_shards:
                    with file.open("ab") as end:
                        end.write(b"torn")


def read_sources(partial: Path) -> dict[str, Any]:
    path = partial / stage.PARTIAL
    return json.loads(path.read_text())["sources"] if path.exists() else {}


def test_an_attempt_ended_anywhere_is_gone_on_with_to_the_same_bytes(
    config: DataConfig, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        calls = count_calls(patch, kill_at=None)
        prepare(config, tmp_path / "undisturbed")
    expected = files(tmp_path / "undisturbed")
    assert sum("train.tokens" in name for name in expected) > 4
    # each kind of call where it first and last happens, and moments in between
    moments = {calls.index(name) for name in calls} | {
        len(calls) - 1 - calls[::-1].index(name) for name in calls
    }
    moments |= set(range(3, len(calls), len(calls) // 10))
    for kill_at in sorted(moments):
        root = tmp_path / str(kill_at)
        with pytest.MonkeyPatch.context() as patch:
            count_calls(patch, kill_at)
            with pytest.raises(Killed):
                prepare(config, root / "corpus")
        tear(root / "corpus.partial")
        prepare(config, root / "corpus")
        assert files(root / "corpus") == expected, f"killed before call {kill_at}, {calls[kill_at]}"
        assert [path.name for path in root.iterdir()] == ["corpus"]
        shutil.rmtree(root)


def kill_before_the_manifest(config: DataConfig, directory: Path) -> None:
    """Leave an attempt that has everything but its manifest."""
    with pytest.MonkeyPatch.context() as patch:
        calls = count_calls(patch, kill_at=None)
        prepare(config, directory.with_name("counted"))
    last = len(calls) - 1 - calls[::-1].index("write_json")
    with pytest.MonkeyPatch.context() as patch:
        count_calls(patch, kill_at=last)
        with pytest.raises(Killed):
            prepare(config, directory)
    assert directory.with_name(f"{directory.name}.partial").is_dir()


def test_what_is_on_record_is_not_made_again(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_tokenized = 0
    encode = stage.encode_documents

    def encode_some(tokenizer: Any, texts: list[str]) -> Any:
        nonlocal num_tokenized
        if num_tokenized > 200:
            raise Killed
        num_tokenized += len(texts)
        return encode(tokenizer, texts)

    monkeypatch.setattr(stage, "encode_documents", encode_some)
    with pytest.raises(Killed):
        prepare(config, tmp_path / "corpus")
    record = json.loads((tmp_path / "corpus.partial" / stage.PARTIAL).read_text())["sources"]
    num_recorded = record["records"]["documents_read"]
    assert 150 < num_recorded <= num_tokenized
    num_tokenized = -1000
    prepare(config, tmp_path / "corpus")
    num_documents = sum(len(list(read_documents(source, config))) for source in config.sources)
    assert num_tokenized + 1000 == num_documents - num_recorded


@pytest.mark.parametrize("change", ["file", "config"])
def test_an_attempt_on_other_input_is_not_gone_on_with(
    config: DataConfig, tmp_path: Path, change: str
) -> None:
    kill_before_the_manifest(config, tmp_path / "corpus")
    if change == "file":
        (tmp_path / "r.jsonl").write_text((tmp_path / "r.jsonl").read_text().replace("says", "said"))
    else:
        config = replace(config, held_out_fraction=0.3)
    prepare(config, tmp_path / "corpus")
    prepare(config, tmp_path / "undisturbed")
    assert files(tmp_path / "corpus") == files(tmp_path / "undisturbed")
    assert files(tmp_path / "corpus") != files(tmp_path / "counted")


def test_moved_data_and_other_workers_are_no_reason_to_begin_anew(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_before_the_manifest(config, tmp_path / "corpus")
    monkeypatch.setattr(stage, "encode_documents", None)  # nothing is tokenized again
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "r.jsonl").rename(tmp_path / "elsewhere" / "r.jsonl")
    prepare(replace(config, data_dir=str(tmp_path / "elsewhere"), num_workers=2), tmp_path / "corpus")
    assert files(tmp_path / "corpus") == files(tmp_path / "counted")


# Several processes

PROGRAM = """
import sys, json
from pathlib import Path
from rlprior.config import decode
from rlprior.data import corpus, prepare
from rlprior.data.config import DataConfig

if __name__ == "__main__":
    prepare.BATCH_CHARACTERS, prepare.COMMIT_TOKENS, corpus.SHARD_TOKENS = 1000, 2000, 2000
    config = decode(DataConfig, json.loads(sys.argv[1]), source="test")
    prepare.prepare(config, Path(sys.argv[2]))
"""


def start(config: DataConfig, tmp_path: Path) -> subprocess.Popen[str]:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [
        sys.executable,
        str(tmp_path / "program.py"),
        json.dumps(encode(config)),
        str(tmp_path / "corpus"),
    ]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def processes_of(group: int) -> list[int]:
    """Processes of a group that have not ended."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it ended while we looked
        if int(process_group) == group and state not in "ZX":
            found.append(int(path.parent.name))
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
def test_sigkill_of_a_worker_or_of_the_pool_loses_nothing_on_record(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = replace(config, sources=(config.sources[0], replace(config.sources[1], num_problems=1500)))
    partial = tmp_path / "corpus.partial"

    def num_read() -> int:
        return read_sources(partial).get("problems", {"documents_read": 0})["documents_read"]

    with start(replace(long, num_workers=2), tmp_path) as process:
        wait_for(lambda: num_read() > 0)
        os.kill(next(filter(is_worker, processes_of(process.pid))), signal.SIGKILL)
        error = process.communicate(timeout=60)[1]
    [line] = [line for line in error.splitlines() if line.startswith("rlprior.config.RunError: ")]
    assert "a tokenizing process was killed, perhaps for want of memory; run the same command again" in line
    first = num_read()
    assert 0 < first < 1500

    with start(replace(long, num_workers=2), tmp_path) as process:
        wait_for(lambda: num_read() > first)
        process.kill()
    wait_for(lambda: not processes_of(process.pid))
    assert first < num_read() < 1500, "it was finished before it could be killed; make the corpus larger"

    monkeypatch.setattr(stage, "COMMIT_TOKENS", 1 << 20)
    prepare(long, tmp_path / "corpus")
    prepare(long, tmp_path / "undisturbed")
    assert files(tmp_path / "corpus") == files(tmp_path / "undisturbed")


def is_worker(pid: int) -> bool:
    return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
