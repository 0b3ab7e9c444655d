"""The optimisation loop: it learns, it resumes exactly, it refuses what it cannot resume."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from model_factory import TOKENIZER, make_policy, make_table
from training.loader import Loader, Sampler
from training.loop import ResumeError, fit
from training.optim import Average, OptimConfig, rate
from training.policy import policy_loss
from training.settings import FitSettings

SETTINGS = FitSettings(steps=12, batch_size=8, save_every=4, log_every=3, optim=OptimConfig(lr=3e-3, warmup=2))


def run(work, settings=SETTINGS, stop_at=None, fail_at=None):
    policy, table = make_policy().train(), make_table()
    loader = Loader(table, TOKENIZER, chunk=8, dropout=0.3, shift=2, seed=0)
    sampler = Sampler(np.arange(len(table)), settings.batch_size, 0)

    def loss_step(step, generator):
        if step == stop_at:
            raise KeyboardInterrupt
        loss = policy_loss(policy, loader(sampler(step), step), 2, generator)
        return loss * float("nan") if step == fail_at else loss

    average = fit(policy, loss_step, settings, work, what="test", identity={"a": 1})
    return dict(policy.named_parameters()), average


def test_an_interrupted_run_ends_bit_equal_to_a_straight_one(tmp_path):
    weights, average = run(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", stop_at=7)
    resumed, resumed_average = run(tmp_path / "broken")
    for name, value in weights.items():
        assert torch.equal(value, resumed[name]), name
        assert torch.equal(average.shadow[name], resumed_average.shadow[name]), name
    lines = [(tmp_path / kind / "metrics.jsonl").read_text().splitlines() for kind in ("straight", "broken")]
    assert [json.loads(line)["step"] for line in lines[0]] == [3, 6, 9, 12]
    assert json.loads(lines[0][-1])["loss"] == json.loads(lines[1][-1])["loss"]


def test_ctrl_c_in_the_middle_of_a_step_loses_and_repeats_nothing(tmp_path, monkeypatch):
    weights, average = run(tmp_path / "straight")
    update = Average.update

    def interrupted(self, module, step):
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        update(self, module, step)

    monkeypatch.setattr(Average, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken")
    monkeypatch.setattr(Average, "update", update)
    resumed, resumed_average = run(tmp_path / "broken")
    for name, value in weights.items():
        assert torch.equal(value, resumed[name]), name
        assert torch.equal(average.shadow[name], resumed_average.shadow[name]), name


def test_a_killed_run_resumes_from_its_last_saved_state(tmp_path):
    weights, _ = run(tmp_path / "straight")
    with pytest.raises(FloatingPointError, match="loss at step 9: expected a finite number, got nan"):
        run(tmp_path / "broken", fail_at=9)  # dies without saving; the state of step 8 is there
    resumed, _ = run(tmp_path / "broken")
    assert all(torch.equal(value, resumed[name]) for name, value in weights.items())


def test_another_run_is_not_resumed(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop_at=5)
    with pytest.raises(ResumeError, match="holds an unfinished run with other fit"):
        run(tmp_path, settings=replace(SETTINGS, batch_size=4))


def test_training_reduces_the_loss(tmp_path):
    run(tmp_path, replace(SETTINGS, steps=60, log_every=20))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]


def test_rate_rises_then_falls_to_its_floor():
    config = OptimConfig(lr=1.0, warmup=10, final=0.02)
    rates = [rate(s, 200, config) for s in range(201)]
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[9] == 1.0 and rates[200] == pytest.approx(0.02)


def test_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tracker: expected one of none, tensorboard, wandb, got 'x'"):
        run(tmp_path, settings=replace(SETTINGS, tracker="x"))


def test_tensorboard_writes_events(tmp_path):
    run(tmp_path, replace(SETTINGS, steps=3, tracker="tensorboard"))
    assert list((tmp_path / "tensorboard").glob("events.*"))
