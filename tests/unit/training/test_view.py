"""`recap data view`: the right episodes, everything in one file, nothing of the data taken for markup."""

import base64
import io
import re
import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from recap_model import cli
from recap_model.manifest import ManifestError
from sample_rollouts import SPEC, make_labelled, record
from training.dataset import open_dataset
from training.ingest import ingest, survey
from training.label_files import publish_labels
from training.labels import load_labels, write_values
from training.view import Chosen, ViewError, build, choose, read_tracks, rows_of, title
from training.view_chart import FRAME_PX, Tracks, episode_chart, strip
from training.view_page import inline_svg, light_and_dark, runs
from training.view_rerun import write_rerun


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_labelled(tmp_path_factory.mktemp("view"))


@pytest.fixture(scope="module")
def tracks(data):
    return read_tracks(data, labels=data.root.parent / "advantage")


def imported(data, out):
    """Labels without values, as `recap label --from-column` leaves them for a column of indicators."""
    unknown = np.full(data.frames, np.nan)
    columns = dict.fromkeys(("return", "value", "advantage", "threshold"), unknown)
    columns |= {"indicator": np.arange(data.frames) % 3 - 1, "source": np.full(data.frames, "imported", object)}
    publish_labels(out, "advantage", *data.keys(), columns, {"dataset": data.hash}, {"mode": "imported"}, {})
    return out


def pictures(text):
    found = re.findall(r'href="data:image/jpeg;base64,([^"]+)"', text)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(part)))) for part in found]


class TestChoice:
    def test_best_median_and_worst_of_every_task(self, data, tracks):
        chosen = choose(data, tracks)
        start = {number: tracks.returns[rows.start] for number, rows in enumerate(rows_of(data))}
        worth = {n: (bool(e.success), start[n]) for n, e in enumerate(data.episodes)}
        for task in SPEC.tasks:
            own = [n for n, e in enumerate(data.episodes) if e.task == task]
            picks = [item for item in chosen if data.episodes[item.place].task == task]
            assert [item.why for item in picks] == [f"{name} of its task" for name in ("best", "median", "worst")]
            best, median, worst = (worth[item.place] for item in picks)
            assert best == max(worth[n] for n in own) and worst == min(worth[n] for n in own)
            assert sum(worth[n] <= median for n in own) >= len(own) / 2 <= sum(worth[n] >= median for n in own) + 1

    def test_without_returns_the_outcome_and_then_the_length_decide(self, data):
        best = [data.episodes[item.place] for item in choose(data, Tracks()) if item.why.startswith("best")]
        for episode in best:
            rivals = [len(e) for e in data.episodes if e.task == episode.task and e.success]
            assert episode.success and len(episode) == min(rivals)

    def test_no_episode_twice_where_a_task_has_few(self, data):
        few = replace(data, episodes=data.episodes[:3])  # two of one task, one of the other
        chosen = choose(few, Tracks())
        assert sorted(item.place for item in chosen) == [0, 1, 2]

    def test_asked_for_episodes_come_in_that_order_and_once(self, data, tracks):
        assert choose(data, tracks, [5, 0, 5]) == [Chosen(5), Chosen(0)]

    def test_an_episode_that_is_not_there(self, data, tracks):
        expected = rf"--episodes: expected indices of {data.root} \(0 to 7, 8 episodes\), got 8, -1$"
        with pytest.raises(ViewError, match=expected):
            choose(data, tracks, [0, 8, -1])


