"""Hand a reinforcement-learning run to verl: model, prompts, reward and configuration in one folder.

verl has an environment of its own, with another version of transformers: nothing of it is imported here, and nothing of ours there.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from rlprior.config import UsageError, encode
from rlprior.data.tokenizer import encode_prompt, first_token_id
from rlprior.models.causal_lm import load_model, load_tokenizer, save_model
from rlprior.rl.config import LengthPhase, RLConfig
from rlprior.rl.loop import RLRunConfig
from rlprior.rl.verl.reward import reward_source
from rlprior.rl.verl.settings import (
    VERL_VERSION,
    Prompts,
    check_exportable,
    counterparts,
    nest,
    phases_of,
    verl_options,
)
from rlprior.tasks.config import data_folder, load_task
from rlprior.tasks.files import load_problems
from rlprior.tasks.problem import Problem


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Where validation problems come from.

    Args:
        num_problems: how many, at least 1; fewer where a file has fewer.
        path: JSON Lines file; None for the held-out side of generated problems.
    """

    num_problems: int
    path: Path | None = None


@dataclass(frozen=True)
class Export:
    """What was written, and what the user should know of it."""

    directory: Path
    summary: str
    cautions: tuple[str, ...]


def export_to_verl(
    config: RLRunConfig, directory: Path, *, held_out: HeldOut, source: str = "rl.toml"
) -> Export:
    """Write a run as a folder that verl 0.9 starts from: all of it or nothing.

    Args:
        config: the run as `rlprior rl` would make it.
        directory: a new folder, or an empty one.
        held_out: validation problems.
        source: name of the settings' file, for the README.

    Raises:
        UsageError: a setting that verl cannot follow, a folder with something in it, prompts that a chat template cannot render, or no
            held-out problems.
    """
    _require_pyarrow()
    with _new_folder(directory) as partial:
        training, validation = _problems(config, held_out)
        check_exportable(config, num_training=len(training))
        start = Path(config.init_from)
        tokenizer = load_tokenizer(start)
        max_tokens = template_prompts(tokenizer, [*training, *validation])
        prompts = Prompts(num_training=len(training), num_validation=len(validation), max_tokens=max_tokens)
        phases = phases_of(config.rl)
        longest = max_tokens + max(phase.max_new_tokens for phase in phases)
        model = load_model(start, max_positions=longest)
        write_policy(model, tokenizer, partial / "model", tokenizer_directory=start)
        write_prompts(training, partial / "train.parquet", split="train")
        write_prompts(validation, partial / "validation.parquet", split="test")
        texts = {"reward.py": reward_source()}
        for number, phase in enumerate(phases, start=1):
            options = verl_options(config, phase, prompts, experiment=directory.name)
            texts[f"phase-{number}.yaml"] = render_configuration(options)
        cautions = _cautions(model)
        texts["README.md"] = _readme(config, phases, prompts, model, cautions, source)
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
    summary = f"{len(training)} training and {len(validation)} validation problems, {len(phases)} phase(s) of the length schedule"
    return Export(directory, summary, cautions)


@contextlib.contextmanager
def _new_folder(directory: Path) -> Iterator[Path]:
    """A folder to write into, which takes its name when all is in it and is gone when something failed."""
    if directory.is_file():
        raise UsageError(f"{directory}: is a file; name a folder")
    if directory.is_dir() and any(directory.iterdir()):
        raise UsageError(f"{directory}: is not empty; name a new folder, or empty it")
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


# problems


def _problems(config: RLRunConfig, held_out: HeldOut) -> tuple[list[Problem], list[Problem]]:
    if held_out.num_problems < 1:
        raise UsageError(f"{held_out.num_problems} validation problems: verl needs at least 1")
    task, data_dir = config.rl.task, data_folder(config.data_dir)
    training = load_task(
        task, split="train", num_problems=config.rl.num_problems, seed=config.seed, data_dir=data_dir
    )
    if held_out.path is not None:
        validation = load_problems(held_out.path)[: held_out.num_problems]
    elif task.kind == "synthetic":
        validation = load_task(
            task, split="test", num_problems=held_out.num_problems, seed=config.seed, data_dir=data_dir
        )
    else:
        raise UsageError(
            f"rl.task.kind = {task.kind!r} has no held-out side; name a file of other problems with --validation-file"
        )
    if shared := {problem.id for problem in training} & {problem.id for problem in validation}:
        raise UsageError(
            f"{held_out.path}: {len(shared)} of its questions are training problems too; name a file of other problems"
        )
    return training, validation


