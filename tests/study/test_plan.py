"""Identity of runs: the same wherever a study lies, another for exactly the runs that a change reaches."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
from tests.small_study import find_run, study_config

from rlprior.config import UsageError
from rlprior.runs import identity
from rlprior.study import plan as plan_module
from rlprior.study.config import StudyConfig
from rlprior.study.plan import plan_study
from rlprior.training.checkpoint import checkpoint_directory

STAGES_OF_AN_ARM = ("pretrain", "evaluate pretrain", "midtrain", "evaluate midtrain", "rl", "evaluate rl")


def ids(config: StudyConfig, directory: Path = Path("/somewhere")) -> dict[str, str]:
    return {planned.label: planned.identity.id for planned in plan_study(config, directory)}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    assert before.keys() == after.keys()
    return {label for label in before if before[label] != after[label]}


def of_arms(*arms: str, stages: tuple[str, ...] = STAGES_OF_AN_ARM) -> set[str]:
    return {f"{stage} {arm} s0" for stage in stages for arm in arms}


def test_runs_of_a_study_and_what_they_wait_for() -> None:
    plan = plan_study(study_config("seeds=[0,3]"), Path("/somewhere"))
    labels = [planned.label for planned in plan]
    assert len(labels) == len(set(labels)) == 1 + 2 * 2 * 6
    assert len({planned.directory for planned in plan}) == len(plan)
    before: set[Path] = set()
    for planned in plan:
        assert before.issuperset(planned.needs), "a run comes after those it needs"
        before.add(planned.directory)
    data, pretrain = plan[0], find_run(plan, "pretrain sharp s3")
    midtrain, rl = find_run(plan, "midtrain sharp s3"), find_run(plan, "rl sharp s3")
    assert pretrain.needs == (data.directory,)
    assert midtrain.needs == (pretrain.directory,)
    assert rl.needs == (midtrain.directory,)
    for target in (pretrain, midtrain, rl):
        evaluation = find_run(plan, f"evaluate {target.label}")
        assert evaluation.needs == (target.directory,)
        assert (evaluation.arm, evaluation.seed, evaluation.of_stage) == ("sharp", 3, target.stage)
    assert midtrain.config.init_from == str(checkpoint_directory(pretrain.directory, 6))
    assert find_run(plan, "evaluate pretrain sharp s3").config.steps == (3, 6)
    assert all(planned.cost > 0 for planned in plan[1:])


def test_arms_differ_in_the_objective_alone() -> None:
    plan = plan_study(study_config(), Path("/somewhere"))
    for stage in ("pretrain", "midtrain"):
        one, other = (find_run(plan, f"{stage} {arm} s0").config for arm in ("ce", "sharp"))
        assert one.training.objective != other.training.objective
        assert dataclasses.replace(one.training, objective=other.training.objective) == other.training
        assert (one.seed, one.corpus, one.model) == (other.seed, other.corpus, other.model)


def test_ids_do_not_depend_on_where_the_study_lies() -> None:
    assert ids(study_config(), Path("/somewhere")) == ids(study_config(), Path("/elsewhere/deep"))


def test_ids_do_not_depend_on_where_the_data_lies(tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "questions.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
        config = study_config(
            f"data_dir={tmp_path / name}", "evaluation.tasks.sums={kind='file', path='questions.jsonl'}"
        )
        found.append(ids(config))
    assert found[0] == found[1]
    (tmp_path / "two" / "questions.jsonl").write_text('{"question": "1+1", "answer": "3"}\n')
    evaluations = of_arms("ce", "sharp", stages=STAGES_OF_AN_ARM[1::2])
    assert changed(found[0], ids(config)) == evaluations


def test_a_reward_function_names_the_runs_that_it_rewards(tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "reward.py").write_text("def f(prompt, response, answer): return 1.0\n")
        config = study_config(f"data_dir={tmp_path / name}", "rl.task={verifier='reward.py:f'}")
        found.append(ids(config))
    assert found[0] == found[1]
    (tmp_path / "two" / "reward.py").write_text("def f(prompt, response, answer): return 0.5\n")
    rewarded = of_arms("ce", "sharp", stages=STAGES_OF_AN_ARM[4:])
    assert changed(found[0], ids(config)) == rewarded


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("title='other'", set()),
        ("arms.sharp.label=other", set()),
        ("data.num_workers=4", set()),
        ("arms.sharp.objective.beta=-0.3", of_arms("sharp")),
        (
            "pretrain.num_steps=7",
            of_arms("ce", "sharp"),
        ),
        ("midtrain.rope_theta=2e6", of_arms("ce", "sharp", stages=STAGES_OF_AN_ARM[2:])),
        ("rl.learning_rate=2e-3", of_arms("ce", "sharp", stages=STAGES_OF_AN_ARM[4:])),
        ("evaluation.top_k=7", of_arms("ce", "sharp", stages=STAGES_OF_AN_ARM[1::2])),
        ("data.sources.0.num_problems=401", {"data"} | of_arms("ce", "sharp")),
        ("model.rope_theta=2e4", of_arms("ce", "sharp")),
    ],
)
def test_a_change_reaches_exactly_the_runs_that_follow_from_it(override: str, expected: set[str]) -> None:
    assert changed(ids(study_config()), ids(study_config(override))) == expected


def test_another_seed_is_another_run_on_the_same_corpus() -> None:
    one, two = ids(study_config()), ids(study_config("seeds=[1]"))
    assert one["data"] == two["data"]
    assert not set(list(one.values())[1:]) & set(two.values())


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("rlprior.objectives", of_arms("ce", "sharp")),
        ("rlprior.rl.update", of_arms("ce", "sharp", stages=STAGES_OF_AN_ARM[4:])),
        ("rlprior.evaluation", of_arms("ce", "sharp", stages=STAGES_OF_AN_ARM[1::2])),
        ("rlprior.statistics", of_arms("ce", "sharp", stages=STAGES_OF_AN_ARM[1::2])),
        ("rlprior.data", {"data"} | of_arms("ce", "sharp")),
        ("rlprior.cli", set()),
    ],
)
def test_mended_code_is_another_run(monkeypatch: pytest.MonkeyPatch, module: str, expected: set[str]) -> None:
    before = ids(study_config())
    original = identity.code_fingerprint

    def mended(packages: tuple[str, ...]) -> str:
        return original(packages) + ("mended" if module in packages else "")

    monkeypatch.setattr(identity, "code_fingerprint", mended)
    assert changed(before, ids(study_config())) == expected


def imported_modules(name: str) -> set[str]:
    """Modules of this package that a module imports, directly or not."""
    found: set[str] = set()
    todo = [name]
    while todo:
        current = todo.pop()
        if current in found:
            continue
        found.add(current)
        spec = importlib.util.find_spec(current)
        assert spec is not None
        assert spec.origin is not None
        for node in ast.walk(ast.parse(Path(spec.origin).read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlprior"):
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
                todo += [
                    one
                    for one in names
                    if importlib.util.find_spec(one.rpartition(".")[0]) and is_module(one)
                ]
    return found


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


TAKEN_IN_PART = {
    # where a checkpoint lies, and the name of its manifest
    "evaluate": {"rlprior.training.checkpoint"},
    "readiness": {"rlprior.training.checkpoint"},
    # a constant and a type; the records that are read are kept with what was drawn, and compared
    "suite": {
        "rlprior.data.corpus",
        "rlprior.data.packing",
        "rlprior.records",
        "rlprior.training.engine",
    },
}


def test_the_code_of_a_stage_is_all_that_it_imports() -> None:
    """A module that a stage uses and does not name could change without a new identity."""
    plumbing = {
        "rlprior",
        "rlprior.config",
        "rlprior.processes",
        "rlprior.tracking",
        "rlprior.world",
    }
    for stage, module in plan_module.STAGES.items():
        for name in imported_modules(module.__name__) - plumbing:
            if name.startswith("rlprior.runs"):
                continue
            codes = (
                *module.CODE,
                *getattr(module, "COUNTING_CODE", ()),
            )  # what counts is kept with the result
            covered = any(name == code or name.startswith(f"{code}.") for code in codes)
            assert covered or name in TAKEN_IN_PART.get(stage, ()), f"{stage} imports {name}"


def test_a_missing_data_file_is_found_while_planning() -> None:
    with pytest.raises(UsageError, match=r"/nowhere/questions\.jsonl: no such file"):
        plan_study(
            study_config("evaluation.tasks.sums={kind='file', path='/nowhere/questions.jsonl'}"),
            Path("/somewhere"),
        )


def test_done_is_a_result_of_this_very_run(tmp_path: Path) -> None:
    planned = plan_study(study_config(), tmp_path)[0]
    assert not planned.is_done
    planned.directory.mkdir(parents=True)
    (planned.directory / "manifest.json").write_text(json.dumps({"id": planned.identity.id}))
    assert not planned.is_done
    (planned.directory / "result.json").write_text("{}")
    assert planned.is_done
    other = dataclasses.replace(plan_study(study_config(), tmp_path)[1], directory=planned.directory)
    assert not other.is_done
