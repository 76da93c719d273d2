"""The text that every Python installation carries."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from rlprior.config import RunError
from rlprior.data import embedded
from rlprior.data.config import DataConfig, SourceConfig
from rlprior.data.documents import read_documents
from rlprior.data.embedded import MIN_DOCSTRING_CHARACTERS, read_code, read_english


def test_english_is_long_docstrings_and_reference_topics_each_once() -> None:
    documents = list(read_english())
    texts = [text for text, _ in documents]
    assert len(set(texts)) == len(texts) > 1000
    assert all(
        len(text) >= MIN_DOCSTRING_CHARACTERS for text, key in documents if not key.startswith("topic ")
    )
    assert sum(key.startswith("topic ") for _, key in documents) >= 70
    assert any("JSON (JavaScript Object Notation)" in text for text in texts)


def test_code_is_the_library_without_its_tests() -> None:
    sources = {key: text for text, key in itertools.islice(read_code(), 400)}
    assert len(sources) > 300
    assert all(key.endswith(".py") for key in sources)
    assert not any(
        part in key.split("/") for key in sources for part in ("test", "tests", "idlelib", "site-packages")
    )
    assert sum(map(len, sources.values())) > 2_000_000


def test_a_prefix_is_not_the_beginning_of_the_alphabet() -> None:
    keys = [key for _, key in itertools.islice(read_code(), 40)]
    assert keys != sorted(keys)
    assert min(keys)[0] < "h"
    assert max(keys)[0] > "r"


def test_a_held_out_docstring_is_in_no_training_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(100):
        docstring = (
            f"Module {number} is about the number {number}.\n\n" + f"It is {number} and only that. " * 10
        )
        (tmp_path / f"module{number}.py").write_text(f'"""{docstring}"""\nNUMBER = {number}\n')
    monkeypatch.setattr(embedded.sysconfig, "get_path", lambda name: str(tmp_path))
    english, code = (
        [
            (document.text, held_out)
            for document, held_out in read_documents(
                source, DataConfig(sources=(source,), held_out_fraction=0.3)
            )
        ]
        for source in (
            SourceConfig(name="english", kind="embedded_english"),
            SourceConfig(name="code", kind="embedded_code"),
        )
    )
    training_code = "".join(text for text, held_out in code if not held_out)
    held_out_docstrings = [text for text, held_out in english if held_out and text.startswith("Module ")]
    # 100 draws of 0.3 have a standard deviation of 4.6: five of them.
    assert abs(len(held_out_docstrings) - 30) < 23
    assert not any(docstring in training_code for docstring in held_out_docstrings)


def test_an_installation_without_sources_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(RunError, match="no sources of the standard library"):
        next(read_code())

    def fail(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(embedded.importlib, "import_module", fail)
    with pytest.raises(RunError, match=r"no pydoc_data\.topics"):
        next(read_english())


def test_modules_that_cannot_be_parsed_or_decoded_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docstring = "A module that says what it does. " * 10
    (tmp_path / "good.py").write_text(f'"""{docstring}"""\nPATTERN = "\\d"\n')
    (tmp_path / "broken.py").write_text("def (\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "empty.py").write_text("\n")
    monkeypatch.setattr(embedded.sysconfig, "get_path", lambda name: str(tmp_path))
    assert sorted(key for _, key in read_code()) == ["broken.py", "good.py"]
    assert [text for text, key in read_english() if key == "good.py"] == [docstring]


def test_a_prefix_of_the_embedded_text_is_held_out_in_the_configured_share() -> None:
    source = SourceConfig(name="code", kind="embedded_code", max_bytes=4_000_000)
    config = DataConfig(sources=(source,), held_out_fraction=0.1)
    sides = {document.split_key: held_out for document, held_out in read_documents(source, config)}
    # 4 MB are some 200 modules or more: a binomial share of 0.1 stays below 0.2 by more than four standard deviations
    assert len(sides) > 150
    assert 0.02 < sum(sides.values()) / len(sides) < 0.2
