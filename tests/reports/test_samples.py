"""The page of samples: what is chosen, that hostile text stays text, and that a browser shows it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Generator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.evaluation.sampled_run import Answer, plain_scores, question, write_model, write_pool
from tests.reports.headless_browser import Page as OpenPage
from tests.reports.headless_browser import find_browser, headless_browser

from rlprior.cli import main
from rlprior.config import UsageError
from rlprior.data.tokenizer import encode_prompt
from rlprior.models.causal_lm import load_model, load_tokenizer
from rlprior.reports import coloring
from rlprior.reports import samples as browser
from rlprior.reports.coloring import color_tokens
from rlprior.reports.samples import collect, encode_data, write_page
from rlprior.sampling.answers import answer_problems
from rlprior.sampling.pools import Pool, find_stores, read_pool
from rlprior.sampling.sampler import Decoding
from rlprior.tasks.problem import Problem

HOSTILE = [
    "</script><script>document.title = 'owned'</script>",
    "<!--<script>",
    "<img src=x onerror=\"document.title = 'owned'\">",
    "{{ 7 * 7 }} {% raw %}",
    "\u202egnorw\u2066 \u0000\u001b[31m\u2028\u2029\ufeff",
    "half \ud83d and \udc00 of a pair",
    "&lt;b&gt; & \" ' ` ${document.title = 'owned'}",
]


class Elements(HTMLParser):
    """Tags of a page, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.policy = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        if tag == "script":
            self.scripts.append((found, ""))
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"] or ""

    def handle_endtag(self, tag: str) -> None:
        self.tags.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["script"]:
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)


def page_data(path: Path) -> dict[str, Any]:
    return json.loads(Elements(path.read_text()).scripts[0][1])


def numbered(run: Path, name: str, num_questions: int, **texts: Any) -> Pool:
    answers = {f"{name}{n}": [Answer(f"{n}", **texts)] for n in range(num_questions)}
    return read_pool(write_pool(run, name, answers, {one: question(f"Q: {one}\nA:") for one in answers}))


# What is chosen


def test_a_card_counts_all_samples_and_shows_equal_ones_once(tmp_path: Path) -> None:
    right = Answer(" 4", "correct", "4")
    group = [
        right,
        Answer(" 5", "wrong", "5"),
        right,
        Answer(" four", "unparsable"),
        Answer(" 4", "wrong", "4"),
        right,
    ]
    pool = read_pool(write_pool(tmp_path, "sums", {"p": group}, {"p": question("Q: 2+2\nA:", group="easy")}))
    page = collect([pool], 10)
    (card,) = page.cards
    assert (card.data["prompt"], card.data["answer"], card.data["group"], card.data["m"]) == (
        "Q: 2+2\nA:",
        "4",
        "easy",
        6,
    )
    assert card.data["statuses"] == {"correct": 3, "wrong": 2, "unparsable": 1}
    assert card.data["votes"] == [["4", "correct", 3], ["5", "wrong", 1], ["4", "wrong", 1]]
    shown = [
        (one["indices"], one["text"], one["status"], one.get("extracted")) for one in card.data["samples"]
    ]
    assert shown == [
        ([0, 2, 5], " 4", "correct", "4"),
        ([1], " 5", "wrong", "5"),
        ([3], " four", "unparsable", None),
        ([4], " 4", "wrong", "4"),
    ]
    assert page.num_samples == 6
    assert page.notes == []


def test_a_rare_verdict_is_shown_however_late(tmp_path: Path) -> None:
    group = [Answer(f"{n}", "wrong", f"{n}") for n in range(40)]
    group[30] = Answer("thirty", "correct", "30")
    group[31] = Answer("thirty-one", "correct", "31")
    group[35] = Answer("cut", "truncated")
    group[38] = Answer("x", "wrong", "38", second_status="correct")
    page = collect([read_pool(write_pool(tmp_path, "sums", {"p": group}))], 10)
    shown = [one["indices"][0] for one in page.cards[0].data["samples"]]
    assert shown == [*range(browser.MAX_RESPONSES), 30, 35, 38]
    assert page.cards[0].data["samples"][-1]["second"] == "correct"
    assert page.cards[0].data["samples"][-2]["truncated"]
    assert page.cards[0].data["num_answers"] == 39
    assert len(page.cards[0].data["votes"]) == browser.MAX_VOTES
    assert any("more than 16 different responses" in note for note in page.notes)


