"""Records of parquet files and of data sets on the Hugging Face hub, one at a time."""

from __future__ import annotations

import functools
import itertools
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlprior.config import RunError, UsageError

MAX_CONNECT_SECONDS = 5.0


def read_parquet(path: Path, columns: tuple[str, ...] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Row numbers (from 1) and rows of a parquet file.

    Args:
        path: of the file.
        columns: those to read; None for all.

    Raises:
        UsageError: pyarrow is not installed, or there is no such column.
        RunError: no parquet file, or one without rows.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UsageError(
            f"{path}: parquet files need pyarrow; install it with: pip install 'rlprior[parquet]'"
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            if file.metadata.num_rows == 0:
                raise RunError(f"{path}: the file is empty; it needs rows")
            for name in columns or ():
                if name not in file.schema_arrow.names:
                    raise missing_field(name, file.schema_arrow.names, str(path))
            batches = file.iter_batches(columns=list(columns) if columns else None)
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            yield from enumerate(rows, start=1)
    except (pyarrow.ArrowException, OSError) as error:
        raise RunError(f"{path}: not a readable parquet file: {_first_line(error)}") from None


def read_hub(
    name: str, subset: str | None, split: str, *, folder: Path | None = None
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Row numbers (from 1) and rows of a data set, streamed: only what is read is fetched.

    Args:
        name: of the data set, `owner/name`.
        subset: its configuration; None where it has one only.
        split: of that subset.
        folder: a copy in the hub's layout on this machine, read instead.

    Raises:
        UsageError: datasets is not installed.
        RunError: the data set cannot be reached or read.
    """
    try:
        import datasets.config
        import huggingface_hub.constants
    except ImportError:
        raise UsageError(
            "the hub needs the datasets package; install it with: pip install 'rlprior[hub]'"
        ) from None
    if (
        not _is_hub_reachable()
    ):  # what was fetched before is read at once, and the rest is told without half a minute of attempts
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        rows = datasets.load_dataset(str(folder or name), name=subset, split=split, streaming=True)
        yield from enumerate(rows, start=1)
    except Exception as error:  # whatever the hub's client, its file formats and the network raise
        raise RunError(f"data set {name!r} could not be read from the hub: {_first_line(error)}") from None


@functools.cache
def _is_hub_reachable() -> bool:
    """Whether the hub answers; behind a proxy only an attempt could tell."""
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return False
    address = urllib.parse.urlsplit(ENDPOINT)
    if address.scheme in urllib.request.getproxies():
        return True
    try:
        port = address.port or {"http": 80}.get(address.scheme, 443)
        socket.create_connection((address.hostname or "", port), timeout=MAX_CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def missing_field(name: str, existing: Iterable[str], where: str) -> UsageError:
    """The error of a record without a field that is asked of it; names those it has."""
    names = ", ".join(map(repr, existing)) or "none"
    return UsageError(f"{where}: no field {name!r}; it has {names}: name one of those")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
