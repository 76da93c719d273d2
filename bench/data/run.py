"""Rates of the data path: packed rows out of memory-mapped shards, an epoch's order, reading, tokenizing.

    python -m bench.data.run                          # some five minutes on two cores; 1 GB of disk, 2 GB of memory
    python -m bench.data.run --megatokens 20 --epoch-documents 1000000 --text-megabytes 5   # a first look

Writes JSON with every repeat, the machine and the versions.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rlprior.config import decode, encode
from rlprior.data import corpus as corpus_module
from rlprior.data.config import DataConfig, SourceConfig, TokenizerConfig
from rlprior.data.corpus import SIDES, Corpus, DocumentWriter, TokenizedDocuments, TokenizedSource
from rlprior.data.documents import read_documents
from rlprior.data.embedded import read_code, read_english
from rlprior.data.packing import PackedMixture
from rlprior.data.prepare import prepare
from rlprior.data.tokenizer import encode_documents, load_tokenizer, save_tokenizer, train_tokenizer
from rlprior.runs.provenance import provenance

WEIGHTS = {f"source-{k}": weight for k, weight in enumerate((30, 20, 15, 10, 10, 8, 5, 2))}
WORLD_SIZE = 8
RANK_TOKENS = 1 << 16
"""Of one rank in one step: with 8 ranks, a batch of half a million tokens."""


Rates = dict[str, float]


@contextlib.contextmanager
def measuring(into: list[Rates], num_units: int) -> Iterator[None]:
    """Append the units a second of what happens inside, by the clock and by this process's own processor time."""
    start, start_cpu = time.perf_counter(), time.process_time()
    yield
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    into.append({"per_second": num_units / seconds, "per_cpu_second": num_units / cpu_seconds})


def summarize(measured: list[Rates]) -> dict[str, Any]:
    """Medians, and every repeat."""
    medians = {key: statistics.median(one[key] for one in measured) for key in measured[0]}
    return medians | {"repeats": measured}


def write_synthetic_corpus(directory: Path, num_tokens: int) -> None:
    """Sources in the mixture's proportions, documents of log-normal length (median 400 tokens, mean 1000), shards of 2**25."""
    generator = np.random.default_rng(0)
    corpus_module.SHARD_TOKENS = 1 << 25
    for name, weight in WEIGHTS.items():
        folder = directory / name
        folder.mkdir(parents=True)
        for side in SIDES:
            with DocumentWriter(folder, side, np.dtype(np.uint16)) as writer:
                while side == "train" and writer.record["tokens"] < num_tokens * weight / sum(
                    WEIGHTS.values()
                ):
                    length = 2 + int(generator.lognormal(np.log(400), 1.35))
                    ids = generator.integers(0, 32768, length, dtype=np.uint16)
                    writer.append(ids, num_bytes=4 * length, text_id="0" * 16)
                writer.finish()


