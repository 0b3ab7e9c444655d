"""Pictures, film strips, videos and pages: they hold what was put in, escape it, and stand alone."""

import io
import re
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from recap_model.report import film, html, plots, video

RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 255, (12, 64, 64, 3), np.uint8)
VALUES = np.linspace(-0.9, 0, 12)


def svg_text(picture: bytes) -> str:
    text = picture.decode()
    assert text.startswith("<?xml")
    assert "</svg>" in text
    return text


@pytest.mark.parametrize("count", [1, 2, 9])
def test_comparison_draws_one_bar_an_arm(count: int) -> None:
    arms = [
        plots.Arm(f"arm {i}", plots.Interval(0.5, 0.4, 0.6), plots.Interval(9.0, 8.0, 11.0), highlight=i == 0)
        for i in range(count)
    ]
    drawn = svg_text(plots.comparison(arms))
    assert all(drawn.count(f"<!-- arm {i} -->") == 1 for i in range(count))
    svg_text(plots.comparison([plots.Arm("only success", plots.Interval(1.0, 0.9, 1.0))]))


def test_plots_are_reproducible() -> None:
    """The same data gives the same bytes, so that a report changes only when the run does."""
    draw = lambda: plots.latency_histogram(np.array([3.0, 4.0, 9.0]), period_ms=50.0)  # noqa: E731
    assert draw() == draw()


def test_plots_accept_the_smallest_input() -> None:
    assert "<svg" in svg_text(plots.latency_histogram(np.array([]), period_ms=50.0))
    assert "<svg" in svg_text(plots.value_curves([]))
    assert "<svg" in svg_text(plots.value_curves([plots.Curve(np.array([-0.5]), None)]))
    assert "<svg" in svg_text(plots.audit_bars([]))
    assert "<svg" in svg_text(plots.training_curves({}))
    assert "<svg" in svg_text(plots.training_curves({"loss": (np.arange(3), np.arange(3.0))}))


def test_audit_bars_count_all_frames() -> None:
    row = {"task": "t", "demonstration": False, "intervention": True, "success": False, "positive": 0, "frames": 0}
    drawn = svg_text(plots.audit_bars([row, {**row, "task": "u", "positive": 3, "frames": 4}]))
    assert "<!--  0% -->" in drawn and "<!--  75% -->" in drawn


@pytest.mark.parametrize("steps", [1, 3, 12])
def test_film_strip_is_a_wide_picture(steps: int) -> None:
    picture = film.film_strip(FRAMES[:steps], VALUES[:steps], title="episode", control_hz=20.0, success=True)
    image = Image.open(io.BytesIO(picture))
    assert image.format == "PNG"
    assert image.width >= 1000


def test_film_strip_marks_human_control_and_unknown_values() -> None:
    human = np.arange(12) > 6
    values = np.where(np.arange(12) < 3, np.nan, VALUES)
    assert film.film_strip(FRAMES, values, title="x", control_hz=20.0, success=False, intervention=human)


def test_film_strip_refuses_other_lengths() -> None:
    with pytest.raises(ValueError, match="got 5 and 12"):
        film.film_strip(FRAMES, VALUES[:5], title="x", control_hz=20.0)


def test_video_has_every_frame_and_plays_in_browsers(tmp_path: Path) -> None:
    clips = [
        video.Clip("open the drawer", {"front": FRAMES, "top": FRAMES}, VALUES, success=True),
        video.Clip("fault drill", {"front": FRAMES, "top": FRAMES}, np.full(12, np.nan), success=False),
    ]
    path = tmp_path / "deep/video.mp4"
    count = video.write_video(path, clips, fps=20, hold_s=0.5)
    assert count == 2 * (12 + 10)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert float(stream.average_rate) == 20
        assert sum(1 for _ in container.decode(video=0)) == count
    assert list(tmp_path.glob("deep/*.tmp")) == []


def test_video_without_frames_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        video.write_video(tmp_path / "v.mp4", [], fps=20)
    assert list(tmp_path.iterdir()) == []


def test_page_stands_alone_and_escapes(tmp_path: Path) -> None:
    picture = plots.latency_histogram(np.array([3.0]), period_ms=50.0)
    body = html.figure(picture, "a <b> & 'c'") + html.table(["name", "n"], [["<script>", 3], ["x", 0.123456]])
    document = html.page(
        "<title>", "sub & more", [html.Tile("success", "92 %", "24 episodes", "good")],
        [html.Section("Part <1>", body + html.paragraph("<img>", "warning"), "note")], "made by a test",
    )  # fmt: skip
    assert "<script" not in document
    assert "&lt;script&gt;" in document
    assert "0.123" in document
    assert re.findall(r"(?:src|href)='(?!data:)", document) == []
    html.write(tmp_path / "a/report.html", document)
    assert (tmp_path / "a/report.html").read_text() == document


def test_only_pictures_are_figures() -> None:
    with pytest.raises(ValueError, match="expected PNG or SVG"):
        html.figure(b"GIF89a", "no")
