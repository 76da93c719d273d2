"""What determines a run, and the id that follows from it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlprior.config import UsageError, encode, fingerprint
from rlprior.runs.files import file_hash


def code_fingerprint(packages: Sequence[str]) -> str:
    """Hash of the Python sources of packages or modules: the part of the code that computes a stage."""
    digest = hashlib.sha256()
    for package in sorted(packages):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ValueError(f"{package} is not an importable module")
        origin = Path(spec.origin)
        files = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
        for file in files:
            digest.update(f"{package}/{file.relative_to(origin.parent).as_posix()}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def input_identity(path: Path) -> str:
    """What an input is, whatever its path: the id of the run it belongs to, or else the hash of its bytes, with the
    name of a file and the names inside a folder.

    Raises:
        UsageError: there is nothing at `path`.
    """
    path = path.resolve()
    if not path.exists():
        raise UsageError(f"{path}: no such file or directory")
    for parent in (path, *path.parents):
        if (parent / "manifest.json").exists() and (parent / "result.json").exists():
            run_id = json.loads((parent / "manifest.json").read_text())["id"]
            return f"{run_id}/{path.relative_to(parent).as_posix()}"
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    hashes = [
        f"{file.relative_to(path).as_posix() if path.is_dir() else path.name}:{file_hash(file)}"
        for file in files
    ]
    return fingerprint(hashes)


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What determines a run: its stage, its config, the identity of each input, and the code of the stage.

    `inputs` names config fields that hold paths; their identity stands in for the path, so that a moved folder is the same run.
    """

    stage: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    code: str

    @property
    def id(self) -> str:
        """12 hexadecimal digits."""
        return fingerprint(self.as_data())

    def as_data(self) -> dict[str, Any]:
        """Plain data, paths left out."""
        config = {key: value for key, value in self.config.items() if key not in self.inputs}
        return {"stage": self.stage, "config": config, "inputs": dict(self.inputs), "code": self.code}


def identify(
    stage: str, config: Any, *, code: Sequence[str], inputs: Mapping[str, str] | None = None
) -> RunIdentity:
    """The identity of a run, from its config dataclass, the packages that compute it, and its inputs' identities.

    Settings marked `HOW` take no part: a run goes on on other hardware.
    """
    return RunIdentity(
        stage=stage,
        config=encode(config, with_how=False),
        inputs=inputs or {},
        code=code_fingerprint(code),
    )