def drop_from_page_cache(directory: Path) -> None:
    """Make the next read of each file one from the disk, as far as the system follows the advice."""
    for file in directory.rglob("*.tokens-*.npy"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def open_synthetic_corpus(directory: Path) -> Corpus:
    """The written corpus, memory-mapped anew."""
    sources = {
        name: TokenizedSource(name, *(TokenizedDocuments.open(directory / name, side) for side in SIDES))
        for name in WEIGHTS
    }
    return Corpus(directory, sources, {"vocab_size": 32768})


def measure_packing(
    directory: Path, num_tokens: int, repeats: int, num_steps: int = 20
) -> list[dict[str, Any]]:
    """Tokens a second of one rank of eight that takes its own rows of each step."""
    write_synthetic_corpus(directory, num_tokens)
    results: list[dict[str, Any]] = []
    for length, cache in itertools.product((4096, 16384), ("full", "empty")):
        num_rows = RANK_TOKENS // length
        measured: list[Rates] = []
        for repeat in range(repeats):
            mixture = PackedMixture(open_synthetic_corpus(directory), WEIGHTS, length, seed=0)
            mixture.batch(0, 100)  # every source orders its first epoch
            if cache == "empty":
                drop_from_page_cache(directory)
            with measuring(measured, num_steps * RANK_TOKENS):
                for step in range(repeat * num_steps, (repeat + 1) * num_steps):
                    mixture.batch((step * WORLD_SIZE + 3) * num_rows, num_rows)
        results.append({"sequence_length": length, "page_cache": cache, "tokens": summarize(measured)})
        print(f"packing: {results[-1]}", file=sys.stderr)
    return results


def measure_epoch_order(num_documents: int) -> dict[str, Any]:
    """Seconds and memory of the order of an epoch, which each rank makes once an epoch."""
    lengths = np.random.default_rng(0).integers(2, 2000, num_documents)
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    del lengths
    tokens = np.broadcast_to(np.uint16(0), (int(offsets[-1]),))
    side = TokenizedDocuments((tokens,), offsets, np.broadcast_to(0, num_documents), np.empty(0, "S16"))
    corpus = Corpus(Path(), {"s": TokenizedSource("s", side, side)}, {})
    mixture = PackedMixture(corpus, {"s": 1}, 4096, seed=0)
    before = resident_bytes()
    start = time.perf_counter()
    mixture.batch(0, 1)
    seconds = time.perf_counter() - start
    return {
        "documents": num_documents,
        "seconds": seconds,
        "bytes_per_document": (resident_bytes() - before) / num_documents,
    }


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def write_texts(path: Path, num_bytes: int) -> int:
    """Python's own library and documentation, over and over, as JSON lines. Returns the bytes of text."""
    texts = [text for text, _ in (*read_english(), *read_code())]
    total, number = 0, 0
    with path.open("w") as file:
        while total < num_bytes:
            text = f"{number} {texts[number * 7919 % len(texts)]}"
            file.write(json.dumps({"text": text}) + "\n")
            total += len(text.encode())
            number += 1
    return total


def write_megatron(path: Path, documents: list[np.ndarray]) -> None:
    lengths = np.array([len(ids) for ids in documents], dtype="<i4")
    ends = np.cumsum(lengths, dtype="<i8")
    path.with_suffix(".bin").write_bytes(np.concatenate(documents).astype("<u2").tobytes())
    header = b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + bytes([8])
    counts = np.array([len(lengths), len(lengths) + 1], dtype="<i8")
    borders = np.arange(len(lengths) + 1, dtype="<i8")
    path.write_bytes(header + b"".join(a.tobytes() for a in (counts, lengths, 2 * (ends - lengths), borders)))


def measure_preparation(directory: Path, num_bytes: int, vocab_size: int, repeats: int) -> dict[str, Any]:
    """Bytes and tokens a second of reading, of tokenizing by 1 and 2 processes, and of token ids that are given."""
    directory.mkdir()
    num_bytes = write_texts(directory / "t.jsonl", num_bytes)
    source = SourceConfig(name="s", kind="jsonl", path="t.jsonl")
    texts = [text for text, _ in read_english()][:3000]
    save_tokenizer(train_tokenizer(texts, vocab_size), directory / "tokenizer")
    config = DataConfig(
        sources=(source,), tokenizer=TokenizerConfig(path="tokenizer"), data_dir=str(directory)
    )
    read: list[Rates] = []
    for _ in range(repeats):
        with measuring(read, num_bytes):
            for _document in read_documents(source, config):
                pass
    tokenized: list[dict[str, Any]] = []
    for repeat in range(repeats):
        for num_workers, threads in ((1, "false"), (1, "true"), (2, "false")):
            os.environ["TOKENIZERS_PARALLELISM"] = threads
            target = directory / f"corpus-{num_workers}-{threads}-{repeat}"
            measured = time_preparation(encode(config) | {"num_workers": num_workers}, target)
            tokenized.append({"num_workers": num_workers, "library_threads": threads == "true", **measured})
            print(f"tokenized {repeat + 1} of {repeats}: {tokenized[-1]}", file=sys.stderr)
    tokenizer = load_tokenizer(directory / "tokenizer")
    ids = encode_documents(tokenizer, [d.text for d, _ in read_documents(source, config)])
    write_megatron(directory / "m.idx", ids)
    given = DataConfig(
        sources=(SourceConfig(name="s", kind="megatron", path="m.idx"),),
        tokenizer=config.tokenizer,
        data_dir=config.data_dir,
    )
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    given_ids: list[Rates] = []
    for _ in range(repeats):
        with measuring(given_ids, sum(map(len, ids))):
            for _document in read_documents(given.sources[0], given):
                pass
    return {
        "text_bytes": num_bytes,
        "vocab_size": len(tokenizer),
        "read_jsonl_bytes": summarize(read),
        "tokenize": tokenized,
        "megatron_tokens": summarize(given_ids),
    }


def time_preparation(table: dict[str, Any], target: Path) -> dict[str, float]:
    """Tokens a second from the first batch that is written to the last, and processor seconds here and in the workers."""
    reports: list[tuple[float, int]] = []
    before = os.times()
    prepare(
        decode(DataConfig, table, source="benchmark"),
        target,
        lambda phase, num_bytes: reports.append((time.perf_counter(), num_bytes)),
    )
    after = os.times()
    (first, bytes_before), (last, num_bytes) = reports[0], reports[-1]
    sides = Corpus.open(target).manifest["sources"]["s"]
    num_tokens = sum(sides[side]["tokens"] for side in SIDES)
    return {
        "tokens": num_tokens,
        "tokens_per_second": num_tokens * (num_bytes - bytes_before) / num_bytes / (last - first),
        "cpu_seconds": after.user + after.system - before.user - before.system,
        "worker_cpu_seconds": after.children_user
        + after.children_system
        - before.children_user
        - before.children_system,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megatokens", type=int, default=300, help="of the synthetic corpus")
    parser.add_argument("--epoch-documents", type=int, default=50_000_000)
    parser.add_argument("--text-megabytes", type=int, default=24)
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("bench/results/data-cpu.json"))
    known = parser.parse_args()
    settings = " ".join(
        f"--{key.replace('_', '-')} {value}" for key, value in vars(known).items() if key != "out"
    )
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        result = {
            "command": f"python -m bench.data.run {settings}",
            "machine": provenance(),
            "load_before": os.getloadavg()[0],
            "packing": measure_packing(root / "packing", known.megatokens * 10**6, known.repeats),
            "epoch_order": measure_epoch_order(known.epoch_documents),
            "preparation": measure_preparation(
                root / "text", known.text_megabytes * 10**6, known.vocab_size, known.repeats
            ),
            "load_after": os.getloadavg()[0],
        }
    known.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"results: {known.out}")


if __name__ == "__main__":
    main()
