"""What a corpus is made of."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from string import Formatter
from typing import Literal

from rlprior.config import HOW
from rlprior.tasks.config import TaskConfig

SourceKind = Literal[
    "embedded_english", "embedded_code", "problems", "text", "jsonl", "parquet", "hub", "megatron"
]
_KINDS_WITH_PATH = ("text", "jsonl", "parquet", "hub", "megatron")
_KINDS_WITH_FIELDS = ("jsonl", "parquet", "hub")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A byte-level BPE trained on the corpus, or an existing one.

    Attributes:
        vocab_size: entries at most, three special tokens and the 256 bytes included.
        path: existing Hugging Face tokenizer folder, relative to the data directory; None trains one.
        max_training_bytes: of text, shared equally between the sources.
    """

    vocab_size: int = 4096
    path: str | None = None
    max_training_bytes: int = 50_000_000

    def __post_init__(self) -> None:
        if self.vocab_size < 259:
            raise ValueError(
                f"vocab_size = {self.vocab_size} must be at least 259: 256 bytes and 3 special tokens"
            )
        if self.max_training_bytes < 1:
            raise ValueError(f"max_training_bytes = {self.max_training_bytes} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of documents; mixtures weigh sources by name.

    Attributes:
        name: letters, digits, `_`, `-` and `.`; a folder of the corpus.
        kind: where the documents come from.
        path: file or glob relative to the data directory (of kind `megatron`, the `.idx` files), or the data set's id on the hub.
        template: text of a document from a record's fields, for kinds with records.
        strip_pattern: regular expression removed from every document, `<<[^>]*>>` for GSM8K.
        document_start: for kind `text`, a regular expression (multi-line) at whose matches a document starts; None makes a
            document of each file. `^ = [^=].* = $` fits WikiText's articles.
        held_out: `hash` holds out a fixed share of documents, `all` every one (evaluation only), `none` none.
        max_document_bytes: split longer documents at line ends into pieces of at most so many bytes (a longer line is a piece by
            itself). All pieces of a document are on one side of the split; of a held-out one only the first is kept, so that
            held-out documents are independent and none outweighs the rest.
        max_bytes: stop after the document that reaches so many bytes of text; None for all.
        problems: which problems, for kind `problems`.
        num_problems: how many generated problems to train on, repetition allowed, and `held_out_fraction` of that many to hold
            out; None for all of a problem file.
        hub_subset: configuration of a data set on the hub.
        hub_split: its split.
    """

    name: str
    kind: SourceKind
    path: str | None = None
    template: str = "{text}"
    strip_pattern: str | None = None
    document_start: str | None = None
    held_out: Literal["hash", "all", "none"] = "hash"
    max_document_bytes: int | None = None
    max_bytes: int | None = None
    problems: TaskConfig | None = None
    num_problems: int | None = None
    hub_subset: str | None = None
    hub_split: str = "train"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name):
            raise ValueError(f"name = {self.name!r} must be letters, digits, '_', '-' and '.'")
        if (self.path is None) == (self.kind in _KINDS_WITH_PATH):
            raise ValueError(
                f"path {'is missing; add it' if self.path is None else 'is not used; remove it'} for kind {self.kind!r}"
            )
        if (self.problems is None) == (self.kind == "problems"):
            raise ValueError("problems belongs to kind 'problems', and that kind needs it")
        generated = self.problems is not None and self.problems.kind == "synthetic"
        if generated != (self.num_problems is not None):
            raise ValueError("num_problems belongs to generated problems, and those need it")
        for name in ("max_document_bytes", "max_bytes", "num_problems"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value} must be at least 1")
        for name in ("strip_pattern", "document_start"):
            _check_pattern(name, getattr(self, name))
            if self.kind == "megatron" and getattr(self, name) is not None:
                raise ValueError(f"{name} changes the text, and kind 'megatron' has token ids; remove it")
        if self.kind == "megatron" and self.max_document_bytes is not None:
            raise ValueError("max_document_bytes cuts the text, and kind 'megatron' has token ids; remove it")
        if self.kind in _KINDS_WITH_FIELDS:
            template_fields(self.template)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A tokenizer and the sources that are tokenized with it.

    Attributes:
        sources: at least one, with different names.
        tokenizer: trained on the sources' training documents.
        held_out_fraction: share of documents that `held_out = "hash"` holds out, by a hash of the text.
        seed: of generated problems.
        data_dir: what relative paths are relative to; None for the working directory.
        num_workers: processes that tokenize, beside the one that reads and writes; 1 for that one alone, with the tokenizer's own
            threads. The corpus is the same for any number.
    """

    sources: tuple[SourceConfig, ...]
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    held_out_fraction: float = 0.05
    seed: int = 0
    data_dir: str | None = None
    num_workers: int = field(default=1, metadata=HOW)

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if not names:
            raise ValueError("sources is empty; add at least one source")
        if len(set(names)) < len(names):
            raise ValueError(f"sources has one name twice: {', '.join(sorted(names))}")
        if not 0 < self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction = {self.held_out_fraction} must be between 0 and 1")
        if self.num_workers < 1:
            raise ValueError(f"num_workers = {self.num_workers} must be at least 1")
        if self.tokenizer.path is None and (given := [s.name for s in self.sources if s.kind == "megatron"]):
            raise ValueError(f"source {given[0]!r} has token ids; name their tokenizer in tokenizer.path")


def template_fields(template: str) -> tuple[str, ...]:
    """Names of the fields that a template uses.

    Raises:
        ValueError: a broken template, one without fields, or one that reaches into a field.

    >>> template_fields("Q: {question}\\nA: {answer}")
    ('question', 'answer')
    """
    try:
        parts = [
            (name, spec, conversion)
            for _, name, spec, conversion in Formatter().parse(template)
            if name is not None
        ]
    except ValueError as error:
        raise ValueError(f"template = {template!r}: {error}") from None
    if not parts or any(not name.isidentifier() or spec or conversion for name, spec, conversion in parts):
        raise ValueError(
            f"template = {template!r} must name fields as {{field}}; write {{{{ and }}}} for braces"
        )
    return tuple(name for name, _, _ in parts)


def _check_pattern(name: str, pattern: str | None) -> None:
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise ValueError(f"{name} = {pattern!r} is not a regular expression: {error}") from None
