"""Every mistake that a command line can hold or point to: one line that says what and where, and nothing lost or half-written."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path

import pytest
from tests.small_study import (
    files_below,
    last_checkpoint,
    rl_tables,
    run_cli,
    study_tables,
    train_tables,
    write_toml,
)

from rlprior.cli import main


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 2) -> str:
    """The one line that a command ends with, which names the program; its exit code is checked."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    error = capsys.readouterr().err
    assert error.startswith("rlprior: ")
    assert error.endswith("\n")
    assert error.count("\n") == 1
    return error.removeprefix("rlprior: ").strip()


# Mistakes in the command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study"], "required: FILE.toml; see 'rlprior study --help'"),
        ([], "required: COMMAND; see 'rlprior --help'"),
        (["paper"], "invalid choice: 'paper'"),
        (["demo", "--workers", "two"], "invalid int value: 'two'; see 'rlprior demo --help'"),
        (["demo", "--workers", "0"], "--workers and --threads must be at least 1"),
        (["demo", "--wrokers", "2"], "'--wrokers' is not an option of 'rlprior demo'"),
        (["demo", "--wrokers=2"], "unknown key 'wrokers'"),
        (
            ["demo", "rl.num_steps=3"],
            "'rl.num_steps=3' is not an option of 'rlprior demo'; write --section.key=value",
        ),
        (
            ["demo", "--rl.num_steps", "3"],
            "'--rl.num_steps' is not an option of 'rlprior demo'; write --rl.num_steps=value",
        ),
        (["demo", "--rl.num_stepz=3"], "unknown key 'rl.num_stepz'; did you mean 'num_steps'?"),
        (
            ["demo", "--arms.tail.objective.beta=-1"],
            "arms.tail.objective: beta must be greater than -1, got -1",
        ),
        (
            ["demo", "--arms.tail.objective.top_k=0"],
            "arms.tail.objective: top_k must be an integer of at least 1, got 0",
        ),
        (["report", "."], "no study.json there; give the directory that `rlprior study` wrote"),
        (["report", ".", "--a.b=1"], "'--a.b=1': 'rlprior report' has no settings"),
    ],
)
def test_a_wrong_command_is_told_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)
    assert files_below(tmp_path) == set()


# Mistakes in the file


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"title = ", "study.toml: not valid TOML: "),
        (b"title = '\xff'", "study.toml: not UTF-8 text (byte 9); save it as UTF-8"),
        (b"titel = 'x'", "study.toml: unknown key 'titel'; did you mean 'title'?"),
        (b"title = 'x'", "study.toml: arms is missing; add it"),
    ],
)
def test_a_wrong_file_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    (tmp_path / "study.toml").write_bytes(content)
    assert message in refused(capsys, "study", tmp_path / "study.toml", "--out", tmp_path / "out")
    assert files_below(tmp_path) == {"study.toml"}


def test_a_folder_is_not_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is a directory; give the path of a TOML file" in refused(capsys, "study", tmp_path)


# Mistakes in the data


BAD_DATA = {
    "missing": (None, 2, r"source 'mine': {path}: no such file"),
    "empty": (b"", 1, r"{path}: the file is empty"),
    "not JSON": (b'{"text": "fine"}\n{"text": \n', 1, r"{path}:2: not JSON"),
    "not an object": (b'{"text": "fine"}\n[1]\n', 1, r"{path}:2: not a JSON object"),
    "another field": (b'{"txt": "fine"}\n', 2, r"{path}:1: no field 'text'; it has 'txt'"),
    "undecodable": (b'{"text": "fine"}\n{"text": "\xff"}\n', 1, r"{path}: byte 27 is not UTF-8"),
    "cut archive": (b"\x1f\x8b\x08\x00", 1, r"{path}: cannot be read"),
}


