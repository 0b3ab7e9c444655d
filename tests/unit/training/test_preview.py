"""The preview of labels shows the frames that it says it shows, in the colours of their labels."""

from dataclasses import replace
from itertools import pairwise

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from recap_model import cli
from sample_rollouts import SPEC, make_labelled
from training.labels import LabelError, LabelledFrames, load_labels
from training.preview import KINDS, pick_moments, read_shots, write_preview
from training.preview_draw import CELL, COLOURS, EDGE, HEAD, MARGIN, VIEW, draw_page, draw_sheet, page_size
from training.view import rows_of


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_labelled(tmp_path_factory.mktemp("preview"))


@pytest.fixture(scope="module")
def labels(data):
    return load_labels(data.root.parent, data)


def random_labels(data, seed, none=0.2):
    rng = np.random.default_rng(seed)
    advantage, threshold = rng.normal(size=data.frames), rng.normal(size=data.frames) * 0.1
    indicator = np.where(rng.random(data.frames) < none, -1, rng.integers(0, 2, data.frames)).astype(np.int8)
    source = np.full(data.frames, "computed", object)
    return LabelledFrames(advantage, advantage, advantage, threshold, indicator, source, "h")


class TestMoments:
    @settings(max_examples=25)
    @given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 12))
    def test_each_kind_holds_its_own_frames_apart_from_each_other(self, data, seed, per_kind, clip):
        marked = random_labels(data, seed)
        rows = rows_of(data)
        moments = pick_moments(data, marked, per_kind=per_kind, clip=clip)
        for moment in moments:
            episode = data.episodes[moment.place]
            assert moment.task == episode.task and moment.row == rows[moment.place].start + moment.frame
            assert 0 <= moment.start <= moment.frame < moment.stop <= len(episode)
            assert moment.stop - moment.start == min(clip, len(episode))
            allowed = {KINDS[0]: (1,), KINDS[1]: (0, 1), KINDS[2]: (0,)}[moment.kind]
            assert marked.indicator[moment.row] in allowed
        for task in SPEC.tasks:
            for kind in KINDS:
                own = [m for m in moments if (m.task, m.kind) == (task, kind)]
                assert len(own) <= per_kind
                spans = sorted((m.place, m.start, m.stop) for m in own)
                assert all(a[0] != b[0] or a[2] <= b[1] for a, b in pairwise(spans))

    @pytest.mark.parametrize("seed", range(3))
    def test_the_first_of_each_kind_is_the_extreme_of_its_task(self, data, seed):
        marked = random_labels(data, seed)
        margin = marked.advantage - marked.threshold
        tasks = np.repeat([e.task for e in data.episodes], [len(e) for e in data.episodes])
        moments = pick_moments(data, marked, per_kind=2, clip=3)
        for task in SPEC.tasks:
            first = {kind: next(m.row for m in moments if (m.task, m.kind) == (task, kind)) for kind in KINDS}
            own = tasks == task
            assert margin[first[KINDS[0]]] == margin[own & (marked.indicator == 1)].max()
            assert abs(margin[first[KINDS[1]]]) == np.abs(margin[own & (marked.indicator >= 0)]).min()
            assert margin[first[KINDS[2]]] == margin[own & (marked.indicator == 0)].min()

    def test_imported_labels_show_their_own_frames_and_no_borderline(self, data, tmp_path):
        marked = random_labels(data, 0)
        unknown = np.full(data.frames, np.nan)
        marked = replace(marked, returns=unknown, values=unknown, advantage=unknown, threshold=unknown)
        moments = pick_moments(data, marked, per_kind=2, clip=3)
        assert {moment.kind for moment in moments} == {KINDS[0], KINDS[2]}
        assert all(marked.indicator[m.row] == (m.kind == KINDS[0]) for m in moments)
        assert write_preview(data, marked, tmp_path / "p.mp4", per_kind=1, seconds=0.1).frames > 0

    def test_labels_that_mark_nothing_or_something_else_are_refused(self, data):
        nothing = random_labels(data, 0, none=1.0)
        with pytest.raises(LabelError, match="expected at least one positive or negative frame"):
            pick_moments(data, nothing, per_kind=1, clip=3)
        few = replace(data, episodes=data.episodes[:2])
        with pytest.raises(LabelError, match=f"expected labels of {few.frames} frames, got {data.frames}"):
            pick_moments(few, nothing, per_kind=1, clip=3)
        with pytest.raises(LabelError, match="at least 1 clip of every kind, got 0"):
            pick_moments(data, nothing, per_kind=0, clip=3)


