"""The tokenizer: any text comes back, digits stay single, and no text can spell a special token."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config

from rlprior.config import UsageError
from rlprior.data.tokenizer import (
    BOS,
    EOS,
    PAD,
    encode_documents,
    encode_prompt,
    first_token_id,
    load_tokenizer,
    save_tokenizer,
    token_dtype,
    train_tokenizer,
)
from rlprior.tasks.synthetic import SPACES, generate_problems

TEXTS = [
    "The quick brown fox jumps over the lazy dog, twice.\n" * 5,
    "def f(x):\n    return x + 1\n" * 5,
    *(
        problem.text
        for problem in generate_problems(
            families=list(SPACES), difficulties=[1, 2], num_problems=300, split="train", seed=0, unique=False
        )
    ),
]
TOKENIZER = train_tokenizer(TEXTS, 600)


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    [ids] = encode_documents(TOKENIZER, [text])
    assert ids[0] == TOKENIZER.bos_token_id
    assert ids[-1] == TOKENIZER.eos_token_id
    special = {TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id}
    assert special.isdisjoint(ids[1:-1].tolist())
    assert TOKENIZER.decode(ids[1:-1].tolist()) == text


@given(st.text(alphabet="0123456789 +-=ab\n", max_size=50))
def test_every_digit_is_one_token(text: str) -> None:
    [ids] = encode_documents(TOKENIZER, [text])
    pieces = [TOKENIZER.decode([token]) for token in ids[1:-1].tolist()]
    assert all(piece.isdigit() <= (len(piece) == 1) for piece in pieces)
    assert sum(piece.isdigit() for piece in pieces) == sum(character.isdigit() for character in text)


@pytest.mark.parametrize("special", [BOS, EOS, PAD])
def test_text_that_spells_a_special_token_stays_text(special: str, tmp_path: Path) -> None:
    save_tokenizer(TOKENIZER, tmp_path)
    loaded = AutoTokenizer.from_pretrained(str(tmp_path))
    for ids in (
        encode_documents(TOKENIZER, [f"a{special}b"])[0][1:-1].tolist(),
        loaded(f"a{special}b")["input_ids"][1:],
        encode_prompt(loaded, f"a{special}b")[1:],
    ):
        assert TOKENIZER.convert_tokens_to_ids(special) not in ids
        assert TOKENIZER.decode(ids) == f"a{special}b"


@pytest.mark.parametrize("beside_a_model", [False, True])
def test_auto_tokenizer_starts_a_prompt_as_a_document_starts(tmp_path: Path, beside_a_model: bool) -> None:
    save_tokenizer(TOKENIZER, tmp_path)
    if beside_a_model:
        Qwen3Config(vocab_size=600).save_pretrained(str(tmp_path))
    loaded = AutoTokenizer.from_pretrained(str(tmp_path))
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == (BOS, EOS, PAD)
    problems = generate_problems(
        families=list(SPACES), difficulties=[1, 2, 3, 4], num_problems=140, split="test", seed=1
    )
    documents = encode_documents(TOKENIZER, [problem.text for problem in problems])
    prompts = loaded([problem.prompt for problem in problems])["input_ids"]
    for problem, document, prompt in zip(problems, documents, prompts, strict=True):
        assert document[: len(prompt)].tolist() == prompt == encode_prompt(loaded, problem.prompt)
        assert loaded.decode(document[len(prompt) :].tolist(), skip_special_tokens=True) == problem.solution


def test_vocabulary_is_no_larger_than_asked_for() -> None:
    assert len(TOKENIZER) <= 600
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(len(TOKENIZER)))
    assert len(train_tokenizer([""], 4096)) == 259


PROGRAM = """
import sys
from pathlib import Path
from rlprior.data.embedded import read_code
from rlprior.data.tokenizer import save_tokenizer, train_tokenizer
import itertools
save_tokenizer(train_tokenizer((text for text, _ in itertools.islice(read_code(), 20)), 800), Path(sys.argv[1]))
"""


def test_the_same_tokenizer_in_every_process(tmp_path: Path) -> None:
    digests = set()
    for hash_seed in ("1", "2"):
        directory = tmp_path / hash_seed
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        subprocess.run([sys.executable, "-c", PROGRAM, str(directory)], env=environment, check=True)
        files = sorted(directory.iterdir())
        digests.add(hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest())
    assert len(digests) == 1


def save_word_tokenizer(directory: Path, vocab_size: int, **special: str) -> None:
    vocab = {"<end>": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, vocab_size)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(str(directory))


def test_a_tokenizer_without_a_first_token_starts_documents_with_its_last(tmp_path: Path) -> None:
    save_word_tokenizer(tmp_path, 70_000, eos_token="<end>")
    tokenizer = load_tokenizer(tmp_path)
    assert first_token_id(tokenizer) == 0
    [ids] = encode_documents(tokenizer, ["w5 w69999"])
    assert ids.dtype == np.uint32
    assert ids.tolist() == [0, 5, 69_999, 0]
    assert encode_prompt(tokenizer, "w5") == [0, 5]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_token_dtype_holds_the_last_id(vocab_size: int, dtype: type) -> None:
    assert token_dtype(vocab_size) == dtype
    assert np.iinfo(token_dtype(vocab_size)).max >= vocab_size - 1


def test_folders_that_hold_no_usable_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="absent: no such folder"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(UsageError, match="not a Hugging Face tokenizer folder"):
        load_tokenizer(tmp_path)
    save_word_tokenizer(tmp_path / "endless", 10)
    with pytest.raises(UsageError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path / "endless")