@pytest.mark.parametrize("what", BAD_DATA)
def test_bad_data_is_told_with_its_place_and_leaves_nothing_half_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    content, code, message = BAD_DATA[what]
    name = "mine.jsonl.gz" if what == "cut archive" else "mine.jsonl"
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / name
    if content is not None:
        path.write_bytes(content)
    tables = train_tables("training.mixture={mine=1}", "training.num_steps=1", "data.held_out_fraction=0.4")
    tables["data"]["sources"] = [{"name": "mine", "kind": "jsonl", "path": name}]
    arguments = ["train", write_toml(tmp_path / "train.toml", tables), "--data-dir", tmp_path / "data"]
    arguments += ["--out", tmp_path / "out" / "run"]
    assert message.format(path=path) in refused(capsys, *arguments, code=code)
    written = files_below(tmp_path / "out") if (tmp_path / "out").exists() else set()
    assert not [name for name in written if "corpus" in name or name.endswith("result.json")]
    if what == "cut archive":
        return
    # the mended file, and the same command goes through
    texts = [f"Number {number} has {len(str(number))} digits." for number in range(50)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert main([str(argument) for argument in arguments]) == 0


def test_a_task_file_that_is_not_json_is_told_by_the_study(tmp_path: Path) -> None:
    """In a process of the pool, through the real command."""
    (tmp_path / "questions.jsonl").write_text('{"question": "1+1", "answer": "2"}\nno\n')
    one_arm = "arms={ce={label='ce', objective={name='cross_entropy'}}}"
    tables = study_tables(one_arm, "evaluation.tasks.sums={kind='file', path='questions.jsonl'}")
    path = write_toml(tmp_path / "study.toml", tables)
    done = run_cli("study", path, "--data-dir", tmp_path, "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    questions = tmp_path / "questions.jsonl"
    assert f": {questions}:2: not JSON" in done.stderr
    assert done.stderr.startswith("rlprior: evaluate ")
    assert done.stderr.endswith("(3 failed, 0 not made)\n")
    assert len(list((tmp_path / "out" / "runs").glob("*/result.json"))) == 4


def test_a_folder_that_is_no_model_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_toml(tmp_path / "rl.toml", rl_tables())
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.mkdir()
    message = refused(capsys, "rl", path, "--init-from", missing, "--out", tmp_path / "run")
    assert message == f"{missing}: no such file or directory"
    message = refused(capsys, "rl", path, "--init-from", empty, "--out", tmp_path / "run")
    assert message == f"{empty}: not a Hugging Face model folder (config.json is missing)"
    assert "init_from is missing; add it" in refused(capsys, "rl", path, "--out", tmp_path / "run")


def test_a_model_with_another_tokenizer_is_told(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = train_tables("data.tokenizer.vocab_size=280")
    path = write_toml(tmp_path / "train.toml", tables)
    model = last_checkpoint(trained)
    message = refused(capsys, "train", path, "--init-from", model, "--out", tmp_path / "run")
    assert message == (
        f"{model}: its tokenizer is not the corpus's; prepare the corpus with the model's tokenizer (data.tokenizer.path)"
    )


# Mistakes in the place


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_another_run_is_refused_and_kept(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str], finished: bool
) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    if not finished:
        (out / "result.json").unlink()
    before = {name: (out / name).read_bytes() for name in files_below(out)}
    path = write_toml(tmp_path / "train.toml", train_tables())
    message = refused(capsys, "train", path, "--seed=1", "--out", out)
    assert message == (
        f"{out}: holds another run (it differs in config.seed); choose another --out, or delete that directory"
    )
    message = refused(
        capsys,
        "rl",
        write_toml(tmp_path / "rl.toml", rl_tables()),
        "--init-from",
        last_checkpoint(trained),
        "--out",
        out,
    )
    assert f"{out}: holds another run (it differs in stage, " in message
    assert {name: (out / name).read_bytes() for name in files_below(out)} == before


def test_a_folder_that_another_process_writes_is_refused(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    (out / "result.json").unlink()
    path = write_toml(tmp_path / "train.toml", train_tables())
    with (out / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        message = refused(capsys, "train", path, "--out", out)
        assert message == f"{out}: another process is writing this run; wait for it or end it"
    assert main(["train", str(path), "--out", str(out)]) == 0


def test_a_file_in_the_place_of_the_outputs_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    path = write_toml(tmp_path / "train.toml", train_tables())
    message = refused(capsys, "train", path, "--out", tmp_path / "file" / "run", code=1)
    assert str(tmp_path / "file") in message
    assert (tmp_path / "file").read_text() == "x"
