"""Preparing a corpus: what is on disk afterwards, and that nothing is when it fails."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlprior.config import RunError, UsageError
from rlprior.data import prepare as stage
from rlprior.data.config import DataConfig, SourceConfig, TokenizerConfig
from rlprior.data.corpus import Corpus
from rlprior.data.packing import PackedMixture
from rlprior.data.prepare import CODE, input_files, prepare
from rlprior.data.tokenizer import load_tokenizer
from rlprior.runs.folder import Run
from rlprior.runs.identity import identify
from rlprior.tasks.config import TaskConfig


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    records = [
        {"text": f"Record {i % 150} says that {i % 150} times two is {2 * (i % 150)}."} for i in range(300)
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return DataConfig(
        sources=(
            SourceConfig(name="records", kind="jsonl", path="r.jsonl"),
            SourceConfig(name="problems", kind="problems", problems=TaskConfig(), num_problems=400),
            SourceConfig(name="test", kind="jsonl", path="r.jsonl", held_out="all"),
        ),
        tokenizer=TokenizerConfig(vocab_size=400),
        held_out_fraction=0.2,
        data_dir=str(tmp_path),
    )


def tree_hash(directory: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        digest.update(str(file.relative_to(directory)).encode() + file.read_bytes())
    return digest.hexdigest()


def test_documents_come_back_from_the_disk(config: DataConfig, tmp_path: Path) -> None:
    prepare(config, tmp_path / "corpus")
    corpus = Corpus.open(tmp_path / "corpus")
    tokenizer = load_tokenizer(corpus.tokenizer_directory)
    assert corpus.vocab_size == len(tokenizer) <= 400
    for name, source in corpus.sources.items():
        for side, found in (("train", source.train), ("held_out", source.held_out)):
            entry = corpus.manifest["sources"][name][side]
            assert entry["documents"] == len(found) == len(found.ids)
            assert entry["tokens"] == len(found.shards[0]) == found.num_tokens
            assert entry["bytes"] == found.num_bytes.sum()
            file = corpus.directory / "sources" / name / f"{side}.tokens-00000.npy"
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            assert entry["shards"] == [{"tokens": entry["tokens"], "sha256": digest}]
            assert found.shards[0].dtype == np.uint16
            for index in range(len(found)):
                ids = found.document(index).tolist()
                text = tokenizer.decode(ids[1:-1])
                assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
                assert found.num_bytes[index] == len(text.encode())
                assert found.ids[index].decode() == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_sides_are_disjoint_and_held_out_documents_distinct(config: DataConfig, tmp_path: Path) -> None:
    prepare(config, tmp_path / "corpus")
    corpus = Corpus.open(tmp_path / "corpus")
    for name in ("records", "problems"):
        source = corpus.sources[name]
        assert len(source.train) > 0
        assert set(source.train.ids.tolist()).isdisjoint(source.held_out.ids.tolist())
        assert 0 < len(set(source.held_out.ids.tolist())) == len(source.held_out)
    assert len(corpus.sources["records"].train) == 2 * len(set(corpus.sources["records"].train.ids.tolist()))
    assert (len(corpus.sources["test"].train), len(corpus.sources["test"].held_out)) == (0, 150)


def test_the_vocabulary_is_blind_to_held_out_text(config: DataConfig, tmp_path: Path) -> None:
    secret = SourceConfig(name="test", kind="jsonl", path="s.jsonl", held_out="all")
    (tmp_path / "s.jsonl").write_text(json.dumps({"text": "zyzzyva " * 500}) + "\n")
    other = replace(config, sources=(*config.sources[:2], secret))
    for number, settings in enumerate((config, other)):
        prepare(settings, tmp_path / str(number))
    assert tree_hash(tmp_path / "0" / "tokenizer") == tree_hash(tmp_path / "1" / "tokenizer")


PROGRAM = """
import sys
from pathlib import Path
from rlprior.config import decode
from rlprior.data.config import DataConfig
from rlprior.data.prepare import prepare
import json
prepare(decode(DataConfig, json.loads(sys.argv[1]), source="test"), Path(sys.argv[2]))
"""


def test_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    table = {
        "tokenizer": {"vocab_size": 500, "max_training_bytes": 100_000},
        "sources": [
            {"name": "code", "kind": "embedded_code", "max_bytes": 100_000},
            {
                "name": "problems",
                "kind": "problems",
                "problems": {"difficulties": [1, 3]},
                "num_problems": 100,
            },
        ],
    }
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", PROGRAM, json.dumps(table), str(tmp_path / hash_seed)]
        subprocess.run(command, env=environment, check=True)
    assert tree_hash(tmp_path / "1") == tree_hash(tmp_path / "2")


def test_batches_do_not_depend_on_how_documents_were_read(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(config, tmp_path / "one")
    monkeypatch.setattr(stage, "BATCH_CHARACTERS", 100)
    prepare(config, tmp_path / "many")
    assert tree_hash(tmp_path / "one") == tree_hash(tmp_path / "many")


def test_an_existing_tokenizer_is_used_and_copied(config: DataConfig, tmp_path: Path) -> None:
    prepare(config, tmp_path / "first")
    given = replace(config, tokenizer=TokenizerConfig(path="first/tokenizer"))
    assert input_files(given)["tokenizer"] == tmp_path / "first" / "tokenizer"
    prepare(given, tmp_path / "second")
    assert tree_hash(tmp_path / "first" / "sources") == tree_hash(tmp_path / "second" / "sources")
    with pytest.raises(UsageError, match="absent: no such folder"):
        prepare(replace(config, tokenizer=TokenizerConfig(path="absent")), tmp_path / "third")


def test_input_files_names_what_the_corpus_depends_on(config: DataConfig, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    assert input_files(config) == {"source records file 0": path, "source test file 0": path}
    missing = replace(config, sources=(SourceConfig(name="s", kind="text", path="absent.txt"),))
    with pytest.raises(UsageError, match=r"absent\.txt: no such file"):
        input_files(missing)


def test_preparing_again_keeps_the_corpus_and_refuses_another_one(config: DataConfig, tmp_path: Path) -> None:
    directory = tmp_path / "corpus"
    prepare(config, directory)
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    prepare(replace(config, data_dir=None), directory)
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before
    with pytest.raises(UsageError, match=r"holds another corpus \(it differs in held_out_fraction\)"):
        prepare(replace(config, held_out_fraction=0.3), directory)
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match="no corpus there"):
        prepare(config, tmp_path / "other")


def test_progress_reports_every_phase(config: DataConfig, tmp_path: Path) -> None:
    calls: list[tuple[str, int]] = []
    prepare(config, tmp_path / "corpus", lambda phase, num_bytes: calls.append((phase, num_bytes)))
    assert [phase for phase, _ in calls] == ["tokenizer"] * 3 + ["records", "problems", "test"]
    assert calls[3][1] == 2 * sum(len(f"Record {i} says that {i} times two is {2 * i}.") for i in range(150))


# Failures


def nothing_left(tmp_path: Path) -> bool:
    return sorted(path.name for path in tmp_path.iterdir()) == ["r.jsonl"]


def test_bad_input_leaves_nothing_behind(config: DataConfig, tmp_path: Path) -> None:
    with (tmp_path / "r.jsonl").open("a") as file:
        file.write("{oops\n")
    with pytest.raises(RunError, match=r"r\.jsonl:301: not JSON"):
        prepare(config, tmp_path / "corpus")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("writer", ["save_tokenizer", "write_json", "DocumentWriter"])
def test_a_full_disk_is_one_clear_line_and_leaves_nothing_behind(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if writer == "DocumentWriter":
        monkeypatch.setattr(stage.DocumentWriter, "append", fail)
    else:
        monkeypatch.setattr(stage, writer, fail)
    with pytest.raises(RunError, match=r"corpus: the disk is full") as raised:
        prepare(config, tmp_path / "corpus")
    assert "\n" not in str(raised.value)
    assert nothing_left(tmp_path)


def test_the_tokenizers_library_reports_a_full_disk_as_such(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object, directory: str) -> None:
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", fail)
    with pytest.raises(RunError, match=r"corpus: the disk is full"):
        prepare(config, tmp_path / "corpus")
    assert nothing_left(tmp_path)


def test_a_killed_attempt_is_cleared_away(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "corpus.partial" / "sources").mkdir(parents=True)
    (tmp_path / "corpus.partial" / "sources" / "torn").write_bytes(b"half")
    prepare(config, tmp_path / "corpus")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "r.jsonl"]
    assert not list((tmp_path / "corpus").rglob("torn"))


@pytest.mark.parametrize("side", ["train.tokens-00000", "held_out.offsets", "train.bytes", "train.ids"])
def test_a_damaged_corpus_is_refused_by_name(config: DataConfig, tmp_path: Path, side: str) -> None:
    directory = tmp_path / "corpus"
    prepare(config, directory)
    file = directory / "sources" / "records" / f"{side}.npy"
    whole = np.load(file)
    np.save(file, whole[:-1])
    with pytest.raises(RunError, match=re.escape("sources/records: the corpus is damaged")):
        Corpus.open(directory)
    file.write_bytes(b"")
    with pytest.raises(RunError, match="the corpus is damaged"):
        Corpus.open(directory)
    file.unlink()
    with pytest.raises(RunError, match="the corpus is damaged"):
        Corpus.open(directory)


# The stage


def test_run_prepares_once_and_is_opened_by_its_directory(config: DataConfig, tmp_path: Path) -> None:
    identity = identify("data", config, code=CODE)
    for _ in range(2):
        with Run(tmp_path / "run", identity, config) as run:
            assert stage.run(config, run) == tmp_path / "run" / "corpus"
            assert run.result is not None
            corpus = Corpus.open(tmp_path / "run")
            assert run.result["train_tokens"]["records"] == len(corpus.sources["records"].train.shards[0])
    batch = PackedMixture(corpus, {"records": 1, "problems": 1}, 32, seed=0).batch(0, 4)
    assert batch.input_ids.shape == (4, 32)
