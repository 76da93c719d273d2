"""Configuration from and to TOML: what is accepted, and the one line that each mistake gets."""

from __future__ import annotations

import dataclasses
import math
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from rlprior.config import (
    UsageError,
    apply_overrides,
    decode,
    differing_keys,
    encode,
    fingerprint,
    load_config,
)
from rlprior.data.config import DataConfig
from rlprior.evaluation.config import EvaluationConfig
from rlprior.models.presets import ModelConfig
from rlprior.rl.config import RLConfig
from rlprior.study.config import StudyConfig
from rlprior.training.language_model import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Walk:
    name: ClassVar[str] = "walk"
    pace: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Swim:
    name: ClassVar[str] = "swim"
    depth: int = 3

    def __post_init__(self) -> None:
        if self.depth < 0:
            raise ValueError(f"depth must be 0 or more, not {self.depth}")


@dataclass(frozen=True, kw_only=True)
class Stop:
    place: str
    minutes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Trip:
    title: str
    days: int = 1
    budget: float = 0.5
    is_abroad: bool = False
    season: Literal["summer", "winter"] = "summer"
    travel: Walk | Swim = field(default_factory=Walk)
    stops: tuple[Stop, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    ways: dict[str, Walk | Swim] = field(default_factory=dict)
    limit: int | str | None = None


def read(text: str, directory: Path, *overrides: str) -> Trip:
    path = directory / "trip.toml"
    path.write_text(text, encoding="utf-8")
    return load_config(Trip, path, overrides)


def test_every_kind_of_field_is_read(tmp_path: Path) -> None:
    trip = read(
        """
        title = "North ☃"
        days = 3
        budget = 2
        is_abroad = true
        season = "winter"
        travel = {name = "swim", depth = 7}
        weights = {a = 1, b = 0.25}
        limit = "none"
        [ways.there]
        name = "walk"
        [[stops]]
        place = "hut"
        minutes = 5
        [[stops]]
        place = "lake"
        """,
        tmp_path,
    )
    assert trip == Trip(
        title="North ☃",
        days=3,
        budget=2.0,
        is_abroad=True,
        season="winter",
        travel=Swim(depth=7),
        stops=(Stop(place="hut", minutes=5), Stop(place="lake")),
        weights={"a": 1.0, "b": 0.25},
        ways={"there": Walk()},
        limit="none",
    )
    # a whole number where a number is expected becomes one, so that the same config has one fingerprint
    assert type(trip.budget) is float
    assert type(trip.weights["a"]) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dayz = 1", "unknown key 'dayz'; did you mean 'days'?"),
        (
            "qqq = 1",
            "unknown key 'qqq'; known: budget, days, is_abroad, limit, season, stops, title, travel, ways, weights",
        ),
        ("[travel]\nname = 'swim'\ndepht = 1", "unknown key 'travel.depht'; did you mean 'depth'?"),
        (
            "[[stops]]\nplace = 'x'\n[[stops]]\nplaces = 'y'",
            "unknown key 'stops.1.places'; did you mean 'place'?",
        ),
        ("[ways.there]\nname = 'walk'\npase = 1", "unknown key 'ways.there.pase'; did you mean 'pace'?"),
        ("days = true", "days must be a whole number, not True"),
        ("days = 1.0", "days must be a whole number, not 1.0"),
        ("days = '1'", "days must be a whole number, not '1'"),
        ("is_abroad = 1", "is_abroad must be true or false, not 1"),
        ("budget = true", "budget must be a number, not True"),
        ("budget = '1'", "budget must be a number, not '1'"),
        ("season = 'spring'", "season must be one of 'summer', 'winter', not 'spring'"),
        ("stops = 'hut'", "stops must be a list, not 'hut'"),
        ("stops = ['hut']", "stops.0 must be a table, not 'hut'"),
        ("weights = [1]", "weights must be a table, not [1]"),
        ("weights = {a = 'x'}", "weights.a must be a number, not 'x'"),
        ("[[stops]]\nplace = 1", "stops.0.place must be a string, not 1"),
        ("[[stops]]\nminutes = 1", "stops.0.place is missing; add it"),
        ("[[stops]]\nplace = 'x'\nminutes = 'y'", "stops.0.minutes must be a whole number, not 'y'"),
        ("travel = {depth = 1}", "travel needs a name, one of swim, walk"),
        ("travel = 'swim'", "travel needs a name, one of swim, walk"),
        ("travel = {name = 'swin'}", "travel.name = 'swin' is unknown; did you mean 'swim'?"),
        ("travel = {name = 'fly'}", "travel.name = 'fly' is unknown; known: swim, walk"),
        ("travel = {name = ['swim']}", "travel.name = ['swim'] is unknown; did you mean 'swim'?"),
        ("travel = {name = 'swim', depth = -1}", "travel: depth must be 0 or more, not -1"),
        ("ways = {a = {name = 'swim', depth = -1}}", "ways.a: depth must be 0 or more, not -1"),
        ("limit = 1.5", "limit must be int or str, not 1.5"),
        ("title = 2024-01-01", "title must be a string, not datetime.date(2024, 1, 1)"),
    ],
)
def test_a_mistake_is_named_with_its_place(text: str, message: str, tmp_path: Path) -> None:
    title = "" if text.startswith("title") else "title = 'x'\n"
    with pytest.raises(UsageError) as error:
        read(title + text, tmp_path)
    assert str(error.value) == f"{tmp_path / 'trip.toml'}: {message}"


