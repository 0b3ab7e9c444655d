import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_factory import make_table
from training.critic import _folds
from training.critic_loss import target_encoder
from training.critic_page import render
from training.critic_report import calibration_bins, calibration_error, episode_curves, validation_report
from training.presets import debug


def test_a_perfect_critic_gets_perfect_marks():
    table = make_table((6, 12, 30))
    report = validation_report(table, table.target.astype(float), np.arange(len(table)))
    assert report["spearman"] == pytest.approx(1.0)
    assert report["auc_25"] == report["auc_50"] == report["auc_75"] == 1.0
    assert report["mae"] == 0 and report["calibration_error"] == pytest.approx(0)
    assert report["episodes"] == 3 and report["successes"] == 2 and report["failure_drop"] == 0


def test_a_constant_critic_gets_none():
    table = make_table((6, 12, 30))
    report = validation_report(table, np.full(len(table), -0.5), np.arange(len(table)))
    assert report["auc_50"] == 0.5 and report["spearman"] is None
    assert report["calibration_error"] == pytest.approx(abs(-0.5 - table.target.mean()), abs=1e-6)


def test_figures_that_do_not_exist_are_none():
    table = make_table((6,))  # one failed episode
    report = validation_report(table, np.linspace(-0.2, -0.9, 6), np.arange(6))
    assert report["spearman"] is None and report["auc_50"] is None
    assert report["failure_drop"] < 0
    assert validation_report(table, np.zeros(6), np.arange(0)) == {"frames": 0}


def test_only_the_given_rows_count():
    table = make_table((6, 12, 30))
    values = table.target.astype(float).copy()
    values[18:] = 0.3  # nonsense on the last episode, which was trained on
    assert validation_report(table, values, np.arange(18))["mae"] == 0


def test_calibration_error_weighs_bins_by_frames():
    predicted = np.array([-0.95, -0.95, -0.95, -0.15])
    assert calibration_error(predicted, np.array([-0.95, -0.95, -0.95, -0.55])) == pytest.approx(0.1)


def test_folds_hold_every_episode_out_once():
    folds = _folds(np.arange(11), 3, 0)
    assert sorted(e for fold in folds for e in fold) == list(range(11))
    assert {len(fold) for fold in folds} == {3, 4}


@pytest.mark.parametrize("target", ["two_hot", "hl_gauss"])
def test_targets_are_distributions_around_the_return(target):
    from dataclasses import replace

    returns = np.array([-1.0, -0.5, -0.123, 0.0], np.float32)
    encoded = target_encoder(replace(debug.critic(), target=target))(returns)
    np.testing.assert_allclose(encoded.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(encoded @ np.linspace(-1, 0, 201), returns, atol=0.02)


def test_unknown_target_is_refused():
    from dataclasses import replace

    with pytest.raises(ValueError, match="expected two_hot or hl_gauss, got 'x'"):
        target_encoder(replace(debug.critic(), target="x"))


@given(st.integers(1, 200), st.integers(0, 99))
def test_calibration_bins_hold_every_frame_once_and_add_up_to_the_error(frames, seed):
    predicted, target = np.random.default_rng(seed).uniform(-1, 0, (2, frames))
    rows = calibration_bins(predicted, target)
    assert sum(row["frames"] for row in rows) == frames
    assert all(row["low"] - 1e-9 <= row["value"] <= row["high"] + 1e-9 for row in rows)
    assert sum(row["frames"] * row["value"] for row in rows) == pytest.approx(predicted.sum())
    error = sum(row["frames"] * abs(row["value"] - row["return"]) for row in rows) / frames
    assert calibration_error(predicted, target) == pytest.approx(error)


def judged(lengths=(6, 12, 30, 9, 20, 15), seed=0):
    table = make_table(lengths)
    noise = np.random.default_rng(seed).normal(0, 0.1, len(table)) * (1 + table.episode)
    return table, np.clip(table.target + noise, -1, 0)


def test_curves_are_whole_episodes_the_best_predicted_first():
    table, values = judged()
    rows = np.flatnonzero(table.episode != 2)
    curves = episode_curves(table, values, rows)
    assert {curve.index for curve in curves} == {0, 1, 3, 4, 5}
    errors = [curve.error for curve in curves]
    assert errors == sorted(errors) and errors[0] < errors[-1]
    for curve in curves:
        np.testing.assert_array_equal(curve.value, values[table.episode == curve.index])
        assert curve.success == (curve.index != 0) and curve.task == table.tasks[curve.index % 2]


class TestPage:
    def page(self, table, values, warnings=()):
        rows = np.arange(len(table))
        report = validation_report(table, values, rows) | {"warnings": list(warnings)}
        return render("critic", report, episode_curves(table, values, rows), folds=2)

    def test_it_shows_figures_calibration_and_the_best_and_worst_episodes(self):
        table, values = judged()
        page = self.page(table, values, ["--init <x> has trained on this"])
        assert page.count("data:image/svg+xml;base64,") == 4 and "http" not in page.replace("http-equiv", "")
        for text in ("Calibration", "Best predicted episodes", "Worst predicted episodes", "each blind to its fold"):
            assert text in page
        assert "--init &lt;x&gt; has trained on this" in page
        assert f"{validation_report(table, values, np.arange(len(table)))['auc_50']:.2f}" in page

    def test_the_same_critic_gives_the_same_page(self):
        """The page is part of the checkpoint, whose hash is over its files."""
        assert self.page(*judged()) == self.page(*judged())

    def test_one_episode_is_enough_and_none_says_so(self):
        assert "data:image/svg+xml" in self.page(*judged((7,)))
        empty = render("critic", {"frames": 0, "warnings": []}, [], folds=1)
        assert "No episode was held out: train with --folds 2" in empty

    def test_without_matplotlib_there_are_tables_and_a_word_on_how_to_get_pictures(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "recap_model.report.critic_plots", None)
        page = self.page(*judged())
        assert "pip install" in page and "recap-stack[report]" in page and "svg" not in page
        assert "mean |V - return|" in page and "mean value" in page
