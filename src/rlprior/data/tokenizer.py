"""Byte-level BPE: trained on the corpus, or an existing one; documents become <|bos|> text <|eos|>."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlprior.config import UsageError

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"

# Every digit by itself; words and punctuation with the space before them; runs of line ends and of spaces.
WORD_PATTERN = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE in which every digit is one token.

    Any text comes back unchanged from encoding and decoding. Text that spells a special token stays text: special tokens
    are only put in by the post-processor (<|bos|> before a text) and by `encode_documents`.

    Args:
        texts: training text; the result depends on nothing else.
        vocab_size: entries at most, special tokens included; fewer where the text has fewer pairs to merge.
    """
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Load a Hugging Face tokenizer folder.

    Raises:
        UsageError: the folder is missing, holds no tokenizer, or its tokenizer has no end-of-sequence token.
    """
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder; give the path of a Hugging Face tokenizer folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise UsageError(f"{path}: not a Hugging Face tokenizer folder: {reason}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UsageError(f"{path}: needs a tokenizer with a tokenizer.json file")
    if tokenizer.eos_token_id is None:
        raise UsageError(
            f"{path}: the tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json"
        )
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write a tokenizer as a Hugging Face folder."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        tokenizer.save_pretrained(str(directory))
    except Exception as error:
        # The tokenizers library raises a bare Exception with the system's error number in its text.
        if match := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(match[1]), str(error), str(directory)) from None
        raise


def first_token_id(tokenizer: Any) -> int:
    """Id that starts every document: <|bos|>, or the end-of-sequence token where a tokenizer has no other."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt as it begins a document, so that the model continues what it was trained on."""
    ids = tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [first_token_id(tokenizer), *ids]


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of documents, each between its first token and <|eos|>.

    Returns:
        One array a text, uint16 where the vocabulary fits, else uint32.
    """
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True  # "<|eos|>" in a text is seven characters, not the end of it
    dtype = token_dtype(len(tokenizer))
    first, last = first_token_id(tokenizer), tokenizer.eos_token_id
    encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array([first, *encoding.ids, last], dtype=dtype) for encoding in encodings]


def decode_documents(tokenizer: PreTrainedTokenizerFast, documents: Sequence[np.ndarray]) -> list[str]:
    """Texts of documents, special tokens left out."""
    ids = [document.tolist() for document in documents]
    return tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=True)


def frame_documents(tokenizer: PreTrainedTokenizerFast, documents: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Token ids of documents that come tokenized, each between its first token and <|eos|>, whether it came with them or not.

    Returns:
        One array a document, uint16 where the vocabulary fits, else uint32.
    """
    dtype = token_dtype(len(tokenizer))
    first, last = first_token_id(tokenizer), tokenizer.eos_token_id
    framed: list[np.ndarray] = []
    for ids in documents:
        begin = 1 if len(ids) and ids[0] == first else 0
        end = len(ids) - 1 if len(ids) > begin and ids[-1] == last else len(ids)
        framed.append(np.array([first, *ids[begin:end].tolist(), last], dtype=dtype))
    return framed


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Smallest unsigned type that the corpus uses for ids below `vocab_size`."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
