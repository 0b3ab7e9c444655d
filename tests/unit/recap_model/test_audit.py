"""The label audit counts every frame once and warns about the usual mistakes."""

import json

import numpy as np

from recap_model.advantage import Frames, LabelRules, Labels, indicators
from recap_model.audit import audit, cells, render_html


def make(success, intervention=None, episodes=4, length=25, task="push the <b>red</b> block"):
    count = episodes * length
    return Frames(
        np.repeat(np.arange(episodes), length),
        np.full(count, task, dtype=object),
        np.zeros(count, bool) if intervention is None else intervention,
        np.zeros(count, bool),
        np.repeat(success, length),
    )


def test_every_frame_is_counted_once():
    random = np.random.default_rng(0)
    frames = make(np.array([True, False, True, False]), random.random(100) < 0.2)
    values = random.normal(size=100)
    rules = LabelRules(n=3)
    labels = indicators(frames, values, rules)
    result = audit(frames, values, labels, rules)
    assert sum(row.frames for row in result.rows) == 100 == sum(result.sources.values())
    assert sum(row.positive for row in result.rows) == (labels.indicator == 1).sum()
    assert all(row.negative >= 0 and len(cells(row)) == 10 for row in result.rows)
    json.dumps(result.to_json(), allow_nan=False)


def test_it_warns_when_failures_supply_many_of_the_positives():
    frames = make(np.array([True, False, True, False]))
    values = np.random.default_rng(0).normal(size=100)
    free, strict = LabelRules(n=3), LabelRules(n=3, failures_negative=True)
    assert any(
        "failed episodes supply" in text
        for text in audit(frames, values, indicators(frames, values, free), free).warnings
    )
    result = audit(frames, values, indicators(frames, values, strict), strict)
    assert not result.warnings and result.failed_share == 0


def test_it_warns_about_a_critic_that_tells_nothing_apart():
    frames, values, rules = make(np.full(4, True)), np.zeros(100), LabelRules(n=3)
    texts = " ".join(audit(frames, values, indicators(frames, values, rules), rules).warnings)
    assert "no frame is positive" in texts and "equal advantages" in texts


def test_it_warns_when_the_look_ahead_is_longer_than_the_episodes():
    frames, values, rules = make(np.full(4, True)), np.arange(100.0), LabelRules(n=50)
    assert any("n = 50" in text for text in audit(frames, values, indicators(frames, values, rules), rules).warnings)


def test_the_page_stands_alone_and_escapes_the_task():
    frames, values, rules = make(np.full(4, True)), np.arange(100.0), LabelRules(n=3)
    labels = Labels(np.zeros(100, np.int8), np.zeros(100), np.full(100, "computed", dtype=object))
    page = render_html(audit(frames, values, labels, rules), title="Label audit of <x>")
    assert "&lt;b&gt;red" in page and "<b>red" not in page and "&lt;x&gt;" in page
    assert "http" not in page and "src=" not in page