def test_questions_come_by_task_with_the_last_step_first(tmp_path: Path) -> None:
    pools = [numbered(tmp_path, name, 3) for name in ("b-00000400", "a-00000400", "a-00000800")]
    page = collect(pools, 2)
    assert [(card.pool.task, card.pool.step, card.problem_id) for card in page.cards] == [
        ("a", 800, "a-000008000"),
        ("a", 800, "a-000008001"),
        ("a", 400, "a-000004000"),
        ("a", 400, "a-000004001"),
        ("b", 400, "b-000004000"),
        ("b", 400, "b-000004001"),
    ]
    assert "Shown are 6 of 9 questions, the first of each task and of each of its parts." in page.notes


def test_every_part_of_a_task_is_shown(tmp_path: Path) -> None:
    """A benchmark that lies subject by subject would be its first subject."""
    subjects = {"algebra": 10, "law": 2, "physics": 10}
    questions = {
        f"{subject}{n}": question(f"{n}?", group=subject)
        for subject, size in subjects.items()
        for n in range(size)
    }
    pool = read_pool(write_pool(tmp_path, "mmlu", {one: [Answer("A")] for one in questions}, questions))
    shown = [card.problem_id for card in collect([pool], 8).cards]
    assert shown == ["algebra0", "algebra1", "algebra2", "law0", "law1", "physics0", "physics1", "physics2"]


