"""The folder that is handed to verl: prompts token for token, the same logits, all of it or nothing."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pyarrow import parquet
from tests.models.conftest import SMALL, SMALL_MIXTURE
from tests.rl.verl.verl_cases import TASK, load_schema, run_config
from tests.small_study import rl_tables, write_toml
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlprior.cli import main
from rlprior.config import UsageError
from rlprior.data.tokenizer import encode_prompt, save_tokenizer, train_tokenizer
from rlprior.models.causal_lm import build_model, load_model, save_model
from rlprior.rl import loop
from rlprior.rl.verl import export as export_module
from rlprior.rl.verl.export import (
    HeldOut,
    export_to_verl,
    rendered_prompt,
    template_prompts,
)
from rlprior.rl.verl.reward import compute_score
from rlprior.tasks.config import TaskConfig, load_task
from rlprior.tasks.problem import Problem
from rlprior.tasks.synthetic import SPACES, generate_problems, split_of

HELD_OUT = HeldOut(num_problems=20)


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    texts = [
        problem.text for problem in load_task(TASK, split="train", num_problems=50, seed=1, data_dir=None)
    ]
    save_tokenizer(train_tokenizer(texts, 300), directory)
    return directory


@pytest.fixture(scope="module")
def policy(tokenizer_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy as a Hugging Face folder."""
    config = dataclasses.replace(SMALL, initializer_range=0.3)
    return saved_policy(config, tokenizer_directory, tmp_path_factory.mktemp("policy"))


