"""Figures: something is drawn, no text covers another, and curves compare like with like."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread
from matplotlib.text import Text
from tests.study.fake_study import SMALL, make_fake_study

from rlprior.reports.curves import smooth, text_curves
from rlprior.reports.drawing import DOTS_PER_INCH, WIDTH_INCHES
from rlprior.reports.figures import draw_figures
from rlprior.study.analysis import analyse
from rlprior.study.results import Study, load_study


@pytest.fixture(scope="module")
def study_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fake_study(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def study(study_directory: Path) -> Study:
    return load_study(study_directory)


def test_none_is_empty(study: Study, tmp_path: Path) -> None:
    figures = draw_figures(study, analyse(study))
    assert len(figures) == 6
    for path in (figure.save(tmp_path) for figure in figures):
        pixels = imread(path)[..., :3]
        assert pixels.shape[1] == WIDTH_INCHES * DOTS_PER_INCH
        # Ink covers a few percent of a plot: a share p of black on white has a deviation of sqrt(p (1 - p)) > 0.1.
        assert pixels.mean(-1).std() > 0.1, path
        colours = {tuple(colour) for colour in np.round(pixels.reshape(-1, 3)[::7] * 15).astype(int)}
        assert len(colours) > 20, path


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_no_text_covers_another(tmp_path: Path, seeds: tuple[int, ...]) -> None:
    study = load_study(make_fake_study(tmp_path, seeds=seeds, size=SMALL, tasks=("arithmetic",)))
    for one in draw_figures(study, analyse(study)):
        canvas = one.figure.canvas
        assert isinstance(canvas, FigureCanvasAgg)
        canvas.draw()
        texts = [text for text in one.figure.findobj(Text) if isinstance(text, Text) and is_drawn(text)]
        assert len(texts) > 15
        boxes = [text.get_window_extent() for text in texts]
        for i, left in enumerate(boxes):
            for j in range(i):
                overlap = left.overlaps(boxes[j])
                assert not overlap, f"{one.name}: {texts[i].get_text()!r} covers {texts[j].get_text()!r}"


def test_curves_compare_the_same_documents(study_directory: Path) -> None:
    """Intermediate checkpoints have half of the documents: all points of a curve use that half."""
    (curve, *_) = text_curves(load_study(study_directory), "entropy")
    records = [
        json.loads(line)
        for stage in ("pretrain", "midtrain")
        for line in (study_directory / f"runs/{stage}-ce-s0/eval/results.jsonl").read_text().splitlines()
    ]
    shared = set.intersection(*(set(record["likelihood"]["document_ids"]) for record in records))
    for record, value in zip(records, curve.values, strict=True):
        text = record["likelihood"]
        rows = [i for i, document in enumerate(text["document_ids"]) if document in shared]
        entropy, tokens = (sum(text[name][i] for i in rows) for name in ("entropy_nats", "num_tokens"))
        assert value == pytest.approx(entropy / tokens, rel=1e-12)
    assert len(shared) == 60


def test_smoothing_keeps_a_line_and_the_length() -> None:
    line = [2.0 * i for i in range(100)]
    assert smooth(line)[10:90] == pytest.approx(line[10:90])
    assert len(smooth(line)) == 100
    assert smooth([3.0]) == [3.0]


def is_drawn(text: Text) -> bool:
    """Whether a text artist can be seen: tick labels outside an axis' range exist, but are not drawn."""
    if not text.get_visible() or not text.get_text().strip():
        return False
    figure = text.get_figure()
    assert figure is not None
    box = text.get_window_extent()
    inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
    for axes in figure.axes:
        for axis, low, high in (
            (axes.xaxis, axes.bbox.x0, axes.bbox.x1),
            (axes.yaxis, axes.bbox.y0, axes.bbox.y1),
        ):
            for tick in axis.get_major_ticks():
                if text in (tick.label1, tick.label2):
                    middle = (box.x0 + box.x1) / 2 if axis is axes.xaxis else (box.y0 + box.y1) / 2
                    return inside and text is tick.label1 and low - 1 <= middle <= high + 1
    assert inside, f"{text.get_text()!r} is cut off"
    return True
