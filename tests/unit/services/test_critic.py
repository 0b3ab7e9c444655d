"""The critic: what is remembered of an episode, when it alarms, what it answers and streams."""

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from recap_model import conditioning
from recap_model.spec import CriticSpec
from repository_factory import BINS, MAX_TOKENS, T_MAX, TASKS, expected_value, robot_spec
from service_harness import NativeClient, Served, critic_server, eventually, fetch, observation
from services.common import json_numpy
from services.common.settings import CriticSettings
from services.critic.alarms import AlarmRule
from services.critic.episodes import Episodes

SPEC = robot_spec()
CRITIC = CriticSpec(SPEC, MAX_TOKENS, BINS, -1.0, 0.0, dict.fromkeys(TASKS, T_MAX))


def episodes(**settings: Any) -> Episodes:
    return Episodes(CRITIC, CriticSettings(**settings))


def rule(values: list[float], *, stall_steps: float = 20) -> list[str | None]:
    alarm = AlarmRule(0.15, stall_steps)
    reasons = []
    for step, value in enumerate(values):
        alarm.update(step, value)
        reasons.append(alarm.reason)
    return reasons


def test_steady_progress_never_alarms() -> None:
    assert set(rule([-1 + t / 40 for t in range(40)])) == {None}


def test_a_fall_alarms_after_three_low_values_and_ends_with_recovery() -> None:
    reasons = rule([-0.5, -0.4, -0.3, -0.3, -0.6, -0.6, -0.6, -0.6, -0.6, -0.3, -0.3, -0.3])
    assert reasons[:5] == [None] * 5 and reasons[8] == "fallen" and reasons[-1] is None


def test_one_bad_value_is_noise() -> None:
    assert set(rule([-0.5, -0.4, -0.9, -0.35, -0.3, -0.9, -0.25])) == {None}


def test_a_stall_alarms_unless_it_is_nearly_done() -> None:
    assert rule([-0.5] * 30)[19:] == [None, *["stalled"] * 10]
    assert set(rule([-0.05] * 30)) == {None}


@given(st.lists(st.floats(-1, 0), min_size=1, max_size=80))
def test_the_rule_raises_once_per_alarm(values: list[float]) -> None:
    alarm, before = AlarmRule(0.15, 10), None
    for step, value in enumerate(values):
        raised = alarm.update(step, value)
        assert raised == (before is None and alarm.reason is not None)
        before = alarm.reason


def test_advantage_is_zero_when_the_value_rises_by_what_a_step_costs() -> None:
    memory = episodes(advantage_frames=5)
    track, _ = memory.begin("r", "e", TASKS[0])
    judged = [memory.add(track, -1 + t / T_MAX, t / SPEC.control_hz) for t in range(12)]
    assert [j.advantage for j in judged[:5]] == [None] * 5
    np.testing.assert_allclose([j.advantage for j in judged[5:]], 0, atol=1e-9)  # type: ignore[arg-type]
    assert judged[-1].seconds_to_success == pytest.approx((1 - 11 / T_MAX) * T_MAX / 20)


def test_advantage_counts_the_steps_that_passed_not_the_frames_that_came() -> None:
    memory = episodes(advantage_frames=4)
    track, _ = memory.begin("r", "e", TASKS[0])
    memory.add(track, -0.5, 0.0)
    judged = memory.add(track, -0.4, 8 / SPEC.control_hz)
    assert judged.step == pytest.approx(8) and judged.advantage == pytest.approx(0.1 - 8 / T_MAX)


def test_a_task_without_a_known_length_has_neither_advantage_nor_seconds() -> None:
    memory = episodes(advantage_frames=1)
    track, _ = memory.begin("r", "e", "juggle")
    judged = [memory.add(track, -0.5, None) for _ in range(3)][-1]
    assert judged.advantage is None and judged.seconds_to_success is None and judged.progress == 0.5


def test_outcomes_outlive_episodes_and_robots_are_bounded() -> None:
    memory = episodes(max_robots=2)
    for number, success in enumerate([True, False, None]):
        memory.begin("r", str(number), TASKS[0])
        assert memory.end("r", str(number), success) is not None
        assert memory.end("r", str(number), success) is None, "an episode ends once"
    assert [o["success"] for o in memory.tracks[0].outcomes] == [True, False, None]
    memory.begin("s", "0", TASKS[0])
    assert memory.begin("t", "0", TASKS[0])[1] == ["r"]
    assert memory.end("r", "9", True) is None


@pytest.fixture(scope="module")
def served(models: Path) -> Iterator[Served]:
    with critic_server(models) as server:
        yield server


def observe(seq: int, x: float, **parts: Any) -> dict[str, Any]:
    seen = observation(SPEC, state=np.array([x, 0, 0, 0], np.float32))
    return {
        "type": "observe",
        "seq": seq,
        "t_obs": seq / 20,
        "robot": "r1",
        "episode": "e1",
        "observation": seen,
        **parts,
    }


def test_the_websocket_answers_with_the_models_value(served: Served) -> None:
    with NativeClient(served.url("/value")) as client:
        assert client.welcome["kind"] == "critic" and client.welcome["spec"]["bins"] == BINS
        message = observe(3, -0.4)
        reply = client.ask(message)
        images = np.stack(list(message["observation"]["images"].values()))
        assert reply["type"] == "value" and reply["seq"] == 3
        assert reply["value"] == pytest.approx(expected_value(images, message["observation"]["state"]), abs=0.01)
        assert reply["progress"] == pytest.approx(1 + reply["value"]) and 0 <= reply["std"] < 0.1
        assert reply["seconds_to_success"] == pytest.approx(-reply["value"] * T_MAX / 20)
        assert reply["alarm"] is False and reply["advantage"] is None
        tokens, _ = served.engine.tokenizer(conditioning.unconditional_prompt(TASKS[0]))
        np.testing.assert_array_equal(served.engine.calls[-1]["tokens"][0], tokens)