class TestTracks:
    def test_labels_bring_value_return_and_the_rest(self, data, tracks):
        labels = load_labels(data.root.parent, data)
        for name, column in (("value", "values"), ("returns", "returns"), ("advantage", "advantage"),
                             ("threshold", "threshold"), ("indicator", "indicator")):  # fmt: skip
            np.testing.assert_array_equal(getattr(tracks, name), getattr(labels, column))

    def test_values_that_are_named_go_before_those_of_the_labels(self, data, tmp_path):
        write_values(tmp_path / "v", *data.keys(), np.full(data.frames, -0.25), np.zeros(data.frames),
                     dataset_hash=data.hash, critic_hash="c")  # fmt: skip
        found = read_tracks(data, labels=data.root.parent / "advantage", values=tmp_path / "v")
        assert (found.value == -0.25).all() and found.advantage is not None
        alone = read_tracks(data, values=tmp_path / "v")
        assert alone.returns is None and alone.indicator is None

    def test_imported_labels_bring_the_indicator_alone(self, data, tmp_path):
        folder = imported(data, tmp_path / "advantage")
        found = read_tracks(data, labels=folder)
        assert [getattr(found, name) for name in ("value", "returns", "advantage", "threshold")] == [None] * 4
        np.testing.assert_array_equal(found.indicator, load_labels(folder, data).indicator)
        page = build(data, found, choose(data, found)[:1])
        assert ">label<" in page and ">advantage<" not in page and not re.search(r">nan%?<", page)

    def test_labels_of_another_dataset_are_refused(self, data, tmp_path):
        root = shutil.copytree(data.root, tmp_path / "other")
        (root / "manifest.json").unlink()
        with pytest.raises(ManifestError, match="another dataset"):
            read_tracks(open_dataset(root), labels=data.root.parent / "advantage")

    def test_parts_lie_where_the_episodes_lie(self, data, tracks):
        parts = [tracks.part(rows).advantage for rows in rows_of(data)]
        assert [len(part) for part in parts] == [len(episode) for episode in data.episodes]
        np.testing.assert_array_equal(np.concatenate(parts), tracks.advantage)


class TestPage:
    def test_it_holds_every_camera_of_every_episode_and_fetches_nothing(self, data, tracks):
        chosen = choose(data, tracks)
        page = build(data, tracks, chosen)
        assert len(pictures(page)) == len(chosen) * len(SPEC.cameras)
        assert all(f"<h2>{title(data.episodes[item.place])}</h2>" in page for item in chosen)
        assert not re.search(r"""(?:src|href)=['"](?!data:|#)""", page)
        assert not re.search(r"url\((?!#)|@import|<script|<link", page)

    def test_charts_take_the_colours_of_the_page_and_the_page_has_two_sets(self, data, tracks):
        page = build(data, tracks, choose(data, tracks)[:1])
        charts = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
        assert "var(--good)" in charts and "var(--bad)" in charts and "var(--ink)" in charts
        assert not re.search(r"#(?:1c2733|5d6b7a|e3e8ee|12756f|b8432f|2f5d9b|d99a2b)", charts)
        light, dark = page.split("prefers-color-scheme:dark", 1)
        names = set(re.findall(r"var\((--\w+)\)", page))
        assert names and all(f"{name}:" in light and f"{name}:" in dark for name in names)

    def test_a_hostile_task_is_text(self, tmp_path):
        task = '<script>alert(1)</script> & "it\'s" $\\frac{x$'
        record(tmp_path / "r", 0, task=task, spec=replace(SPEC, tasks=(task,)), human=(1, 2))
        ingest(survey([tmp_path / "r"]), tmp_path / "d")
        dataset = open_dataset(tmp_path / "d")
        page = build(dataset, Tracks(), choose(dataset, Tracks()))
        assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;it&#x27;s&quot; $" in page
        with pytest.raises(ValueError, match="expected a document of recap_model"):
            light_and_dark("<p>half a page")