class TestPictures:
    @pytest.fixture(scope="class")
    def shots(self, data, labels):
        task = SPEC.tasks[0]
        moments = [m for m in pick_moments(data, labels, per_kind=2, clip=5) if m.task == task]
        return sorted(read_shots(data, labels, moments), key=lambda shot: moments.index(shot.moment))

    def corner(self, shots, shot):
        """Upper left pixel of a clip's coloured frame: row and column."""
        own = [other for other in shots if other.moment.kind == shot.moment.kind]
        height = (page_size(KINDS, 2)[0] - HEAD - MARGIN) // len(KINDS)
        return HEAD + KINDS.index(shot.moment.kind) * height + 20, MARGIN + own.index(shot) * (CELL + MARGIN)

    def test_clips_are_the_frames_of_the_dataset(self, data, labels, shots):
        for shot in shots:
            moment, episode = shot.moment, data.episodes[shot.moment.place]
            assert shot.episode == episode.index and len(shot.frames) == moment.stop - moment.start
            first = Image.fromarray(episode.images()["front"][moment.frame])
            width = round(first.width * VIEW / first.height)
            expected = np.asarray(first.resize((width, VIEW), Image.Resampling.BICUBIC))
            at = moment.frame - moment.start
            np.testing.assert_array_equal(shot.frames[at][:, :width], expected)
            assert shot.advantage[at] == labels.advantage[moment.row]
            assert shot.source == labels.source[moment.row]

    def test_the_frame_around_a_clip_has_the_colour_of_the_label_on_show(self, shots):
        seen = set()
        for step in range(5):
            picture = draw_page("t", KINDS, shots, 2, step)
            for shot in shots:
                at = min(step, len(shot.frames) - 1)
                row, column = self.corner(shots, shot)
                for y, x in ((0, 0), (0, CELL - 1), (VIEW + 2 * EDGE - 1, 0), (VIEW // 2, EDGE - 1)):
                    assert tuple(picture[row + y, column + x]) == COLOURS[shot.indicator[at]]
                seen.add(int(shot.indicator[at]))
        assert seen == {0, 1}

    def test_the_sheet_shows_each_clip_at_its_moment(self, shots):
        sheet = draw_sheet("t", KINDS, shots, 2)
        for shot in shots:
            row, column = self.corner(shots, shot)
            at = shot.moment.frame - shot.moment.start
            assert tuple(sheet[row, column]) == COLOURS[shot.indicator[at]]

    def test_pages_have_one_even_size_whatever_the_text(self, shots):
        sizes = {draw_page(text, KINDS, shots[:n], 2, 0).shape
                 for text, n in (("t", 6), ("a\nb <b>\N{GRINNING FACE}" * 500, 1), ("", 0))}  # fmt: skip
        assert sizes == {(*page_size(KINDS, 2), 3)} and not any(n % 2 for n in page_size(KINDS, 3))

    def test_clips_longer_than_the_bar_has_pixels(self, shots):
        count = 2 * CELL
        long = replace(
            shots[0], frames=np.zeros((count, 4, 4, 3), np.uint8), advantage=np.zeros(count), threshold=np.zeros(count),
            indicator=np.ones(count, np.int8), moment=replace(shots[0].moment, frame=count - 1, start=0, stop=count),
        )  # fmt: skip
        assert draw_page("t", KINDS, [long], 2, count - 1).shape == (*page_size(KINDS, 2), 3)


class TestFilm:
    def test_a_page_a_task_at_the_rate_of_the_data(self, data, labels, tmp_path):
        made = write_preview(data, labels, tmp_path / "out" / "p.mp4", per_kind=2, seconds=0.2)
        with av.open(str(made.video)) as film:
            frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
            stream = film.streams.video[0]
            assert stream.codec_context.name == "h264" and float(stream.average_rate) == SPEC.control_hz
        longest = [max(m.stop - m.start for m in made.moments if m.task == task) for task in SPEC.tasks]
        assert len(frames) == made.frames == sum(longest) == 8
        assert {frame.shape for frame in frames} == {(*page_size(KINDS, 2), 3)}
        height, width = page_size(KINDS, 2)
        assert Image.open(made.sheet).size == (width, height * len(SPEC.tasks))
        assert sorted(path.name for path in made.video.parent.iterdir()) == ["p.mp4", "p.png"]

    def test_an_interrupted_one_leaves_the_old_one(self, data, labels, tmp_path):
        out = tmp_path / "p.mp4"
        out.write_bytes(b"old")

        def interrupted(tasks):
            yield tasks[0]
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_preview(data, labels, out, per_kind=1, seconds=0.1, progress=interrupted)
        assert out.read_bytes() == b"old" and [path.name for path in tmp_path.iterdir()] == ["p.mp4"]

    def test_a_name_that_is_no_film(self, data, labels, tmp_path):
        with pytest.raises(LabelError, match=r"preview: expected a file name that ends in \.mp4, got .*p\.gif"):
            write_preview(data, labels, tmp_path / "p.gif")

    def test_the_command(self, data, tmp_path, capsys):
        command = ["label", "preview", "--dataset", str(data.root), "--labels", str(data.root.parent / "advantage")]
        assert cli.main([*command, "--out", str(tmp_path / "p.mp4"), "--per-kind", "1", "--seconds", "0.1"]) == 0
        assert "p.mp4: 6 clips" in " ".join(capsys.readouterr().out.split())
        assert cli.main([*command, "--out", str(tmp_path / "p.mp4"), "--per-kind", "0"]) == 2
        assert "expected at least 1 clip of every kind, got 0" in capsys.readouterr().err
