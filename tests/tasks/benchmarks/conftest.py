"""The hub as it is seen from a test: small data sets in its layout, read by the hub's own client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet
from tests.tasks.benchmarks.records import HUB


def write_repository(folder: Path, repo: str) -> None:
    """A data set as the hub holds it: a parquet file a split, and a card that names subsets and splits."""
    configs: dict[str | None, list[dict[str, str]]] = {}
    for (subset, split), rows in HUB[repo].items():
        path = folder / (subset or "data") / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.Table.from_pylist(rows), path)
        files = {"split": split, "path": str(path.relative_to(folder))}
        configs.setdefault(subset, []).append(files)
    named = [{"config_name": subset or "default", "data_files": files} for subset, files in configs.items()]
    # JSON is YAML
    (folder / "README.md").write_text(f"---\n{json.dumps({'configs': named})}\n---\n# A data set\n")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the hub's data sets lie while `datasets.load_dataset` finds them by name."""
    root = tmp_path / "hub"
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    load = datasets.load_dataset

    def load_from_root(repo: str, /, **settings: Any) -> Any:
        if repo not in HUB:
            raise ConnectionError(f"Couldn't reach {repo!r} on the Hub\nand more")
        if not (root / repo).is_dir():
            write_repository(root / repo, repo)
        return load(str(root / repo), **settings)

    monkeypatch.setattr(datasets, "load_dataset", load_from_root)
    return root


@pytest.fixture
def example_files(tmp_path: Path) -> Path:
    """A data directory with the files of worked examples that are not on the hub."""
    from rlprior.tasks.benchmarks.logic import BBH_TASKS

    directory = tmp_path / "data"
    shots = "\n\n".join(
        f"Q: Is {n} even?\nA: Let's think step by step. So the answer is no." for n in (1, 3, 5)
    )
    (directory / "bbh" / "cot-prompts").mkdir(parents=True)
    for task in BBH_TASKS:
        path = directory / "bbh" / "cot-prompts" / f"{task}.txt"
        path.write_text(f"Do not train on this.\n-----\nAbout {task}.\n\n{shots}\n")
    (directory / "mmlu").mkdir()
    flan = "\n\n".join(
        f"Q: Is {n} odd?\n(A) no (B) yes\nA: Let's think step by step. It is (B)." for n in range(4)
    )
    (directory / "mmlu" / "flan_cot_prompts.json").write_text(
        json.dumps({"number_theory": f"About number theory.\n\n{flan}\n\n"})
    )
    return directory