def template_prompts(tokenizer: Any, problems: Sequence[Problem]) -> int:
    """Give `tokenizer` a chat template that renders one user message to exactly the tokens that a policy is trained on.

    The template is the tokenizer's first token and the message's text. Special tokens in the rendered text have to be read as such, or
    the first one would be spelled out; a prompt that spells one itself is refused.

    Args:
        tokenizer: changed in place.
        problems: each is rendered and compared with `encode_prompt`.

    Returns:
        Tokens of the longest prompt.

    Raises:
        UsageError: a prompt that would be rendered to other tokens.
    """
    first = tokenizer.convert_ids_to_tokens(first_token_id(tokenizer))
    literal = json.dumps(first, ensure_ascii=False)
    tokenizer.chat_template = (
        f"{{{{ {literal} }}}}{{% for message in messages %}}{{{{ message['content'] }}}}{{% endfor %}}"
    )
    tokenizer.split_special_tokens = False
    longest = 0
    for problem in problems:
        expected = encode_prompt(tokenizer, problem.prompt)
        if rendered_prompt(tokenizer, problem.prompt) != expected:
            raise UsageError(
                f"problem {problem.id} ({problem.prompt[:40]!r}...): a chat template renders it to other tokens than training saw; "
                "a prompt may not spell a special token of the tokenizer"
            )
        longest = max(longest, len(expected))
    return longest


def rendered_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt by the tokenizer's chat template, as verl's agent loop asks for them."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=True, return_dict=False
    )


def _require_pyarrow() -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise UsageError(
            "parquet files need pyarrow; install it with: pip install 'rlprior[parquet]'"
        ) from None


def write_prompts(problems: Sequence[Problem], path: Path, *, split: str) -> None:
    """Problems as the rows that verl's `RLHFDataset` and reward managers read, in the order given."""
    import pyarrow
    from pyarrow import parquet

    text, number = pyarrow.string(), pyarrow.int64()
    schema = pyarrow.schema(
        {
            "data_source": text,
            "prompt": pyarrow.list_(pyarrow.struct({"role": text, "content": text})),
            "ability": text,
            "reward_model": pyarrow.struct({"style": text, "ground_truth": text}),
            "extra_info": pyarrow.struct(
                {
                    "index": number,
                    "split": text,
                    "id": text,
                    "difficulty": number,
                    "choices": pyarrow.list_(text),
                }
            ),
        }
    )
    rows = [
        {
            "data_source": problem.task,
            "prompt": [{"role": "user", "content": problem.prompt}],
            "ability": "verifiable",
            "reward_model": {"style": "rule", "ground_truth": problem.answer},
            "extra_info": {
                "index": index,
                "split": split,
                "id": problem.id,
                "difficulty": problem.difficulty,
                "choices": list(problem.choices),
            },
        }
        for index, problem in enumerate(problems)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), path)


# policy


def write_policy(model: Any, tokenizer: Any, directory: Path, *, tokenizer_directory: Path) -> None:
    """Write a Hugging Face folder whose responses end where ours do: at the tokenizer's end-of-sequence token and no other."""
    from transformers import GenerationConfig

    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, value in ends.items():
        setattr(model.config, name, value)
    model.generation_config = GenerationConfig(**ends)
    save_model(model, directory, tokenizer_directory=tokenizer_directory)
    tokenizer.save_pretrained(str(directory))


def _cautions(model: Any) -> tuple[str, ...]:
    if model.config.model_type != "dots1":
        return ()
    return (
        "mixture of experts (Dots1ForCausalLM without a shared expert): transformers loads it, but verl's documentation and tests do not "
        "name this architecture, and whether vLLM builds it without a shared expert was not tried; start with a few steps",
    )


# configuration