def test_a_number_too_large_for_a_float_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"trip\.toml: budget must be a number, not 1000"):
        read("title = 'x'\nbudget = 1" + 400 * "0", tmp_path)


def test_a_missing_key_is_named_at_the_top(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"trip\.toml: title is missing; add it"):
        read("days = 1", tmp_path)


def test_a_wrong_whole_is_called_the_file() -> None:
    with pytest.raises(UsageError, match=r"^f: the file must be a table, not 3$"):
        decode(Trip, 3, source="f")
    kind: Any = Walk | Swim
    with pytest.raises(UsageError, match=r"^f: the file needs a name, one of swim, walk$"):
        decode(kind, {}, source="f")
    with pytest.raises(UsageError, match=r"^f: name = 'fly' is unknown; known: swim, walk$"):
        decode(kind, {"name": "fly"}, source="f")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "trip.toml"
    with pytest.raises(UsageError, match=r"trip\.toml: no such file; give the path of a TOML file"):
        load_config(Trip, path)
    with pytest.raises(UsageError, match="is a directory; give the path of a TOML file"):
        load_config(Trip, tmp_path)
    path.write_bytes(b'title = "\xff"')
    with pytest.raises(UsageError, match=r"trip\.toml: not UTF-8 text \(byte 9\); save it as UTF-8"):
        load_config(Trip, path)
    path.write_text("title = 'x'\ndays = = 2")
    with pytest.raises(UsageError, match=r"trip\.toml: not valid TOML: .*line 2, column 8"):
        load_config(Trip, path)
    with pytest.raises(UsageError, match=r"trip\.toml/inner\.toml: cannot be read \(Not a directory\)"):
        load_config(Trip, path / "inner.toml")


def test_overrides_reach_every_place(tmp_path: Path) -> None:
    trip = read(
        "title = 'x'\n[[stops]]\nplace = 'hut'\n[[stops]]\nplace = 'lake'",
        tmp_path,
        "days=4",
        "title=North",  # not TOML, so it is taken as it stands
        "stops.1.place='sea'",
        "travel.name=swim",
        "travel.depth=9",
        "weights.new=2",
        "limit=a=b",
        "is_abroad=true",
    )
    assert trip == Trip(
        title="North",
        days=4,
        stops=(Stop(place="hut"), Stop(place="sea")),
        travel=Swim(depth=9),
        weights={"new": 2.0},
        limit="a=b",
        is_abroad=True,
    )


def test_overrides_replace_whole_entries_and_leave_the_source_alone() -> None:
    tables = {"stops": [{"place": "hut"}], "rl": {"steps": 1}}
    changed = apply_overrides(tables, ["stops.0={place='sea'}", "rl.steps=2", "rl={steps=3}", "title="])
    assert changed == {"stops": [{"place": "sea"}], "rl": {"steps": 3}, "title": ""}
    assert tables == {"stops": [{"place": "hut"}], "rl": {"steps": 1}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("days", "--days: write --section.key=value"),
        ("=1", "--=1: write --section.key=value"),
        ("stops.2.place=x", "--stops.2.place=x: '2' must be a position from 0 to 1"),
        ("stops.-1.place=x", "--stops.-1.place=x: '-1' must be a position from 0 to 1"),
        ("stops.²=x", "--stops.²=x: '²' must be a position from 0 to 1"),
        ("empty.0=x", "--empty.0=x: '0' must be left out: the list is empty"),
        ("days.x=1", "--days.x=1: days is a value, not a section"),
        ("stops.0.place.x=1", "--stops.0.place.x=1: stops.0.place is a value, not a section"),
    ],
)
def test_bad_overrides_are_named(override: str, message: str) -> None:
    tables = {"days": 1, "stops": [{"place": "hut"}, {"place": "lake"}], "empty": []}
    with pytest.raises(UsageError) as error:
        apply_overrides(tables, [override])
    assert str(error.value) == message


