"""A page to read samples in: one HTML file that needs nothing else.

Everything that a model or a data set wrote is data: JSON that the page's script puts on the screen as text, never as markup, and a
content security policy that runs that one script alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jinja2

from rlprior.runs.files import disk_errors, write_atomically
from rlprior.sampling.pools import GradedSample, Pool
from rlprior.tasks.problem import Status

MAX_RESPONSES = 16
"""Different responses to a question on the page; the first of every other verdict is added."""
MAX_VOTES = 8
"""Answers shown of a question's vote."""
MAX_TEXT_CHARACTERS = 6000
"""Of a response or prompt: the middle of a longer one is left out."""
MAX_TEXT_BYTES = 5_000_000
"""Of all questions with their samples; with what `rlprior.reports.coloring` adds it keeps the page below 10 MB."""


@dataclass
class Card:
    """A question of one store as the page shows it, equal responses once.

    Attributes:
        pool: where it is from.
        problem_id: which question.
        samples: the first sample of each response that is shown.
        data: what the page's script reads; `data["samples"]` are `samples` in order.
    """

    pool: Pool
    problem_id: str
    samples: list[GradedSample]
    data: dict[str, Any]


@dataclass
class Page:
    """What is on the page, and what had to be left out.

    Attributes:
        cards: questions in reading order: the last step first, task by task.
        prefixes: text that the prompts of a part of a task begin with; cards point to them.
        num_questions: in all stores that were looked at.
        model, against: who says what the tokens' colours are, and with whom it is compared.
        notes: what a reader should know, a sentence each.
    """

    cards: list[Card] = field(default_factory=list)
    prefixes: list[Any] = field(default_factory=list)
    num_questions: int = 0
    model: str | None = None
    against: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def num_samples(self) -> int:
        """Samples on the page."""
        return sum(len(one["indices"]) for card in self.cards for one in card.data["samples"])


def write_page(page: Page, pools: Sequence[Pool], output: Path, *, title: str) -> None:
    """Write the page as one HTML file.

    Args:
        page: what is on it.
        pools: the run's stores, all of whose samples the table at its top counts.
        output: the file.
        title: what the run is called.

    Raises:
        RunError: the disk is full.
    """
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, _render(page, pools, title))


def collect(pools: Sequence[Pool], max_questions: int) -> Page:
    """Choose what is shown, the stores of a step in equal shares until the page is full."""
    page = Page(num_questions=sum(len(pool.answers) for pool in pools))
    shared = {id(pool): _shared_prefixes(pool) for pool in pools}
    prefix_places: dict[str, int] = {}
    num_bytes = 0
    for pool, problem_id in _in_turn(pools, max_questions):
        prefix = shared[id(pool)].get(_group(pool, problem_id), "")
        card = _card(pool, problem_id, prefix)
        if prefix:
            if prefix not in prefix_places:
                prefix_places[prefix] = len(page.prefixes)
                page.prefixes.append(_shorten(prefix))
                num_bytes += len(encode_data(page.prefixes[-1]))
            card.data["prefix"] = prefix_places[prefix]
        num_bytes += len(encode_data(card.data))
        if num_bytes > MAX_TEXT_BYTES:
            break
        page.cards.append(card)
    order = [(id(pool), problem_id) for pool in _last_step_first(pools) for problem_id in pool.answers]
    places = {key: place for place, key in enumerate(order)}
    page.cards.sort(key=lambda card: places[id(card.pool), card.problem_id])
    page.notes.extend(_left_out(page, pools))
    return page


def _left_out(page: Page, pools: Sequence[Pool]) -> Iterator[str]:
    """What is not on the page, a sentence each."""
    if len(page.cards) < page.num_questions:
        yield (
            f"Shown are {len(page.cards):,} of {page.num_questions:,} questions, the first of each task and of each of its parts."
        )
    if any(card.data["num_responses"] > len(card.samples) for card in page.cards):
        yield (
            f"Of a question with more than {MAX_RESPONSES} different responses the first {MAX_RESPONSES} are shown, and the first of every "
            "other verdict; its accuracy and vote are of all."
        )
    without = sorted({pool.task for pool in pools if not pool.questions})
    if without:
        yield f"The questions of {', '.join(without)} were not kept with the samples: only their ids are shown."
    ungraded = sorted({pool.task for pool in pools if pool.grader is None})
    if ungraded:
        yield f"Not graded yet: {', '.join(ungraded)}."


def _last_step_first(pools: Sequence[Pool]) -> list[Pool]:
    return sorted(pools, key=lambda pool: (-(pool.step or 0), pool.task))


def _in_turn(pools: Sequence[Pool], max_questions: int) -> Iterator[tuple[Pool, str]]:
    """The first questions of each store of a step, then the second ones, and so on; the last step first."""
    ordered = _last_step_first(pools)
    for step in dict.fromkeys(pool.step for pool in ordered):
        queues = [
            [(pool, problem_id) for problem_id in _by_turns(pool)[:max_questions]]
            for pool in ordered
            if pool.step == step
        ]
        for turn in zip_longest(*queues):
            yield from (one for one in turn if one is not None)


def _by_turns(pool: Pool) -> list[str]:
    """Problems of a store, the first of each group before the second of any."""
    counts: Counter[str] = Counter()
    turns: list[tuple[int, str]] = []
    for problem_id in pool.answers:
        group = _group(pool, problem_id)
        turns.append((counts[group], problem_id))
        counts[group] += 1
    return [problem_id for _, problem_id in sorted(turns, key=lambda one: one[0])]


def _group(pool: Pool, problem_id: str) -> str:
    question = pool.questions.get(problem_id)
    return question.group if question else ""