def render_configuration(options: dict[str, Any]) -> str:
    """A configuration for Hydra: verl's own defaults, and these options on top.

    `export_dir` is left to the command line, so that the folder can be moved.
    """
    import yaml

    tree = {
        "hydra": {"searchpath": ["pkg://verl.trainer.config"]},
        "defaults": ["ppo_trainer", "_self_"],
        "export_dir": "???",
        **nest(options),
    }
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)


def _readme(
    config: RLRunConfig,
    phases: Sequence[LengthPhase],
    prompts: Prompts,
    model: Any,
    cautions: Sequence[str],
    source: str,
) -> str:
    rl = config.rl
    commands = (
        f'python3 -m verl.trainer.main_ppo --config-path "$PWD" --config-name phase-{number} export_dir="$PWD" '
        f"trainer.n_gpus_per_node=8  # steps up to {phase.until_step}"
        for number, phase in enumerate(phases, start=1)
    )
    template = resources.files("rlprior.rl.verl").joinpath("readme.md").read_text(encoding="utf-8")
    return Template(template).substitute(
        version=VERL_VERSION,
        source=source,
        architecture=model.config.architectures[0],
        num_parameters=f"{model.num_parameters():,}",
        num_training=prompts.num_training,
        num_validation=prompts.num_validation,
        phase_files=", ".join(f"`phase-{number}.yaml`" for number in range(1, len(phases) + 1)),
        commands="\n".join(commands),
        settings=_settings_table(config, phases, prompts),
        clip_range=f"[{1 - rl.clip_low:g}, {1 + rl.clip_high:g}]",
        loss_aggregation=rl.loss_aggregation,
        differences="\n".join(f"- {difference}" for difference in _differences(rl)),
        caution="".join(f"\n\n{caution[0].upper()}{caution[1:]}." for caution in cautions),
    )


def _differences(rl: RLConfig) -> list[str]:
    """Where verl does something else with these settings."""
    found: list[str] = []
    if rl.dynamic_sampling == "refill":
        found.append(
            "Dynamic sampling. Ours draws as many new prompts as groups are missing, at most `max_refills` times, and then trains on the "
            "groups it has. verl draws two new prompts for each group it drops until the batch is full, however long that takes (its "
            "trainer ignores `max_num_gen_batches`), and throws surplus groups away: on problems that the policy always or never solves, "
            "a step does not end."
        )
    found.append(
        "A response cut at the length limit is graded as it stands. Ours counts it as wrong where one more digit would change its answer."
    )
    if rl.scale_rewards == "group":
        found.append("Advantages are divided by `std + 1e-6`, ours by `std + 1e-4`.")
    found.append(
        "Precision: verl keeps weights and moments in float32 and computes in bfloat16; vLLM samples in bfloat16."
    )
    if rl.old_log_probs == "trainer":
        found.append(
            "Old log-probabilities: both compute them anew, which makes the ratio 1; verl in a pass of its own before the update."
        )
        if rl.importance_cap is None:
            found.append(
                "vLLM draws with other probabilities than the trainer's, and nothing corrects for it: write `importance_cap = 2.0` under "
                "`[rl]` and export again, unless that is what you want."
            )
    found += [
        "Order of prompts, and all samples: verl's own generators. A step is not reproduced, only the algorithm.",
        "Validation: one sample a problem at the rollout's temperature. Ours is a stage of its own, `rlprior evaluate`.",
    ]
    return found


def _settings_table(config: RLRunConfig, phases: Sequence[LengthPhase], prompts: Prompts) -> str:
    by_phase = [counterparts(config, phase, prompts) for phase in phases]
    rows: list[str] = []
    for setting, first in by_phase[0].items():
        options = [
            f"`{option}: {' / '.join(dict.fromkeys(_inline(each[setting].options[option]) for each in by_phase))}`"
            for option in first.options
        ]
        rows.append(
            f"| `{setting}` | {_setting_value(config, setting)} | {'<br>'.join(options)} | {first.remark} |"
        )
    return "\n".join(rows)


def _setting_value(config: Any, setting: str) -> str:
    value: Any = config
    for name in setting.split("."):
        value = getattr(value, name)
    return f"`{_inline(encode(value))}`"


def _inline(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value
