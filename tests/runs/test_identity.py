"""What names a run: its stage, config, inputs and code, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rlprior.config import HOW, UsageError
from rlprior.runs.identity import code_fingerprint, identify, input_identity


@dataclass(frozen=True, kw_only=True)
class Settings:
    corpus: str = "/somewhere/corpus"
    num_steps: int = 4
    rate: float = 0.5
    num_threads: int = field(default=1, metadata=HOW)


CODE = ("rlprior.seeding",)


def test_the_id_is_that_of_stage_config_inputs_and_code_but_not_of_paths() -> None:
    def id_of(
        stage: str = "train", *, code: tuple[str, ...] = CODE, corpus: str = "c", **changes: Any
    ) -> str:
        return identify(stage, Settings(**changes), code=code, inputs={"corpus": corpus}).id

    assert id_of() == id_of(corpus="c")
    assert id_of(num_steps=4) == id_of()
    assert id_of(num_threads=8) == id_of(), "how fast is not what"
    moved = identify("train", Settings(corpus="/elsewhere"), code=CODE, inputs={"corpus": "c"})
    assert moved.id == id_of()
    others = {
        id_of("rl"),
        id_of(corpus="d"),
        id_of(num_steps=5),
        id_of(rate=0.25),
        id_of(code=("rlprior.config",)),
        identify("train", Settings(), code=CODE).id,
    }
    assert len(others) == 6
    assert id_of() not in others


def test_the_code_of_a_package_is_all_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_stage"
    (package / "inner").mkdir(parents=True)
    for name in ("__init__.py", "one.py", "inner/__init__.py"):
        (package / name).write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen = {code_fingerprint(["some_stage"])}
    assert code_fingerprint(["some_stage"]) in seen
    (package / "notes.txt").write_text("not code")
    assert code_fingerprint(["some_stage"]) in seen
    (package / "inner" / "__init__.py").write_text("x = 2\n")
    seen.add(code_fingerprint(["some_stage"]))
    (package / "one.py").rename(package / "two.py")
    seen.add(code_fingerprint(["some_stage"]))
    seen.add(code_fingerprint(["some_stage.two"]))
    assert len(seen) == 4
    assert code_fingerprint(["rlprior.seeding", "rlprior.objectives"]) == code_fingerprint(
        ["rlprior.objectives", "rlprior.seeding"]
    )
    with pytest.raises(ValueError, match="nowhere_at_all is not an importable module"):
        code_fingerprint(["nowhere_at_all"])


def test_the_identity_of_a_file_is_its_name_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, copy = tmp_path / "a" / "text.jsonl", tmp_path / "b" / "text.jsonl"
    one.write_text("hello")
    copy.write_text("hello")
    assert input_identity(one) == input_identity(copy)
    copy.write_text("hellp")
    assert input_identity(one) != input_identity(copy)
    with pytest.raises(UsageError, match=r"nothing\.txt: no such file or directory"):
        input_identity(tmp_path / "nothing.txt")


def test_the_identity_of_a_folder_is_the_names_and_bytes_inside(tmp_path: Path) -> None:
    def make(name: str, files: dict[str, str]) -> Path:
        for file, text in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / name

    files = {"config.json": "{}", "inner/weights": "w"}
    same = input_identity(make("model", files))
    assert input_identity(make("moved", files)) == same
    assert input_identity(make("grown", {**files, "more": ""})) != same
    assert input_identity(make("changed", {**files, "inner/weights": "v"})) != same
    assert input_identity(make("renamed", {"config.json": "{}", "outer/weights": "w"})) != same