def _shared_prefixes(pool: Pool) -> dict[str, str]:
    """What all prompts of a group begin with, by group: instructions and worked examples, up to an empty line or a line's end."""
    prompts: dict[str, list[str]] = {}
    for question in pool.questions.values():
        prompts.setdefault(question.group, []).append(question.prompt)
    shared: dict[str, str] = {}
    for group, texts in prompts.items():
        prefix = _common_prefix(min(texts), max(texts)) if len(texts) > 1 else ""
        for end in ("\n\n", "\n"):
            if end in prefix:
                shared[group] = prefix[: prefix.rindex(end) + len(end)]
                break
    return shared


def _common_prefix(first: str, second: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    return first[:length] if length is not None else min(first, second, key=len)


def choose(samples: Sequence[GradedSample], count: int) -> list[GradedSample]:
    """The first `count` samples, and of the others the first of every verdict, of those cut, and of those disputed."""
    chosen: list[GradedSample] = []
    seen: set[tuple[str, bool, bool]] = set()
    for one in samples:
        kind = (one.status, one.is_truncated, one.is_disputed)
        if len(chosen) < count or kind not in seen:
            chosen.append(one)
        seen.add(kind)
    return chosen


def _card(pool: Pool, problem_id: str, prefix: str) -> Card:
    samples = pool.answers[problem_id]
    question = pool.questions.get(problem_id)
    responses = _equal_responses(samples)
    shown = choose([equal[0] for equal in responses], MAX_RESPONSES)
    equal_to = {id(equal[0]): equal for equal in responses}
    votes = Counter(
        (one.grade.extracted, one.status) for one in samples if one.grade and one.grade.extracted is not None
    )
    data = {
        "task": pool.task,
        "step": pool.step,
        "id": problem_id,
        "group": question.group if question else "",
        "prompt": _shorten(question.prompt.removeprefix(prefix)) if question else None,
        "answer": _shorten(question.answer) if question else None,
        "m": len(samples),
        "statuses": dict(Counter(one.status for one in samples)),
        "votes": [
            [_shorten(answer), status, count] for (answer, status), count in votes.most_common(MAX_VOTES)
        ],
        "num_answers": len(votes),
        "num_responses": len(responses),
        "samples": [_sample_data(equal_to[id(one)]) for one in shown],
    }
    return Card(pool, problem_id, shown, data)


def _equal_responses(samples: Sequence[GradedSample]) -> list[list[GradedSample]]:
    """Samples of one text and one verdict together, in the order of the first of each."""
    equal: dict[Any, list[GradedSample]] = {}
    for one in samples:
        verdict = one.grade and (one.grade.status, one.grade.extracted, one.grade.second_status)
        equal.setdefault((one.sample.text, one.is_truncated, verdict), []).append(one)
    return list(equal.values())


def _sample_data(equal: Sequence[GradedSample]) -> dict[str, Any]:
    one = equal[0]
    data: dict[str, Any] = {
        "indices": [each.sample.sample_index for each in equal],
        "status": one.status,
        "num_tokens": one.sample.num_tokens,
        "log_prob": round(one.sample.log_prob_nats, 2),
        "text": _shorten(one.sample.text),
    }
    if one.grade and one.grade.extracted is not None:
        data["extracted"] = _shorten(one.grade.extracted)
    if one.is_truncated:
        data["truncated"] = True
    if one.grade and one.grade.is_disputed:
        data["second"] = one.grade.second_status
    return data


def _shorten(text: str) -> str | list[Any]:
    """The text, or of a long one the beginning, the number of characters left out, and the end."""
    if len(text) <= MAX_TEXT_CHARACTERS:
        return text
    head, tail = MAX_TEXT_CHARACTERS // 3, MAX_TEXT_CHARACTERS - MAX_TEXT_CHARACTERS // 3
    return [text[:head], len(text) - head - tail, text[-tail:]]


def encode_data(data: Any) -> str:
    """JSON that can stand inside a script element: no `<`, `>` or `&`, and ASCII alone."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _render(page: Page, pools: Sequence[Pool], title: str) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rlprior.reports", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    loader = environment.loader
    assert loader is not None
    script = loader.get_source(environment, "samples.js")[0]
    data = {
        "cards": [card.data for card in page.cards],
        "prefixes": page.prefixes,
        "model": page.model,
        "against": page.against,
    }
    return environment.get_template("samples.html.j2").render(
        title=_printable(title),
        stores=[_store_row(pool, page) for pool in _last_step_first(pools)],
        notes=[_printable(note) for note in page.notes],
        num_questions=len(page.cards),
        num_samples=page.num_samples,
        is_colored=page.model is not None,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=encode_data(data),
    )


def _store_row(pool: Pool, page: Page) -> dict[str, Any]:
    samples = list(pool.samples)
    total = max(1, len(samples))
    statuses = Counter(one.status for one in samples)
    return {
        "task": _printable(pool.task),
        "step": pool.step,
        "num_questions": len(pool.answers),
        "num_shown": sum(card.pool is pool for card in page.cards),
        "num_samples": len(samples),
        "correct": statuses[Status.CORRECT] / total,
        "unparsable": statuses[Status.UNPARSABLE] / total,
        "truncated": sum(one.is_truncated for one in samples) / total,
        "num_disputed": sum(one.is_disputed for one in samples),
        "decoding": ", ".join(
            f"{name.replace('_', ' ')} {_printable(str(value))}" for name, value in pool.decoding.items()
        ),
        "grader": _printable(pool.grader or "none"),
    }


def _printable(text: str) -> str:
    """Characters that steer the display rather than being read, as their code points."""
    return "".join(c if c.isprintable() else f"U+{ord(c):04X}" for c in text)