def test_a_full_page_is_shared_by_the_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pools = [numbered(tmp_path, name, 50) for name in ("a", "b")]
    whole = collect(pools, 50)
    num_bytes = sum(len(encode_data(card.data)) for card in whole.cards)
    monkeypatch.setattr(browser, "MAX_TEXT_BYTES", num_bytes // 2)
    page = collect(pools, 50)
    counts = [sum(card.pool is pool for card in page.cards) for pool in pools]
    assert abs(counts[0] - counts[1]) <= 1
    assert 40 <= sum(counts) <= 50
    assert any("of 100 questions" in note for note in page.notes)


def test_what_prompts_share_is_kept_once_and_apart(tmp_path: Path) -> None:
    shots = {"": "Q: 1+1\nA: 2\n\nQ: 1+2\nA: 3\n\n", "words": "Read.\n"}
    questions = {f"p{n}": question(f"{shots['']}Q: {n}+2\nA:") for n in range(3)}
    questions |= {f"w{n}": question(f"{shots['words']}{n}?", group="words") for n in range(2)}
    questions["one"] = question("Alone.\n\nQ: 1\nA:", group="alone")
    answers = {one: [Answer("4")] for one in questions}
    page = collect([read_pool(write_pool(tmp_path, "sums", answers, questions))], 10)
    assert page.prefixes == list(shots.values())
    found = [(card.data.get("prefix"), card.data["prompt"]) for card in page.cards]
    assert found == [
        (0, "Q: 0+2\nA:"),
        (0, "Q: 1+2\nA:"),
        (0, "Q: 2+2\nA:"),
        (1, "0?"),
        (1, "1?"),
        (None, "Alone.\n\nQ: 1\nA:"),
    ]


def test_long_text_keeps_its_ends(tmp_path: Path) -> None:
    text = "".join(f"{n:05}" for n in range(4000))
    page = collect(
        [read_pool(write_pool(tmp_path, "sums", {"p": [Answer(text)]}, {"p": question(text)}))], 10
    )
    data = page.cards[0].data
    for head, num_left_out, tail in (data["prompt"], data["samples"][0]["text"]):
        assert text.startswith(head)
        assert text.endswith(tail)
        assert len(head) + num_left_out + len(tail) == len(text)
        assert len(head) + len(tail) == browser.MAX_TEXT_CHARACTERS


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    pool = read_pool(write_pool(tmp_path, "sums", {"p": [Answer("4", None)]}))
    page = collect([pool], 10)
    assert page.cards[0].data["prompt"] is None
    assert page.cards[0].data["samples"][0]["status"] == "ungraded"
    assert any("The questions of sums were not kept" in note for note in page.notes)
    assert "Not graded yet: sums." in page.notes


# Hostile text


@given(st.recursive(st.text(alphabet=st.characters(codec=None, exclude_categories=())), st.lists))
def test_data_can_stand_in_a_script_element(data: Any) -> None:
    text = encode_data(data)
    assert not set(text) & set("<>&\u2028\u2029")
    assert text.isascii()
    assert json.loads(text) == data


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A page on which everything that can be named is hostile."""
    ids = [f"p{n}{text}" for n, text in enumerate(HOSTILE)]
    answers = {
        one: [Answer(text, "wrong", text), Answer(text * 60, "truncated")]
        for one, text in zip(ids, HOSTILE, strict=True)
    }
    questions = {
        one: question(f"Shared {HOSTILE[0]}\n\n{text}", text, group=HOSTILE[2])
        for one, text in zip(ids, HOSTILE, strict=True)
    }
    pool = read_pool(write_pool(tmp_path, "a<b>&'\"{{ 1 }}", answers, questions))
    write_page(collect([pool], 100), [pool], tmp_path / "page.html", title=HOSTILE[2] + HOSTILE[4])
    return tmp_path / "page.html"


def test_hostile_text_is_data(hostile: Path) -> None:
    page = Elements(hostile.read_text())
    assert [attributes.get("type") for attributes, _ in page.scripts] == ["application/json", None]
    assert "img" not in page.tags
    digest = base64.b64encode(hashlib.sha256(page.scripts[1][1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.policy
    assert "default-src 'none'" in page.policy
    texts = [card["samples"][0]["text"] for card in page_data(hostile)["cards"]]
    assert texts == HOSTILE
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00\x1b]", hostile.read_text())


def test_the_page_asks_for_nothing(hostile: Path) -> None:
    text = hostile.read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", text.split("<body>")[0])
    assert not re.search(r"@import|url\(|fetch\(|innerHTML|insertAdjacentHTML|document\.write|eval\(", text)


def luminance(colour: list[float]) -> float:
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (one / 255 for one in colour)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_sufficient(hostile: Path, scheme: str) -> None:
    """WCAG AA: 4.5 between text and each background, the deepest colour of a token included."""
    root = re.findall(r":root \{(.*?)\}", hostile.read_text(), flags=re.DOTALL)[scheme == "dark"]
    named = {
        name: [int(code[i : i + 2], 16) for i in (1, 3, 5)]
        for name, code in re.findall(r"--([\w-]+): (#\w{6})", root)
    }
    hues = {
        name: list(map(int, code.split())) for name, code in re.findall(r"--([\w-]+): (\d+ \d+ \d+)", root)
    }
    (deepest,) = re.findall(r"DEEPEST = ([\d.]+)", hostile.read_text())
    backgrounds = [named["page"], named["panel"]]
    pairs = [(text, one) for text in named if text not in ("page", "panel", "line") for one in backgrounds]
    tokens = [
        [float(deepest) * h + (1 - float(deepest)) * p for h, p in zip(hue, named["page"], strict=True)]
        for hue in hues.values()
    ]
    assert len(tokens) == 4
    for text, background in [*pairs, *(("ink", token) for token in tokens)]:
        light, dark = sorted((luminance(named[text]), luminance(background)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, background)


# Colours


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one tokenizer."""
    root = tmp_path_factory.mktemp("models")
    return write_model(root / "one"), write_model(root / "two", seed=1)


def answered(model: Path, run: Path, texts: list[str], num_questions: int = 1) -> Pool:
    """Responses in the model's own tokens, ended by it."""
    tokenizer = load_tokenizer(model)
    group = [
        Answer(
            text, token_ids=(*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
        )
        for text in texts
    ]
    questions = {f"p{n}": question(f"Q: {n}+2\nA:") for n in range(num_questions)}
    return read_pool(write_pool(run, "sums", dict.fromkeys(questions, group), questions))


def test_tokens_carry_what_the_models_say(models: tuple[Path, Path], tmp_path: Path) -> None:
    pool = answered(models[0], tmp_path, [" 4", " naïve\n<b>"])
    page = collect([pool], 10)
    done: list[tuple[str, int, int]] = []
    color_tokens(page, *models, lambda *what: done.append(what))
    assert [one[0] for one in done if one[1] == one[2]] == ["tokens under one", "tokens under two"]
    write_page(page, [pool], tmp_path / "page.html", title="x")
    data = page_data(tmp_path / "page.html")
    assert (data["model"], data["against"]) == ("one", "two")
    tokenizer = load_tokenizer(models[0])
    prompt_ids = encode_prompt(tokenizer, "Q: 0+2\nA:")
    for shown, one in zip(data["cards"][0]["samples"], pool.samples, strict=True):
        tokens = shown["tokens"]
        assert tuple(tokens["ids"]) == one.sample.token_ids
        assert "".join(tokens["pieces"]) == one.sample.text + "<|eos|>"
        log_probs, entropies = plain_scores(load_model(models[0]), prompt_ids, one.sample.token_ids)
        others, _ = plain_scores(load_model(models[1]), prompt_ids, one.sample.token_ids)
        # three decimals are written
        assert tokens["log_prob"] == pytest.approx(log_probs, abs=1e-3)
        assert tokens["entropy"] == pytest.approx(entropies, abs=1e-3)
        assert tokens["other"] == pytest.approx(others, abs=1e-3)
    assert any("Tokens are coloured by" in note for note in page.notes)


def test_the_model_that_sampled_says_again_what_it_said(models: tuple[Path, Path], tmp_path: Path) -> None:
    """At temperature 1 without a nucleus the tokens' log-probabilities add up to what the sampler kept of the response."""
    problems = [
        Problem(id=f"p{n}", task="t", difficulty=1, prompt=f"Q: {n}+2\nA:", solution="", answer="4")
        for n in range(3)
    ]
    answer_problems(
        load_model(models[0]),
        load_tokenizer(models[0]),
        problems,
        name="sums",
        path=tmp_path / "samples" / "sums.jsonl",
        model_identity="m",
        samples_per_problem=4,
        decoding=Decoding(temperature=1.0, top_p=1.0, max_new_tokens=12),
        seed=0,
        progress=lambda _: None,
    )
    pool = read_pool(*find_stores(tmp_path))
    assert [pool.questions[one.id].prompt for one in problems] == [one.prompt for one in problems]
    page = collect([pool], 10)
    color_tokens(page, models[0])
    shown = [
        (one, data)
        for card in page.cards
        for one, data in zip(card.samples, card.data["samples"], strict=True)
    ]
    assert len(shown) == 12
    for one, data in shown:
        # each of up to 12 numbers is rounded to three decimals
        assert sum(data["tokens"]["log_prob"]) == pytest.approx(one.sample.log_prob_nats, abs=0.01)


def test_only_the_first_questions_and_tokens_are_scored(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("QUESTIONS", 3), ("RESPONSES", 2), ("TOKENS", 4)):
        monkeypatch.setattr(coloring, f"MAX_SCORED_{name}", value)
    page = collect([answered(models[0], tmp_path, [" 4", " 5", " 6666666"], num_questions=5)], 10)
    color_tokens(page, models[0])
    scored = [["tokens" in one for one in card.data["samples"]] for card in page.cards]
    assert scored == [[True, True, False]] * 3 + [[False] * 3] * 2
    lengths = {len(one["tokens"]["ids"]) for card in page.cards[:3] for one in card.data["samples"][:2]}
    assert max(lengths) <= 4
    assert all("other" not in one["tokens"] for card in page.cards[:3] for one in card.data["samples"][:2])


def test_scores_keep_to_their_room(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = collect([answered(models[0], tmp_path, [" 4", " 5 + \u202e"], num_questions=20)], 20)
    monkeypatch.setattr(coloring, "MAX_SCORE_BYTES", 5000)
    color_tokens(page, *models)
    added = [
        len(encode_data(one["tokens"]))
        for card in page.cards
        for one in card.data["samples"]
        if "tokens" in one
    ]
    assert 2500 < sum(added) <= 5000


def test_all_that_a_page_may_hold_is_below_ten_megabytes(hostile: Path) -> None:
    frame = len(hostile.read_bytes()) - len(encode_data(page_data(hostile)))
    assert frame < 60_000
    assert frame + browser.MAX_TEXT_BYTES + coloring.MAX_SCORE_BYTES < 10_000_000


def refused(page: browser.Page, *models: Path) -> str:
    with pytest.raises(UsageError) as error:
        color_tokens(page, *models)
    assert all("tokens" not in one for card in page.cards for one in card.data["samples"])
    return str(error.value)


def test_models_of_other_tokens_are_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    page = collect([answered(models[0], tmp_path, [" the answer"])], 10)
    other = write_model(tmp_path / "other", texts=["apples and pears", "pears"])
    assert "differences of tokens need one tokenizer, and " in refused(page, models[0], other)
    assert "reads other text in the tokens of" in refused(page, other)
    assert "other text" not in refused(page, tmp_path)


def test_without_questions_there_is_nothing_to_score(models: tuple[Path, Path], tmp_path: Path) -> None:
    page = collect([read_pool(write_pool(tmp_path, "sums", {"p": [Answer("4")]}))], 10)
    assert "no token can be coloured: this run kept no questions" in refused(page, models[0])


# The command


def test_the_command_writes_page_and_table(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answered(models[0], tmp_path / "run", [" 4", " 5"], num_questions=2)
    numbered(tmp_path / "run", "words", 2)
    assert main(["samples", str(tmp_path / "run")]) == 0
    out = tmp_path / "run" / "samples.html"
    assert capsys.readouterr().out == f"page: {out} (6 samples of 4 questions)\n"
    assert page_data(out)["model"] is None
    table, named = tmp_path / "x.parquet", tmp_path / "new" / "x.html"
    arguments = [
        "--task",
        "sums",
        "--model",
        str(models[0]),
        "--against",
        str(models[1]),
        "--max-questions",
        "1",
    ]
    assert (
        main(["samples", str(tmp_path / "run"), *arguments, "--out", str(named), "--parquet", str(table)])
        == 0
    )
    assert (
        capsys.readouterr().out == f"table: {table} (4 samples)\npage: {named} (2 samples of 1 questions)\n"
    )
    assert "tokens" in page_data(named)["cards"][0]["samples"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-questions", "0"], "--max-questions must be at least 1"),
        (["--against", "x"], "--against needs --model"),
        (["--task", "other"], "no samples of 'other'; there are words"),
        (["--model", "nowhere"], "nowhere: "),
        (["--a.b=1"], "'rlprior samples' has no settings"),
    ],
)
def test_mistakes_are_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    numbered(tmp_path, "words", 1)
    assert main(["samples", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "samples.html").exists()


# In a browser


@pytest.fixture
def open_page(tmp_path: Path) -> Generator[Callable[..., OpenPage]]:
    found = find_browser()
    if found is None:
        pytest.skip("no Chromium on this machine")
    with headless_browser(found, tmp_path / "profile") as page:

        def start(path: Path, *, dark: bool = False) -> OpenPage:
            page.open(path.as_uri(), dark=dark)
            return page

        yield start


def act(page: OpenPage, statement: str) -> Any:
    """Run a statement; what it throws fails the test."""
    return page.evaluate(f"(() => {{{statement}}})() ?? null")


def press(page: OpenPage, key: str) -> None:
    page.evaluate(
        f"document.dispatchEvent(new KeyboardEvent('keydown', {{key: {json.dumps(key)}, bubbles: true}}))"
    )


def choose_option(page: OpenPage, control: str, value: str) -> None:
    page.evaluate(
        f"{{const one = document.getElementById({json.dumps(control)}); one.value = {json.dumps(value)};"
        "one.dispatchEvent(new Event(one.type === 'search' ? 'input' : 'change'))}"
    )


def counts(page: OpenPage) -> tuple[int, int]:
    """Cards and responses on the screen."""
    return page.evaluate("document.querySelectorAll('.card').length"), page.evaluate(
        "document.querySelectorAll('.samples > li').length"
    )


def foreign(page: OpenPage) -> list[str]:
    """What the page complained about, and what it asked the network for."""
    return [*page.complaints, *(url for url in page.requests if not url.startswith(("file:", "data:")))]


@pytest.mark.slow
def test_filters_order_and_keys(open_page: Callable[..., OpenPage], tmp_path: Path) -> None:
    answers = {
        "a": [Answer("four", "correct", "4"), Answer("five", "wrong", "5")],
        "b": [Answer("six", "wrong", "6", second_status="correct"), Answer("seven\n" * 40, "truncated")],
        "c": [Answer("hm", "unparsable"), Answer("hm", "unparsable")],
        "d": [Answer("eight", "correct", "8")],
    }
    questions = {one: question(f"Examples.\n\nQ: word {one}\nA:") for one in answers}
    pools = [
        read_pool(write_pool(tmp_path, "sums-00000040", answers, questions)),
        numbered(tmp_path, "words-00000020", 30),
    ]
    write_page(collect(pools, 100), pools, tmp_path / "page.html", title="run")
    page = open_page(tmp_path / "page.html")
    assert counts(page) == (4, 6)
    assert page.evaluate("document.getElementById('color').parentElement.hidden")
    for kind, expected in {
        "correct": (2, 2),
        "wrong": (2, 2),
        "disputed": (1, 1),
        "truncated": (1, 1),
        "unparsable": (1, 1),
        "all": (4, 6),
    }.items():
        act(page, f"document.querySelector('#kinds button[value={kind}]').click()")
        assert counts(page) == expected, kind
    assert page.evaluate("document.querySelector('button[value=unparsable] .count').textContent") == "2"
    choose_option(page, "search", "WORD b")
    assert counts(page) == (1, 2)
    choose_option(page, "search", "eigh")
    assert counts(page) == (1, 1)
    choose_option(page, "search", "")
    ids = "[...document.querySelectorAll('.card header')].map(one => one.querySelector('.mono').textContent)"
    choose_option(page, "order", "hard")
    assert page.evaluate(ids) == ["b", "c", "a", "d"]
    choose_option(page, "order", "easy")
    assert page.evaluate(ids) == ["d", "a", "b", "c"]
    choose_option(page, "order", "page")
    for key, expected in zip("jjjkk", "abcba", strict=True):
        press(page, key)
        assert page.evaluate("document.activeElement.querySelector('.mono').textContent") == expected
    assert page.evaluate("document.querySelectorAll('.closed').length") == 1
    press(page, "j")
    press(page, "o")
    assert page.evaluate("document.querySelectorAll('.closed').length") == 0
    act(page, "document.querySelector('.question summary').click()")
    opened = "new Promise(done => setTimeout(() => done(document.querySelector('.shared').textContent), 50))"
    answer = page.call("Runtime.evaluate", expression=opened, awaitPromise=True, returnByValue=True)
    assert answer["result"]["value"] == "Examples.\n\n"
    choose_option(page, "step", "20")
    act(page, "window.scrollTo(0, 1e9)")
    for _ in range(35):  # further questions are drawn as they are reached
        press(page, "j")
    assert counts(page) == (30, 30)
    assert foreign(page) == []


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_colours_and_tips(
    open_page: Callable[..., OpenPage], models: tuple[Path, Path], tmp_path: Path, dark: bool
) -> None:
    pool = answered(models[0], tmp_path, [" 4\n<b>", " 5"])
    page_of_samples = collect([pool], 10)
    color_tokens(page_of_samples, *models)
    write_page(page_of_samples, [pool], tmp_path / "page.html", title="run")
    tokens = page_of_samples.cards[0].data["samples"][0]["tokens"]
    page = open_page(tmp_path / "page.html", dark=dark)
    depths = "[...document.querySelector('.samples > li').querySelectorAll('.token')].map(one => [one.className, getComputedStyle(one).backgroundColor])"
    difference = page.evaluate(depths)
    assert len(difference) == len(tokens["ids"])
    for (name, colour), own, other in zip(difference, tokens["log_prob"], tokens["other"], strict=True):
        assert name == f"token {'more' if own > other else 'less'}"
        alpha = float(colour.rsplit(",", 1)[1].rstrip(")")) if colour.startswith("rgba") else 1.0
        expected = 0.0 if abs(own - other) < 0.1 else 0.72 * min(1.0, abs(own - other) / 3)
        assert alpha == pytest.approx(expected, abs=0.01)  # a browser keeps 8 bits of it
    assert "red: more probable under one" in page.evaluate("document.getElementById('legend').textContent")
    seen = {page.evaluate("document.getElementById('color').value")}
    for _ in range(3):
        press(page, "c")
        seen.add(page.evaluate("document.getElementById('color').value"))
    assert seen == {"none", "log-prob", "entropy", "difference"}
    choose_option(page, "color", "entropy")
    assert {name for name, _ in page.evaluate(depths)} == {"token entropy"}
    page.evaluate(
        "document.querySelector('.token').dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))"
    )
    tip = page.evaluate("document.getElementById('tip').innerText")
    assert f"{tokens['entropy'][0]:.3f} nats" in tip
    assert f"{abs(tokens['other'][0]):.3f} nats" in tip
    assert f"token {tokens['ids'][0]}" in tip
    text = page.evaluate("document.querySelector('.samples .text').textContent")
    assert text == " 4⏎\n<b><|eos|>"
    assert foreign(page) == []


@pytest.mark.slow
def test_hostile_text_is_shown_as_text(open_page: Callable[..., OpenPage], hostile: Path) -> None:
    page = open_page(hostile)
    assert counts(page) == (len(HOSTILE), 2 * len(HOSTILE))
    assert "owned" not in page.evaluate("document.title").replace("document.title = 'owned'", "")
    assert page.evaluate("document.querySelectorAll('main img, main script').length") == 0
    shown = page.evaluate(
        "[...document.querySelectorAll('.samples > li:first-child .text')].map(one => one.textContent)"
    )
    assert shown[:4] == HOSTILE[:4]
    assert shown[4] == "U+202EgnorwU+2066 U+0000U+001B[31mU+2028U+2029U+FEFF"
    assert shown[5] == "half U+D83D and U+DC00 of a pair"
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    act(page, "[...document.querySelectorAll('summary')].forEach(one => one.click())")
    assert foreign(page) == []
