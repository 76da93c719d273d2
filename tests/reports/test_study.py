"""The report: says what is planted and nothing else, stands alone, and can be read by anyone."""

from __future__ import annotations

import base64
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from tests.reports.headless_browser import find_browser, headless_browser
from tests.study.fake_study import PAPER_ARMS, SAME_ARMS, SMALL, make_fake_study

from rlprior.config import RunError, UsageError
from rlprior.reports.drawing import DOTS_PER_INCH, WIDTH_INCHES
from rlprior.reports.study import write_report
from rlprior.statistics.comparisons import Comparison
from rlprior.study.analysis import analyse
from rlprior.study.claims import answer_question
from rlprior.study.results import load_study
from rlprior.study.sanity import check_study


@pytest.fixture(scope="module")
def study_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fake_study(tmp_path_factory.mktemp("one"), tasks=("arithmetic", "GSM8K"))


@pytest.fixture(scope="module")
def report(study_directory: Path) -> Path:
    return write_report(study_directory, study_directory / "report.html")


@pytest.fixture(scope="module")
def summary(report: Path) -> dict[str, Any]:
    return json.loads((report.parent / "summary.json").read_text())


class PageReader(HTMLParser):
    """Tags with their attributes, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_text(report: Path) -> str:
    """The words of the page, one space between them."""
    text = re.sub(r"<style>.*?</style>|<[^>]*>", " ", report.read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(text))


def found(summary: dict[str, Any], quantity: str, subject: str) -> dict[str, Any]:
    (one,) = [c for c in summary["comparisons"] if c["quantity"] == quantity and c["subject"] == subject]
    return one


class TestWhatIsSaid:
    def test_planted_effects_are_found(self, summary: dict[str, Any]) -> None:
        """Each planted effect is at least eight standard errors of its comparison."""
        for arm, sign in (("β = -0.25", -1), ("β = 0.5", 1)):
            one = found(summary, "Entropy", arm)
            assert one["decided_in_family"]
            assert one["effect"] * sign > 0
            assert (
                one["low"]
                <= sign * abs(PAPER_ARMS["beta_low" if sign < 0 else "beta_high"].entropy_nats)
                <= one["high"]
            )
        for effect in PAPER_ARMS.values():
            assert found(summary, "Avg@16 (arithmetic)", f"{effect.label} after RL")["decided"] == (
                effect.rl_gain > 0.2
            )

    def test_headline_and_sentences_follow_the_comparisons(self, study_directory: Path) -> None:
        study = load_study(study_directory)
        analysis = analyse(study)
        answer = answer_question(study, analysis, [])
        for one in analysis.tasks[0].after["avg"]:
            better, worse = (
                re.search(rf"{word} under ([^;]*?)( and worse| than under)", answer.headline)
                for word in ("better", "worse")
            )
            if one.decided_in_family:
                clause = better if one.effect > 0 else worse
                assert clause
                assert one.subject in clause[1]
            else:
                assert one.subject in answer.headline.split("no difference larger than chance under")[1]

    def test_equal_arms_are_not_called_different(self, tmp_path: Path) -> None:
        """60 studies of one objective under two names: no comparison is decided more often than a false-positive rate of 7%
        (the coverage tests) explains."""
        false = {"Entropy": 0, "Avg@4 after RL (arithmetic)": 0, "Gain in Avg@4 by RL (arithmetic)": 0}
        for chance in range(60):
            directory = make_fake_study(tmp_path / str(chance), SAME_ARMS, size=SMALL, chance=chance)
            for one in analyse(load_study(directory)).comparisons:
                if one.quantity in false and one.subject == "the same again":
                    false[one.quantity] += one.decided
        # P(more than 12 of 60 at 7%) is 1e-4 for each of the three.
        assert max(false.values()) <= stats.binom.ppf(1 - 1e-4, 60, 0.07)

    def test_seeds_are_the_unit_of_chance_where_there_are_several(self, tmp_path: Path) -> None:
        """Luck of the seed moves an arm that does nothing: over questions it looks real, over seeds it does not."""
        one_seed = make_fake_study(tmp_path / "1", SAME_ARMS, (0,), seed_noise=0.4, chance=4)
        five = make_fake_study(tmp_path / "5", SAME_ARMS, (0, 1, 2, 3, 4), seed_noise=0.4, chance=4)
        alone, together = (
            analyse(load_study(d)).likelihood_comparisons["entropy"][0] for d in (one_seed, five)
        )
        assert (alone.unit_of_chance, alone.n, alone.decided) == ("documents", 120, True)
        assert (together.unit_of_chance, together.n, together.decided) == ("seeds", 5, False)

    def test_one_seed_is_said_to_be_one(self, report: Path) -> None:
        assert "One seed: the intervals cover the choice of held-out documents and questions" in page_text(
            report
        )

    def test_every_sentence_is_on_the_page_and_in_the_summary(
        self, report: Path, summary: dict[str, Any]
    ) -> None:
        text = page_text(report)
        sentences = [one["sentence"] for one in summary["comparisons"]]
        answer = summary["answer"]
        assert len(sentences) > 90
        for line in [
            *sentences,
            answer["headline"],
            *answer["limits"],
            *(found for _, found in answer["findings"]),
        ]:
            assert re.sub(r"\s+", " ", line) in text

    def test_numbers_are_those_of_the_records(self, study_directory: Path, summary: dict[str, Any]) -> None:
        """Recomputed from the files, without the package."""
        final = {
            stage: json.loads(
                (study_directory / f"runs/{stage}-tail-s0/eval/results.jsonl").read_text().splitlines()[-1]
            )
            for stage in ("midtrain", "rl")
        }
        text = final["midtrain"]["likelihood"]
        row = next(row for row in summary["likelihood"] if row["arm"] == "tail")
        tokens = sum(text["num_tokens"])
        assert row["entropy"]["value"] == pytest.approx(sum(text["entropy_nats"]) / tokens, rel=1e-12)
        assert row["perplexity"]["value"] == pytest.approx(
            np.exp(sum(text["cross_entropy_nats"]) / tokens), rel=1e-12
        )
        scores = next(row for row in summary["tasks"][1]["rows"] if row["arm"] == "tail")
        for when, stage in (("before", "midtrain"), ("after", "rl")):
            correct = final[stage]["tasks"]["GSM8K"]["num_correct"]
            assert scores[when]["avg"]["value"] == pytest.approx(100 * np.mean(correct) / 16, rel=1e-12)
        gain = scores["after"]["avg"]["value"] - scores["before"]["avg"]["value"]
        assert scores["gain"]["avg"]["effect"] == pytest.approx(gain, abs=1e-10)

    def test_checks_notice_what_is_wrong(self, tmp_path: Path) -> None:
        directory = make_fake_study(tmp_path, SAME_ARMS, size=SMALL)
        path = directory / "runs/midtrain-same-s0/eval/results.jsonl"
        *rest, last = path.read_text().splitlines()
        record = json.loads(last)
        record["likelihood"]["unigram_cross_entropy_nats"] = record["likelihood"]["cross_entropy_nats"]
        record["tasks"]["arithmetic"]["num_truncated"] = [2] * 40
        record["tasks"]["arithmetic"]["num_correct"] = [0] * 40
        path.write_text("\n".join([*rest, json.dumps(record)]) + "\n")
        study = load_study(directory)
        analysis = analyse(study)
        checks = check_study(study, analysis)
        verdicts = {check.name: check.verdict for check in checks}
        doubts = answer_question(study, analysis, checks).doubts
        assert len(doubts) == sum(verdict == "not met" for verdict in verdicts.values())
        assert doubts[0].startswith(
            "Perplexity against a unigram model: 100% of the unigram model's, expected at most 50%"
        )
        assert verdicts["Perplexity against a unigram model"] == "not met"
        assert verdicts["Responses cut at the length limit, arithmetic"] == "not met"
        assert verdicts["Room for RL on arithmetic"] == "not met"
        assert verdicts["Better than guessing on arithmetic"] == "not met"
        assert verdicts["Questions of arithmetic"] == "not met"
        assert verdicts["Held-out documents"] == "met"
        assert verdicts["Responses without an answer, arithmetic"] == "met"
        assert verdicts["Groups without a signal in RL"] == "met"


class TestThePage:
    def test_it_stands_alone(self, report: Path) -> None:
        page = PageReader(report.read_text())
        links = [
            value
            for _, attributes in page.tags
            for name in ("src", "href")
            if (value := attributes.get(name))
        ]
        assert links
        for link in links:
            assert link.startswith(("data:", "figures/", "#")) or link == "summary.json"
            assert link.startswith(("data:", "#")) or (report.parent / link).exists()
        assert not page.all("script")
        assert not re.search(r"@import|url\(", report.read_text())

    def test_pictures_are_those_beside_it(self, report: Path) -> None:
        images = PageReader(report.read_text()).all("img")
        files = sorted((report.parent / "figures").glob("*.png"))
        embedded = [
            base64.b64decode((image["src"] or "").removeprefix("data:image/png;base64,")) for image in images
        ]
        assert sorted(embedded) == sorted(file.read_bytes() for file in files)
        assert len(files) == 9

    def test_text_of_others_is_escaped(self, report: Path) -> None:
        assert (
            "Generated numbers: &lt;b&gt;nothing&lt;/b&gt; was trained &amp; nothing was learned."
            in report.read_text()
        )

    def test_it_can_be_read_aloud(self, report: Path) -> None:
        page = PageReader(report.read_text())
        assert page.all("html")[0]["lang"] == "en"
        assert len(page.all("h1")) == 1
        assert all(len(image["alt"] or "") > 40 for image in page.all("img"))
        assert all(header.get("scope") in ("col", "row", "rowgroup") for header in page.all("th"))
        assert len(page.all("caption")) == len(page.all("table")) > 3
        assert "summary" in {tag for tag, _ in page.tags}

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_contrast_is_sufficient(self, report: Path, scheme: str) -> None:
        """WCAG AA: 4.5 between text and each background."""
        roots = re.findall(r":root \{(.*?)\}", report.read_text(), flags=re.DOTALL)
        colours = dict(re.findall(r"--(\w+): (#\w{6})", roots[0 if scheme == "light" else 1]))
        for text in ("ink", "soft", "accent", "bad"):
            for background in ("page", "panel"):
                light, dark = sorted((luminance(colours[text]), luminance(colours[background])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, background)

    def test_it_repeats(self, report: Path, study_directory: Path, tmp_path: Path) -> None:
        again = write_report(study_directory, tmp_path / "report.html")
        assert again.read_bytes() == report.read_bytes()
        assert (tmp_path / "summary.json").read_bytes() == (report.parent / "summary.json").read_bytes()


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


class TestPartialStudies:
    @pytest.mark.parametrize(
        "unfinished",
        [
            [("beta_high", 0, "rl"), ("beta_high", 1, "rl"), ("head", 1, "midtrain"), ("head", 1, "rl")],
            [("ce", seed, "rl") for seed in (0, 1)],
            [(arm, seed, stage) for arm in PAPER_ARMS for seed in (0, 1) for stage in ("midtrain", "rl")],
            [(arm, 1, stage) for arm in PAPER_ARMS for stage in ("pretrain", "midtrain", "rl")],
        ],
        ids=["some", "no baseline", "no stage", "no second seed"],
    )
    def test_what_is_missing_is_said(self, tmp_path: Path, unfinished: list[tuple[str, int, str]]) -> None:
        make_fake_study(tmp_path, seeds=(0, 1), size=SMALL, unfinished=unfinished)
        text = page_text(write_report(tmp_path, tmp_path / "report.html"))
        assert "This study is not finished." in text
        for arm, seed, stage in unfinished:
            words = {"pretrain": "Pre-training", "midtrain": "Mid-training", "rl": "RL"}[stage]
            (line,) = re.findall(rf"{words} is not evaluated yet for (.*?)\.(?= [A-Z])", text)
            assert f"{PAPER_ARMS[arm].label} (seed {seed})" in line

    def test_nothing_yet(self, tmp_path: Path) -> None:
        make_fake_study(tmp_path, SAME_ARMS, size=SMALL)
        for file in tmp_path.rglob("*.jsonl"):
            file.unlink()
        text = page_text(write_report(tmp_path, tmp_path / "report.html"))
        assert "No answer yet" in text
        assert "No checkpoint is evaluated yet." in text

    def test_a_study_of_one_arm_has_nothing_to_compare(self, tmp_path: Path) -> None:
        make_fake_study(tmp_path, {"ce": PAPER_ARMS["ce"]}, size=SMALL)
        text = page_text(write_report(tmp_path, tmp_path / "report.html"))
        assert "No answer yet" in text
        assert "RL raised Avg@4 by more than chance under cross-entropy" in text

    def test_a_study_without_rl_or_tasks(self, tmp_path: Path) -> None:
        make_fake_study(tmp_path, SAME_ARMS, size=SMALL, tasks=())
        path = tmp_path / "study.json"
        data = json.loads(path.read_text())
        data["runs"] = [run for run in data["runs"] if run["stage"] != "rl"]
        path.write_text(json.dumps(data))
        text = page_text(write_report(tmp_path, tmp_path / "report.html"))
        assert "Entropy on held-out text (nats per token), against cross-entropy" in text
        assert "This study is not finished." not in text


def test_no_study_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        write_report(tmp_path, tmp_path / "report.html")


def test_a_damaged_study_leaves_the_old_report(tmp_path: Path) -> None:
    make_fake_study(tmp_path, SAME_ARMS, size=SMALL)
    output = write_report(tmp_path, tmp_path / "report.html")
    before = output.read_bytes()
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(RunError):
        write_report(tmp_path, output)
    assert output.read_bytes() == before


def test_comparisons_cover_every_family(study_directory: Path) -> None:
    """Three text quantities and, for two tasks and three scores, before, after and gain, of 4 arms; RL's own gain of 5."""
    comparisons = analyse(load_study(study_directory)).comparisons
    assert len(comparisons) == 3 * 4 + 2 * 3 * (3 * 4 + 5)
    assert all(isinstance(one, Comparison) for one in comparisons)
    assert {one.family_size for one in comparisons} == {4, 5}


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_opens_it_without_complaint(report: Path, tmp_path: Path, dark: bool) -> None:
    browser = find_browser()
    if browser is None:
        pytest.skip("no Chromium on this machine")
    with headless_browser(browser, tmp_path / "profile") as page:
        page.open(report.as_uri(), dark=dark)
        widths = page.evaluate("[...document.images].map(image => image.complete ? image.naturalWidth : 0)")
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        too_wide = page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
    assert page.complaints == []
    assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []
    assert len(widths) == 9
    assert set(widths) == {WIDTH_INCHES * DOTS_PER_INCH}
    assert background == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
    assert too_wide == 0
