"""A user's reward function in a whole run: what it pays is what is learned, and its mistakes end the run in one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tests.small_study import make_run, outcome, study_config

from rlprior.config import RunError
from rlprior.data.packing import Corpus
from rlprior.data.prepare import prepare
from rlprior.models.causal_lm import build_model, load_tokenizer, save_model
from rlprior.rl.config import LengthPhase
from rlprior.rl.loop import RLRunConfig
from rlprior.runs.files import read_jsonl

CONFIG = study_config()
REWARD = """
def share_of_digits(prompt, response, answer):
    assert prompt.startswith("Q: ") and answer
    return sum(character.isdigit() for character in response) / max(1, len(response))

def never(prompt, response, answer):
    raise KeyError("no such column")
"""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("policy")
    prepare(CONFIG.data, root / "corpus")
    tokenizer_directory = Corpus.open(root / "corpus").tokenizer_directory
    model = build_model(CONFIG.model, load_tokenizer(tokenizer_directory), max_positions=64, seed=0)
    save_model(model, root / "policy", tokenizer_directory=tokenizer_directory)
    (root / "reward.py").write_text(REWARD)
    return root / "policy"


def run_config(policy: Path, function: str, num_steps: int) -> RLRunConfig:
    task = dataclasses.replace(
        CONFIG.rl.task, verifier=f"reward.py:{function}", verifier_timeout_seconds=20.0
    )
    rl = dataclasses.replace(
        CONFIG.rl,
        task=task,
        num_steps=num_steps,
        prompts_per_step=4,
        samples_per_prompt=8,
        length_schedule=(LengthPhase(max_new_tokens=6),),
        learning_rate=1e-2,
        save_every=num_steps,
    )
    return RLRunConfig(rl=rl, init_from=str(policy), data_dir=str(policy.parent))


def test_a_reward_function_is_learned_and_runs_repeat_to_the_byte(policy: Path, tmp_path: Path) -> None:
    config = run_config(policy, "share_of_digits", num_steps=12)
    one, two = (make_run("rl", config, tmp_path / name).directory for name in ("one", "two"))
    assert outcome(one) == outcome(two)
    metrics = read_jsonl(one / "metrics.jsonl")
    rewards = [record["reward_mean"] for record in metrics]
    # 10 digits among 300 tokens by chance; a share is neither 0 nor 1
    assert 0 < rewards[0] < 0.3
    assert rewards[-1] > 2 * rewards[0]
    assert all(record["correct_share"] < record["reward_mean"] for record in metrics[:3])
    assert {record["timed_out_share"] + record["failed_share"] for record in metrics} == {0.0}


def test_a_function_that_raises_ends_the_run_with_its_line(policy: Path, tmp_path: Path) -> None:
    config = run_config(policy, "never", num_steps=2)
    with pytest.raises(RunError, match=r"reward\.py:7: KeyError: 'no such column'; called as never\("):
        make_run("rl", config, tmp_path / "run")