def test_a_misspelt_override_gets_the_same_error_as_a_misspelt_key(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown key 'dayz'; did you mean 'days'"):
        read("title = 'x'", tmp_path, "dayz=1")


FLOATS = st.floats(allow_nan=False)
WAYS = st.one_of(st.builds(Walk, pace=FLOATS), st.builds(Swim, depth=st.integers(0, 10**18)))
# lone surrogates have no UTF-8 form
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
TRIPS = st.builds(
    Trip,
    title=TEXTS,
    days=st.integers(-(2**63), 2**63 - 1),
    budget=FLOATS,
    is_abroad=st.booleans(),
    season=st.sampled_from(["summer", "winter"]),
    travel=WAYS,
    stops=st.lists(st.builds(Stop, place=TEXTS, minutes=st.none() | st.integers(0, 9))).map(tuple),
    weights=st.dictionaries(TEXTS, FLOATS),
    ways=st.dictionaries(TEXTS, WAYS),
    limit=st.none() | st.integers(0, 9) | TEXTS,
)


@given(TRIPS)
def test_what_is_written_is_read_back(trip: Trip) -> None:
    written = tomli_w.dumps(encode(trip))
    again = decode(Trip, tomllib.loads(written), source="trip.toml")
    assert again == trip
    assert fingerprint(again) == fingerprint(trip)


def _config_classes(kind: Any) -> set[type]:
    """Every config dataclass that a type can hold."""
    found: set[type] = set()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        found.add(kind)
        for hint in typing.get_type_hints(kind).values():
            found |= _config_classes(hint)
    for argument in typing.get_args(kind):
        found |= _config_classes(argument)
    return found


def test_no_optional_setting_of_ours_has_another_default_than_none() -> None:
    """TOML has no null: a `None` that is left out must come back as `None`."""
    roots = (StudyConfig, TrainingConfig, RLConfig, DataConfig, EvaluationConfig, ModelConfig)
    classes = set().union(*(_config_classes(root) for root in roots))
    assert len(classes) > 10
    for config_class in classes:
        hints = typing.get_type_hints(config_class)
        for one in dataclasses.fields(config_class):
            if type(None) in typing.get_args(hints[one.name]):
                assert one.default is None, f"{config_class.__name__}.{one.name}"


def test_our_own_configs_survive_the_round_trip() -> None:
    for config in (
        TrainingConfig(mixture={"text": 1.0}, num_steps=2, batch_tokens=64, sequence_length=32),
        ModelConfig(preset="1b", tied_embeddings=False),
    ):
        data = tomllib.loads(tomli_w.dumps(encode(config)))
        assert decode(type(config), data, source="x") == config


GOLDEN = Trip(
    title="North",
    travel=Swim(depth=7),
    stops=(Stop(place="hut"),),
    weights={"b": 0.1, "a": 1.0},
    ways={"there": Walk(pace=1e-5)},
)


def test_the_fingerprint_never_changes() -> None:
    # run folders are named by it: another value here would orphan everybody's runs
    assert fingerprint(GOLDEN) == "e30ae8aa8ad7"
    assert fingerprint({"a": [1, 2.5, "x", True, None, math.inf]}) == "9e799e24c876"


@pytest.mark.parametrize(
    "changes",
    [
        {"title": "South"},
        {"travel": Walk()},
        {"travel": Swim(depth=8)},
        {"stops": (Stop(place="hut", minutes=0),)},
        {"stops": ()},
        {"weights": {"b": 0.1 + 2**-54, "a": 1.0}},
        {"is_abroad": True},
        {"limit": ""},
    ],
)
def test_the_fingerprint_sees_every_change(changes: dict[str, Any]) -> None:
    assert fingerprint(dataclasses.replace(GOLDEN, **changes)) != fingerprint(GOLDEN)


def test_the_fingerprint_ignores_the_order_of_keys() -> None:
    same = dataclasses.replace(GOLDEN, weights={"a": 1.0, "b": 0.1})
    assert fingerprint(same) == fingerprint(GOLDEN)


def test_differing_keys_are_those_that_change_the_fingerprint() -> None:
    left = {"a": 1, "b": {"c": [1, 2], "d": None}, "same": {"x": 1}}
    right = {"a": 1.0, "b": {"c": [1, 3]}, "same": {"x": 1}, "new": 0}
    assert differing_keys(left, right) == ["a", "b.c", "new"]
    assert differing_keys(left, left) == []
