"""English and code that every Python installation carries: the language reference, docstrings and sources of its library.

What there is depends on the Python version. Documents come in the order of a hash of their origin, so that any prefix is a fair
sample; the documents of one module share its name as their split key, so that a held-out docstring is in no training source.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from rlprior.config import RunError

MIN_DOCSTRING_CHARACTERS = 200

# Tests, tables and vendored packages are not what the library reads like.
_SKIPPED_FOLDERS = frozenset(
    {
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "ensurepip",
        "encodings",
        "pydoc_data",
        "site-packages",
    }
    | {"dist-packages", "lib-dynload", "__pycache__"}
)


def read_english() -> Iterator[tuple[str, str]]:
    """Texts and split keys: each topic of the language reference, each docstring of at least 200 characters once.

    Raises:
        RunError: this installation lacks the topics or the sources.
    """
    topics = _read_topics()
    modules = _module_files()
    seen: set[str] = set()
    for key in _shuffled([*topics, *modules]):
        texts = [topics[key]] if key in topics else _docstrings(_read_module(modules[key]))
        for text in texts:
            if text not in seen:
                seen.add(text)
                yield text, key


def read_code() -> Iterator[tuple[str, str]]:
    """Texts and split keys: the source of each module of the standard library.

    Raises:
        RunError: this installation lacks the sources.
    """
    modules = _module_files()
    for key in _shuffled(modules):
        text = _read_module(modules[key])
        if text.strip():
            yield text, key


def _shuffled(keys: list[str] | dict[str, Path]) -> list[str]:
    # salted: the held-out split hashes the bare key, and an order by the same hash would put all of that side first
    return sorted(keys, key=lambda key: hashlib.sha256(f"order {key}".encode()).digest())


def _read_topics() -> dict[str, str]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise RunError(
            "this Python has no pydoc_data.topics; use a complete installation of Python"
        ) from None
    return {f"topic {name}": text for name, text in topics.items()}


def _module_files() -> dict[str, Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = {file.relative_to(root).as_posix(): file for file in root.rglob("*.py")}
    modules = {name: file for name, file in files.items() if not _SKIPPED_FOLDERS & set(name.split("/"))}
    if not modules:
        raise RunError(f"{root}: no sources of the standard library; use a complete installation of Python")
    return modules


def _read_module(path: Path) -> str:
    """Source text; empty where the file is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def _docstrings(source: str) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in the library's own strings
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
            if len(text) >= MIN_DOCSTRING_CHARACTERS:
                yield text
