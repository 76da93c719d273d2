"""Scorers of lm-evaluation-harness, an optional package, for responses that exist already.

Its task definitions are read from the installed package; its models, its data sets and the network are not touched.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlprior.config import UsageError
from rlprior.tasks.benchmarks.prompts import gold_letter
from rlprior.tasks.benchmarks.sources import Record
from rlprior.tasks.problem import LETTERS

PACKAGE = "lm_eval"
NO_MATCH = "[invalid]"
"""What its regular-expression filter extracts where nothing matches."""

TASK_FILES = {
    "gsm8k": {"gsm8k": "gsm8k/gsm8k.yaml", "gsm8k_cot": "gsm8k/gsm8k-cot.yaml"},
    "mmlu": {"mmlu_flan_cot_fewshot": "mmlu/flan_cot_fewshot/_mmlu_flan_cot_fewshot_template_yaml"},
}
"""Of each benchmark, its tasks that score the same responses, and where the package defines them; MMLU's is the template of all subjects."""


def require_harness() -> str:
    """Version of lm-evaluation-harness.

    Raises:
        UsageError: it is not installed.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise UsageError(
            "the cross-check needs lm-evaluation-harness; install it with: pip install 'rlprior[harness]'"
        )
    return importlib.metadata.version(PACKAGE)


@dataclass(frozen=True)
class Score:
    """What a filter extracted from one response, and whether the task's metric finds it right."""

    extracted: str
    is_correct: bool


@dataclass(frozen=True)
class Filter:
    """A way of a task's to extract an answer.

    Attributes:
        name: as its definition calls it.
        pattern: regular expression of its first step.
        takes_last: the last match counts, not the first.
    """

    name: str
    pattern: re.Pattern[str]
    takes_last: bool

    def matches(self, text: str) -> list[re.Match[str]]:
        """All matches, the one that counts last."""
        found = list(self.pattern.finditer(text))
        return found if self.takes_last else found[::-1]


def make_task(name: str, file: str, documents: Sequence[Mapping[str, Any]], **settings: Any) -> Any:
    """One of its `ConfigurableTask`s on given documents, without worked examples.

    Args:
        name: of the task.
        file: its definition, below the package's `tasks`.
        documents: at least one; fields as in `make_document`.
        settings: replace the definition's.
    """
    import datasets
    from lm_eval.api.task import ConfigurableTask

    # it warns at each set of documents that is handed over
    logging.getLogger("lm_eval.api.task").setLevel(logging.ERROR)
    definition = read_definition(file)
    no_examples = dict.fromkeys(("training_split", "validation_split", "fewshot_split", "fewshot_config"))
    table = datasets.Dataset.from_list([dict(document) for document in documents])
    return ConfigurableTask(
        config={
            **definition,
            **no_examples,
            "task": name,
            "num_fewshot": 0,
            "custom_dataset": lambda **_: {definition["test_split"]: table},
            **settings,
        }
    )


def read_definition(file: str) -> dict[str, Any]:
    """A task's definition, a file below the package's `tasks`."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    return yaml.safe_load((Path(spec.origin).parent / "tasks" / file).read_text(encoding="utf-8"))


class HarnessTask:
    """What of one of its tasks scores a response: filters, stop strings, gold answers and metric.

    Args:
        name, file: as of `make_task`.
        example: a document, from which the task learns the names of the fields.
    """

    def __init__(self, name: str, file: str, example: Mapping[str, Any]) -> None:
        definition = read_definition(file)
        self._task = make_task(name, file, [example])
        self.name = name
        self.version = str(definition["metadata"]["version"])
        self.filters = [
            Filter(
                one["name"],
                re.compile(one["filter"][0]["regex_pattern"]),
                one["filter"][0].get("group_select", 0) == -1,
            )
            for one in definition["filter_list"]
        ]
        self._stops: list[str] = definition["generation_kwargs"]["until"]

    def cut(self, text: str) -> str:
        """What its models return of a response: the text before the first of the task's stop strings."""
        from lm_eval.models.utils import postprocess_generated_text

        return postprocess_generated_text(text, self._stops, None)

    def gold(self, document: Mapping[str, Any]) -> str:
        """Its gold answer."""
        return str(self._task.doc_to_target(document))

    def score(
        self, documents: Mapping[str, Mapping[str, Any]], responses: Sequence[tuple[str, str]]
    ) -> dict[str, list[Score]]:
        """Each filter's scores, every response by itself.

        Args:
            documents: by their ids.
            responses: of each, the id of the document that it answers, and its text.
        """
        from lm_eval.api.instance import Instance

        instances = [
            Instance("generate_until", dict(documents[document_id]), ("", {}), index, resps=[text])
            for index, (document_id, text) in enumerate(responses)
        ]
        self._task._instances = instances
        self._task.apply_filters()
        # samples repeat each other, and the metric takes most of a millisecond
        is_correct = functools.cache(
            lambda document_id, extracted: self._is_correct(documents[document_id], extracted)
        )
        scores: dict[str, list[Score]] = {}
        for one in self.filters:
            extracted: list[str] = [instance.filtered_resps[one.name] for instance in instances]
            scores[one.name] = [
                Score(text, is_correct(document_id, text))
                for (document_id, _), text in zip(responses, extracted, strict=True)
            ]
        return scores

    def _is_correct(self, document: Mapping[str, Any], extracted: str) -> bool:
        return bool(self._task.process_results(dict(document), [extracted])["exact_match"] == 1)


def load_tasks(benchmark: str, example: Mapping[str, Any]) -> list[HarnessTask]:
    """Its tasks for a benchmark of `TASK_FILES`."""
    return [HarnessTask(name, file, example) for name, file in TASK_FILES[benchmark].items()]


def make_document(benchmark: str, record: Record) -> dict[str, Any]:
    """A record of a benchmark with the fields of the data set that its tasks read.

    >>> record = Record({"subject": "anatomy", "question": "Which?", "choices": ["a", "b"], "answer": "B"}, "file:1")
    >>> make_document("mmlu", record)["answer"]
    1
    """
    document = {"question": record.text("question"), "answer": record["answer"]}
    if benchmark == "mmlu":
        choices = record.texts("choices")
        letter = gold_letter(record, "answer", LETTERS[: len(choices)])
        document |= {"choices": list(choices), "answer": LETTERS.index(letter)}
    return document