def saved_policy(config: Any, tokenizer_directory: Path, directory: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
    model = build_model(config, tokenizer, max_positions=16, seed=0)
    save_model(model, directory, tokenizer_directory=tokenizer_directory)
    return directory


@pytest.fixture(scope="module")
def exported(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_to_verl(
        run_config(policy), tmp_path_factory.mktemp("verl") / "run", held_out=HELD_OUT
    ).directory


# Prompts


def rows_of(path: Path) -> list[dict[str, Any]]:
    return parquet.read_table(path).to_pylist()


def test_train_and_validation_files_hold_the_problems_of_the_run(policy: Path, exported: Path) -> None:
    problems = loop._training_problems(run_config(policy))
    rows = rows_of(exported / "train.parquet")
    assert rows == [
        {
            "data_source": problem.task,
            "prompt": [{"role": "user", "content": problem.prompt}],
            "ability": "verifiable",
            "reward_model": {"style": "rule", "ground_truth": problem.answer},
            "extra_info": {
                "index": index,
                "split": "train",
                "id": problem.id,
                "difficulty": 1,
                "choices": [],
            },
        }
        for index, problem in enumerate(problems)
    ]
    held_out = rows_of(exported / "validation.parquet")
    assert len(held_out) == HELD_OUT.num_problems
    assert {row["extra_info"]["split"] for row in held_out} == {"test"}
    by_id = {
        p.id: p
        for p in generate_problems(
            families=TASK.families,
            difficulties=(1,),
            num_problems=HELD_OUT.num_problems,
            split="test",
            seed=0,
        )
    }
    assert [row["extra_info"]["id"] for row in held_out] == list(by_id)
    assert all(split_of(problem) == "test" for problem in by_id.values())


def test_the_chat_template_renders_the_tokens_of_training(policy: Path, exported: Path) -> None:
    ours, theirs = AutoTokenizer.from_pretrained(policy), AutoTokenizer.from_pretrained(exported / "model")
    rows = rows_of(exported / "train.parquet") + rows_of(exported / "validation.parquet")
    longest = 0
    for row in rows:
        prompt = row["prompt"][0]["content"]
        ids = theirs.apply_chat_template(
            row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert ids == encode_prompt(ours, prompt)
        assert ids[0] == ours.bos_token_id
        longest = max(longest, len(ids))
    assert yaml.safe_load((exported / "phase-1.yaml").read_text())["data"]["max_prompt_length"] == longest


def test_every_family_and_hostile_text_is_rendered_to_its_tokens(policy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy)
    problems = generate_problems(
        families=tuple(SPACES), difficulties=(1, 4), num_problems=140, split="train", seed=0
    )
    texts = (
        "{{ 1 + 1 }} {% raw %}",
        " leading\n\ntrailing \n",
        "é ∑ 🙂 \t\r\n",
        "",
        "<|im_start|>user\n",
        r"\n\"'",
    )
    problems += [dataclasses.replace(problems[0], prompt=text) for text in texts]
    longest = template_prompts(tokenizer, problems)
    assert longest == max(len(encode_prompt(tokenizer, problem.prompt)) for problem in problems)


@pytest.mark.parametrize("special", ["<|eos|>", "<|bos|>", "<|pad|>"])
def test_a_prompt_that_spells_a_special_token_is_refused(policy: Path, special: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy)
    problem = Problem(
        id="7", task="t", difficulty=1, prompt=f"Q: {special}\nA:", solution=" #### 1", answer="1"
    )
    with pytest.raises(UsageError, match=r"problem 7 .* may not spell a special token"):
        template_prompts(tokenizer, [problem])


def test_a_tokenizer_without_a_first_token_starts_with_its_last(policy: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.bos_token = None
    problems = load_task(TASK, split="train", num_problems=5, seed=0, data_dir=None)
    template_prompts(tokenizer, problems)
    assert rendered_prompt(tokenizer, problems[0].prompt)[0] == tokenizer.eos_token_id


# The policy


@pytest.mark.parametrize("kind", ["dense", "mixture"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_the_exported_policy_says_the_same(kind: str, tokenizer_directory: Path, tmp_path: Path) -> None:
    config = SMALL_MIXTURE if kind == "mixture" else dataclasses.replace(SMALL, initializer_range=0.3)
    policy = saved_policy(config, tokenizer_directory, tmp_path / "policy")
    export = export_to_verl(run_config(policy), tmp_path / "run", held_out=HELD_OUT)
    ours: Any = load_model(policy).eval()
    theirs: Any = AutoModelForCausalLM.from_pretrained(export.directory / "model")
    tokenizer = AutoTokenizer.from_pretrained(export.directory / "model")
    original = AutoTokenizer.from_pretrained(policy)
    for row in rows_of(export.directory / "train.parquet")[:5]:
        ids = torch.tensor([encode_prompt(original, row["prompt"][0]["content"])])
        rendered = torch.tensor([rendered_prompt(tokenizer, row["prompt"][0]["content"])])
        with torch.inference_mode():
            expected, actual = ours(input_ids=ids).logits, theirs(input_ids=rendered).logits
            # one copy of the weights through one class: nothing is rounded anew
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
            greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
            assert theirs.generate(rendered, **greedy).tolist() == ours.generate(ids, **greedy).tolist()
    assert bool(export.cautions) == (kind == "mixture")
    assert ("was not tried" in (export.directory / "README.md").read_text()) == (kind == "mixture")


def test_the_exported_policy_reaches_the_longest_response_and_ends_at_one_token(
    policy: Path, exported: Path
) -> None:
    config = json.loads((exported / "model" / "config.json").read_text())
    longest = yaml.safe_load((exported / "phase-2.yaml").read_text())["actor_rollout_ref"]["rollout"][
        "max_model_len"
    ]
    assert config["max_position_embeddings"] == longest > 16
    ends = json.loads((exported / "model" / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(policy)
    assert ends["eos_token_id"] == config["eos_token_id"] == tokenizer.eos_token_id


# The folder


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_the_folder_is_whole_and_the_same_each_time(policy: Path, exported: Path, tmp_path: Path) -> None:
    files = contents(exported)
    assert {
        "README.md",
        "model/config.json",
        "model/model.safetensors",
        "model/tokenizer.json",
        "phase-1.yaml",
        "phase-2.yaml",
        "reward.py",
        "train.parquet",
        "validation.parquet",
    } <= set(files)
    empty = tmp_path / "run"
    empty.mkdir()
    (tmp_path / ".run.partial").mkdir()
    (tmp_path / ".run.partial" / "rest").write_text("of an export that was killed")
    assert contents(export_to_verl(run_config(policy), empty, held_out=HELD_OUT).directory) == files
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_nothing_is_left_of_an_export_that_failed(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "reward_source", fail)
    with pytest.raises(KeyboardInterrupt):
        export_to_verl(run_config(policy), tmp_path / "run", held_out=HELD_OUT)
    assert list(tmp_path.iterdir()) == []


def test_the_readme_names_commands_and_options_that_exist(exported: Path) -> None:
    text, schema = (exported / "README.md").read_text(encoding="utf-8"), load_schema()
    assert re.findall(r"--config-name (phase-\d+) .*# steps up to (\d+)", text) == [
        ("phase-1", "6"),
        ("phase-2", "10"),
    ]
    roots = "|".join(sorted({name.split(".")[0] for name in schema}))
    text = text.replace("reward.py", "")
    named = re.findall(rf"`\+?((?:{roots})\.[a-z_.0-9]+)", text) + re.findall(
        rf" ((?:{roots})\.[a-z_.]+)=", text
    )
    assert len(named) > 20
    assert [name for name in named if name not in schema and name.rpartition(".")[0] not in schema] == []
    assert "$" not in text.replace('"$PWD"', "")


# The command


def test_the_command_line(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_toml(tmp_path / "rl.toml", rl_tables())
    command = [
        "export-rl",
        str(file),
        "--init-from",
        str(policy),
        "--engine",
        "verl",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main([*command, "--validation-problems", "9", "--rl.num_steps=2"]) == 0
    assert "40 training and 9 validation problems" in capsys.readouterr().out
    assert not (tmp_path / "run" / "phase-2.yaml").exists()
    before = contents(tmp_path / "run")
    assert main(command) == 2
    assert (
        capsys.readouterr().err
        == f"rlprior: {tmp_path / 'run'}: is not empty; name a new folder, or empty it\n"
    )
    assert contents(tmp_path / "run") == before


def write_questions(path: Path, numbers: Sequence[int]) -> Path:
    path.write_text("".join(json.dumps({"question": f"{n} + 0", "answer": str(n)}) + "\n" for n in numbers))
    return path


def test_problems_of_a_file_need_another_file_to_validate_on(policy: Path, tmp_path: Path) -> None:
    train, test = (
        write_questions(tmp_path / "train.jsonl", range(20)),
        write_questions(tmp_path / "test.jsonl", range(20, 40)),
    )
    config = run_config(policy, task=TaskConfig(kind="file", path=str(train)))
    with pytest.raises(UsageError, match="name a file of other problems with --validation-file"):
        export_to_verl(config, tmp_path / "run", held_out=HELD_OUT)
    with pytest.raises(UsageError, match="7 of its questions are training problems too"):
        export_to_verl(config, tmp_path / "run", held_out=HeldOut(path=train, num_problems=7))
    with pytest.raises(UsageError, match="-1 validation problems: verl needs at least 1"):
        export_to_verl(config, tmp_path / "run", held_out=HeldOut(path=test, num_problems=-1))
    assert not (tmp_path / "run").exists()
    export_to_verl(config, tmp_path / "run", held_out=HeldOut(path=test, num_problems=7))
    assert len(rows_of(tmp_path / "run" / "train.parquet")) == 20
    assert [
        row["reward_model"]["ground_truth"] for row in rows_of(tmp_path / "run" / "validation.parquet")
    ] == [str(n) for n in range(20, 27)]


def test_multiple_choice_keeps_its_choices(policy: Path, tmp_path: Path) -> None:
    records = [{"question": f"{n}?", "choices": ["no", str(n)], "answer": "B"} for n in range(12)]
    for name, part in (("train.jsonl", records[:8]), ("test.jsonl", records[8:])):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in part))
    config = run_config(policy, task=TaskConfig(kind="file", path=str(tmp_path / "train.jsonl")))
    held_out = HeldOut(num_problems=20, path=tmp_path / "test.jsonl")
    rows = rows_of(export_to_verl(config, tmp_path / "run", held_out=held_out).directory / "train.parquet")
    assert rows[3]["extra_info"]["choices"] == ["no", "3"]
    row = rows[3]["extra_info"], rows[3]["reward_model"]["ground_truth"]
    assert [
        compute_score("t", text, row[1], row[0])["score"] for text in ("#### B", "#### (b) 3", "#### 3")
    ] == [1, 1, 0]


def test_mistakes_are_one_line_each(policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file; name a folder"):
        export_to_verl(run_config(policy), tmp_path / "file", held_out=HELD_OUT)
    with pytest.raises(UsageError, match=r"holds no tokenizer\.json"):
        export_to_verl(run_config(tmp_path), tmp_path / "run", held_out=HELD_OUT)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"pip install 'rlprior\[parquet\]'"):
        export_to_verl(run_config(policy), tmp_path / "run", held_out=HELD_OUT)
    assert not (tmp_path / "run").exists()
