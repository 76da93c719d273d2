"""Settings of a study: what is refused, and that what the demo says is what the paper compares."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.small_study import study_config, study_tables

import rlprior.study
from rlprior.config import UsageError, decode, encode, load_config
from rlprior.objectives import CrossEntropy, RewardShaping
from rlprior.study.config import StudyConfig

DEMO = Path(rlprior.study.__file__).parent / "demo.toml"


def test_the_demo_compares_the_papers_five_settings() -> None:
    config = load_config(StudyConfig, DEMO)
    assert config.baseline == "ce"
    assert {name: arm.objective for name, arm in config.arms.items()} == {
        "ce": CrossEntropy(),
        "beta_low": RewardShaping(beta=-0.25),
        "beta_high": RewardShaping(beta=0.5),
        "tail": RewardShaping(tail_reward=-0.1, top_k=100),
        "head": RewardShaping(head_reward=0.1, top_k=100),
    }


def test_the_demo_measures_as_much_as_it_promises() -> None:
    final = load_config(StudyConfig, DEMO).evaluation.final
    assert final.held_out_tokens >= 50_000
    assert final.num_problems >= 200


def test_settings_survive_a_round_trip() -> None:
    config = study_config()
    assert decode(StudyConfig, encode(config), source="copy") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("baseline=cee", r"baseline = 'cee' is not an arm; arms: ce, sharp"),
        ("seeds=[]", r"seeds needs at least one seed"),
        ("seeds=[1,1]", r"no seed twice"),
        ("pretrain.objective={name='focal'}", r"pretrain\.objective is set by the arms; remove it"),
        ("midtrain.objective={name='focal'}", r"midtrain\.objective is set by the arms; remove it"),
        ("arms.a/b={label='x', objective={name='focal'}}", r"arm name 'a/b': use letters, digits"),
        (
            "pretrain.batch_tokens=100",
            r"pretrain: batch_tokens = 100 must be a multiple of sequence_length = 64",
        ),
        ("pretrain.mixture={}", r"pretrain: mixture needs at least one source"),
        ("rl.samples_per_prompt=1", r"rl: samples_per_prompt must be at least 2"),
        (
            "rl.length_schedule=[{max_new_tokens=4, until_step=3}]",
            r"rl: length_schedule needs .* a last phase without",
        ),
        (
            "evaluation.final.samples_per_problem=0",
            r"evaluation\.final: samples_per_problem must be at least 1",
        ),
        ("evaluation.decoding.top_p=0.0", r"evaluation\.decoding: top_p must be above 0"),
        ("data.tokenizer.vocab_size=100", r"data\.tokenizer: vocab_size = 100 must be at least 259"),
        ("model.preset=huge", r"model: preset = 'huge' is unknown; known: tiny"),
        (
            "model.num_key_value_heads=3",
            r"model: num_heads = 2 must be a multiple of num_key_value_heads = 3",
        ),
        (
            "arms.sharp.objective.beta=-1.0",
            r"arms\.sharp\.objective: beta must be greater than -1, got -1\.0",
        ),
        (
            "arms.sharp.objective.top_k=0",
            r"arms\.sharp\.objective: top_k must be an integer of at least 1, got 0",
        ),
        (
            "arms.sharp.objective.bata=0.5",
            r"unknown key 'arms\.sharp\.objective\.bata'; did you mean 'beta'\?",
        ),
        (
            "arms.sharp.objective.name=focall",
            r"arms\.sharp\.objective\.name = 'focall' is unknown; did you mean 'focal'\?",
        ),
        ("rl.num_stepz=3", r"unknown key 'rl\.num_stepz'; did you mean 'num_steps'\?"),
        ("rl.num_steps=3.5", r"rl\.num_steps must be a whole number, not 3\.5"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_place(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        study_config(override)
    assert "\n" not in str(raised.value)


def test_a_missing_section_is_named() -> None:
    tables = study_tables()
    del tables["rl"]
    with pytest.raises(UsageError, match="file: rl is missing; add it"):
        decode(StudyConfig, tables, source="file")
