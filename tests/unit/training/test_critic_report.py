import numpy as np
import pytest

from model_factory import make_table
from training.critic import _folds, target_encoder
from training.critic_report import calibration_error, validation_report
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
    assert report["auc_50"] == 0.5
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
