"""Named random streams: the same (seed, names) gives the same numbers in every process, whatever ran before."""

from __future__ import annotations

import hashlib
import operator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy
    import torch


def stream_seed(seed: int, *names: str | int) -> int:
    """63-bit seed of the stream `names` under `seed`.

    Args:
        seed: the user's seed.
        names: what the stream is for, for example `"rollout", step`. `1` and `"1"` name different streams.

    >>> stream_seed(0, "rollout", 1) == stream_seed(0, "rollout", 1)
    True
    >>> stream_seed(0, "rollout", 1) == stream_seed(0, "rollout", "1")
    False
    """
    # NumPy's integers and strings print otherwise than Python's: make them Python's first
    plain = (str(name) if isinstance(name, str) else operator.index(name) for name in names)
    digest = hashlib.sha256(repr((operator.index(seed), *plain)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def numpy_generator(seed: int, *names: str | int) -> numpy.random.Generator:
    """NumPy generator of a named stream."""
    import numpy

    return numpy.random.default_rng(stream_seed(seed, *names))


def shuffled_places(size: int, places: range, seed: int, *names: str | int) -> list[int]:
    """Which of `size` items stands at each place of an endless stream that is shuffled anew each pass: a function of (seed, names, place).

    >>> sorted(shuffled_places(3, range(3), 0, "prompts")), len(shuffled_places(3, range(2, 7), 0, "prompts"))
    ([0, 1, 2], 5)
    """
    passes = range(places.start // size, -(-places.stop // size))
    items = [
        item for number in passes for item in numpy_generator(seed, *names, number).permutation(size).tolist()
    ]
    offset = passes.start * size
    return items[places.start - offset : places.stop - offset]


def torch_generator(seed: int, *names: str | int) -> torch.Generator:
    """CPU torch generator of a named stream."""
    import torch

    return torch.Generator().manual_seed(stream_seed(seed, *names))
