"""A run to be exported, and verl's options to hold it against."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlprior.rl.config import LengthPhase, RLConfig
from rlprior.rl.loop import RLRunConfig
from rlprior.tasks.config import TaskConfig

TASK = TaskConfig(difficulties=(1,))


def run_config(init_from: Path | str = "policy", **settings: Any) -> RLRunConfig:
    usual: dict[str, Any] = {
        "task": TASK,
        "num_problems": 30,
        "prompts_per_step": 4,
        "num_steps": 10,
        "length_schedule": (
            LengthPhase(until_step=6, max_new_tokens=8),
            LengthPhase(max_new_tokens=16),
        ),
    }
    return RLRunConfig(rl=RLConfig(**(usual | settings)), init_from=str(init_from))


def load_schema() -> dict[str, str]:
    """Options of verl 0.9.0 by dotted name, with the types that they take ('any': a default of null whose type verl states nowhere).

    `verl_schema.json` was made from the tag v0.9.0: `ppo_trainer` composed by Hydra from `verl/trainer/config`, with `rollout.name`
    given; of every section that we write, the names of its own options; the type is the annotation of the dataclass that the section's
    `_target_` names, or that of the default where it names none. For another version: do the same with its tag.
    """
    schema = json.loads((Path(__file__).parent / "verl_schema.json").read_text(encoding="utf-8"))
    return {
        f"{section}.{name}": kind
        for section, options in schema["options"].items()
        for name, kind in options.items()
    }


KINDS: dict[str, Any] = {
    "bool": lambda value: isinstance(value, bool),
    "int": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "float": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "list": lambda value: isinstance(value, list),
    "dict": lambda value: isinstance(value, dict),
    "null": lambda value: value is None,
    "any": lambda value: True,
}


def strangers(options: Mapping[str, Any], schema: Mapping[str, str]) -> list[str]:
    """Options that verl does not have, or not with such a value."""
    return [
        name
        for name, value in options.items()
        if not any(KINDS[kind](value) for kind in schema.get(name, "").split(" | ") if kind)
    ]


def written_options(text: str, schema: Mapping[str, str]) -> dict[str, Any]:
    """Options in a configuration file, by dotted name down to what the schema knows as one option."""

    def flat(table: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in table.items():
            dotted = prefix + name
            found |= (
                flat(value, f"{dotted}.")
                if isinstance(value, dict) and dotted not in schema
                else {dotted: value}
            )
        return found

    tables = yaml.safe_load(text)
    assert tables.pop("hydra") == {"searchpath": ["pkg://verl.trainer.config"]}
    assert tables.pop("defaults") == ["ppo_trainer", "_self_"]
    assert tables.pop("export_dir") == "???"
    return flat(tables, "")