class TestChart:
    FRAMES = np.repeat(np.arange(12, dtype=np.uint8) * 20, 8 * 8 * 3).reshape(12, 8, 8, 3)

    def chart(self, steps=12, human=(), **known):
        mask = np.isin(np.arange(steps), human)
        frames = {"front": self.FRAMES[:steps]}
        return episode_chart(frames, Tracks(**known), intervention=mask, fps=20.0, columns=4).decode()

    @pytest.mark.parametrize("steps", [1, 2, 12])
    def test_frames_are_evenly_spaced_from_the_first_to_the_last(self, steps):
        (picture,) = pictures(self.chart(steps))
        count = min(4, steps)
        shown = [int(picture[4, 8 * i + 4].mean()) for i in range(count)]
        wanted = np.linspace(0, steps - 1, count).round() * 20
        np.testing.assert_allclose(shown, wanted, atol=3)

    def test_takeovers_are_hatched_where_there_are_any(self):
        assert "<pattern" in self.chart(human=(3, 4), value=np.zeros(12))
        assert "<pattern" in self.chart(human=(3, 4))
        assert "<pattern" not in self.chart(value=np.zeros(12))

    def test_only_what_is_known_is_drawn(self):
        everything = self.chart(value=np.zeros(12), advantage=np.zeros(12), threshold=np.zeros(12),
                                indicator=np.ones(12, np.int8))  # fmt: skip
        words = [word for word in ("value", "advantage", "threshold", "label") if f">{word}<" in everything]
        assert words == ["value", "advantage", "threshold", "label"]
        assert not any(f">{word}<" in self.chart() for word in words) and ">time [s]<" in self.chart()

    def test_lengths_that_differ_are_refused(self):
        with pytest.raises(ValueError, match=r"expected 12 frames .* of everything, got .*'value': 5"):
            self.chart(value=np.zeros(5))
        with pytest.raises(ValueError, match=r"expected 0 frames \(at least one\)"):
            self.chart(0)

    def test_large_frames_are_reduced_and_keep_their_shape(self):
        picture = strip(np.zeros((3, 480, 640, 3), np.uint8))
        assert picture.shape == (FRAME_PX, 3 * round(640 * FRAME_PX / 480), 3)

    def test_what_is_no_svg_is_refused(self):
        with pytest.raises(ValueError, match="chart 'x': expected SVG"):
            inline_svg(b"\x89PNG", "x")


@given(st.lists(st.booleans(), max_size=40))
def test_runs_are_the_mask(values):
    mask = np.array(values, bool)
    again = np.zeros(len(mask), bool)
    parts = runs(mask)
    for start, stop in parts:
        again[start:stop] = True
    np.testing.assert_array_equal(again, mask)
    assert all(stop < start for (_, stop), (start, _) in pairwise(parts))


class TestCommand:
    def test_it_writes_the_page(self, data, tmp_path, capsys):
        out = tmp_path / "pages" / "view.html"
        labels = ["--labels", str(data.root.parent / "advantage")]
        assert cli.main(["data", "view", str(data.root), "--out", str(out), *labels, "--episodes", "0", "5"]) == 0
        assert f"{out}: 2 of 8 episodes" in capsys.readouterr().out
        assert len(pictures(out.read_text())) == 2 * len(SPEC.cameras)
        assert [path.name for path in out.parent.iterdir()] == ["view.html"]

    def test_a_dataset_without_labels_is_shown_too(self, data, tmp_path):
        assert cli.main(["data", "view", str(data.root), "--out", str(tmp_path / "v.html"), "--episodes", "3"]) == 0
        assert "of the frames are positive" not in (tmp_path / "v.html").read_text()

    def test_a_rerun_recording_holds_every_frame(self, data, tmp_path, capsys):
        out = tmp_path / "view.rrd"
        command = ["data", "view", str(data.root), "--out", str(tmp_path / "v.html"), "--rerun", str(out)]
        assert cli.main([*command, "--episodes", "1", "2"]) == 0
        frames = len(data.episodes[1]) + len(data.episodes[2])
        assert f"{out}: {frames} frames" in " ".join(capsys.readouterr().out.split())
        assert rows_of_recording(out, "/cameras/front") == frames == rows_of_recording(out, "/state/grip")

    def test_without_its_package_a_recording_is_refused_before_any_work(
        self, data, tracks, tmp_path, capsys, monkeypatch
    ):
        monkeypatch.setattr("training.view_rerun.find_spec", lambda _: None)
        out = tmp_path / "view.rrd"
        assert cli.main(["data", "view", str(data.root), "--out", str(tmp_path / "v.html"), "--rerun", str(out)]) == 2
        assert "recap-stack[view]" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
        with pytest.raises(ViewError, match="expected the Python package rerun-sdk"):
            write_rerun(data, tracks, [Chosen(0)], out)


def rows_of_recording(path, ending):
    """Rows logged below entities that end so; the file is opened again from disk."""
    from rerun.chunk import RrdReader

    chunks = RrdReader(path).stream().to_chunks()
    return sum(chunk.num_rows for chunk in chunks if str(chunk.entity_path).endswith(ending))