def test_post_gives_the_same_as_the_websocket(served: Served) -> None:
    message = observe(0, -0.7, robot="poster")
    seen = message["observation"]
    body = {
        "robot": "poster",
        "episode": "p",
        "observation": {
            "images": {k: json_numpy.encode(v) for k, v in seen["images"].items()},
            "state": seen["state"].tolist(),
            "prompt": seen["prompt"],
        },
    }
    status, text = fetch(served.http("/value"), data=json.dumps(body).encode())
    with NativeClient(served.url("/value")) as client:
        assert status == 200 and json.loads(text)["value"] == pytest.approx(client.ask(message)["value"], abs=1e-6)


def test_bad_observations_are_named_and_the_connection_lives(served: Served) -> None:
    with NativeClient(served.url("/value")) as client:
        broken = observe(1, 0.0)
        broken["observation"]["state"] = np.full(4, np.nan, np.float32)
        reply = client.ask(broken)
        assert (reply["type"], reply["code"], reply["field"], reply["seq"]) == ("error", "bad_observation", "state", 1)
        assert client.ask(observe(2, -0.5))["type"] == "value"
    status, text = fetch(served.http("/value"), data=b'{"observation": 3}')
    assert status == 400 and json.loads(text)["error"]["field"] == "observation"


def test_a_listener_gets_the_past_and_then_what_happens(served: Served) -> None:
    with NativeClient(served.url("/value")) as client:
        client.ask({"type": "reset", "robot": "streamer", "episode": "s1", "task": TASKS[1]})
        past = client.ask(
            observe(0, -0.8, robot="streamer", episode="s1", observation=observation(SPEC, prompt=TASKS[1]))
        )
        with urllib.request.urlopen(served.http("/value/stream"), timeout=10) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            events = (json.loads(line[6:]) for line in stream if line.startswith(b"data: "))
            snapshot = next(event for event in events if event["robot"] == "streamer")
            assert snapshot["type"] == "snapshot" and snapshot["task"] == TASKS[1]
            assert snapshot["history"] == [[0.0, pytest.approx(past["value"], abs=1e-3)]]
            client.ask(
                observe(
                    4,
                    -0.5,
                    robot="streamer",
                    episode="s1",
                    act_latency_ms=7.5,
                    observation=observation(SPEC, prompt=TASKS[1]),
                )
            )
            value = next(events)
            assert (value["type"], value["robot"], value["episode"]) == ("value", "streamer", "s1")
            assert value["latency_ms"] == 7.5
            assert {"task", "step", "value", "progress", "alarm"} <= set(value)
            client.ask({"type": "outcome", "robot": "streamer", "episode": "s1", "success": True})
            outcome = next(events)
            assert outcome["type"] == "outcome" and outcome["success"] is True
            assert outcome["outcomes"] == [{"episode": "s1", "success": True, "steps": 4}]


def test_a_value_that_comes_after_the_next_episode_began_does_not_bring_the_old_one_back(served: Served) -> None:
    with NativeClient(served.url("/value")) as client:
        with served.engine.held():
            client.send(observe(1, -0.5, robot="late", episode="old"))
            served.engine.entered.wait(10)
            client.ask({"type": "outcome", "robot": "late", "episode": "old", "success": False})
            client.ask({"type": "reset", "robot": "late", "episode": "new", "task": TASKS[0]})
        assert client.receive()["episode"] == "old"
        track = next(t for t in served.service.episodes.tracks if t.robot == "late")
        assert track.episode == "new" and not track.points and [o["success"] for o in track.outcomes] == [False]


def test_two_senders_of_one_robot_do_not_supersede_each_other(served: Served) -> None:
    with NativeClient(served.url("/value")) as robot, NativeClient(served.url("/value")) as tap:
        with served.engine.held():
            robot.send(observe(1, -0.5, robot="blocker"))
            served.engine.entered.wait(10)
            robot.send(observe(2, -0.5, robot="shared"))
            tap.send(observe(3, -0.5, robot="shared"))
            eventually(lambda: served.service.batcher.depth == 2)
        assert [robot.receive()["type"] for _ in range(2)] == ["value"] * 2
        assert tap.receive()["type"] == "value"


def test_values_and_alarms_are_metrics(served: Served) -> None:
    with NativeClient(served.url("/value")) as client:
        for seq, x in enumerate([-0.2] * 3 + [-0.8] * 6):
            reply = client.ask(observe(seq, x, robot="faller"))
    assert reply["alarm"] is True and reply["alarm_reason"] == "fallen"
    families = {f.name: f for f in text_string_to_metric_families(served.get("/metrics")[1])}
    gauge = {s.labels["robot"]: s.value for s in families["recap_value"].samples}
    assert gauge["faller"] == pytest.approx(reply["value"])
    assert families["recap_value_alarms"].samples[0].value == 1


def test_the_page_needs_nothing_from_elsewhere(served: Served) -> None:
    status, page = served.get("/")
    assert status == 200 and "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
