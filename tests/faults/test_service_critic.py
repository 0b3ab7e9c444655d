"""The critic beside the policy: present, absent, slow, restarted. The policy must not notice."""

from pathlib import Path

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from recap_client.images import JpegImage, encode_jpeg
from repository_factory import TASKS, robot_spec
from service_harness import NativeClient, Served, act, critic_server, eventually, observation, policy_server

SPEC = robot_spec()


def tapped(policy: Served) -> dict[str, float]:
    families = {f.name: f for f in text_string_to_metric_families(policy.get("/metrics")[1])}
    return {s.labels["result"]: s.value for s in families["recap_tap_observations"].samples}


def track(critic: Served, robot: str = "r1"):
    return next((t for t in critic.service.episodes.tracks if t.robot == robot), None)


def test_observations_latency_and_outcomes_reach_the_critic(models: Path) -> None:
    with (
        critic_server(models) as critic,
        policy_server(models, critic_url=critic.url("/value"), critic_hz=1000) as policy,
    ):
        eventually(lambda: policy.service.tap.connected)
        with NativeClient(policy.url()) as client:
            client.ask({"type": "reset", "robot": "r1", "episode": "e1", "task": TASKS[0]})
            for seq in range(4):
                client.ask(act(SPEC, seq, t_obs=seq * 0.2))
                eventually(lambda: track(critic) is not None and len(track(critic).points) > seq)  # noqa: B023
            client.ask({"type": "outcome", "robot": "r1", "episode": "e1", "success": True})
            seen = eventually(lambda: track(critic) if track(critic).finished else None)
        assert [round(step) for step, _ in seen.points] == [0, 4, 8, 12]
        assert seen.latency_ms > 0 and seen.outcomes[0]["success"] is True
        np.testing.assert_array_equal(critic.engine.calls[-1]["images"], policy.engine.calls[-1]["images"])
        assert tapped(policy)["sent"] == 4


def test_a_robot_that_asks_the_critic_itself_is_not_forwarded(models: Path) -> None:
    with (
        critic_server(models) as critic,
        policy_server(models, critic_url=critic.url("/value"), critic_hz=1000) as policy,
    ):
        eventually(lambda: policy.service.tap.connected)
        with NativeClient(policy.url()) as client:
            client.ask({"type": "reset", "robot": "own", "episode": "e1", "task": TASKS[0], "forward": False})
            client.ask(act(SPEC, 0, robot="own", forward=False))
            client.ask({"type": "reset", "robot": "other", "episode": "e1", "task": TASKS[0]})
            client.ask(act(SPEC, 1, robot="other"))
            eventually(lambda: track(critic, "other") is not None and track(critic, "other").points)
        assert track(critic, "own") is None and tapped(policy)["sent"] == 1


def test_jpeg_frames_are_forwarded_as_they_came(models: Path) -> None:
    with critic_server(models) as critic, policy_server(models, critic_url=critic.url("/value")) as policy:
        eventually(lambda: policy.service.tap.connected)
        seen = observation(SPEC)
        files = {name: JpegImage(encode_jpeg(image)) for name, image in seen["images"].items()}
        with NativeClient(policy.url()) as client:
            client.ask(act(SPEC, observation=seen | {"images": files}))
            eventually(lambda: critic.engine.calls)
        np.testing.assert_array_equal(critic.engine.calls[0]["images"], policy.engine.calls[0]["images"])


def test_a_critic_that_is_not_there_is_counted_and_not_waited_for(models: Path) -> None:
    with policy_server(models, critic_url="ws://127.0.0.1:9/value") as policy, NativeClient(policy.url()) as client:
        for seq in range(5):
            assert client.ask(act(SPEC, seq))["type"] == "chunk"
        assert tapped(policy)["failed"] == 5
        assert policy.get("/readyz")[0] == 200


def test_a_slow_critic_costs_frames_and_not_time(models: Path) -> None:
    with (
        critic_server(models) as critic,
        policy_server(models, critic_url=critic.url("/value"), critic_hz=1e6) as policy,
    ):
        eventually(lambda: policy.service.tap.connected)
        with critic.engine.held(), NativeClient(policy.url()) as client:
            for seq in range(30):
                assert client.ask(act(SPEC, seq))["type"] == "chunk"
            assert tapped(policy)["dropped"] >= 25


def test_a_restarted_critic_is_found_again_and_outcomes_are_not_lost(models: Path) -> None:
    with critic_server(models) as first:
        port = first.port
        with policy_server(models, critic_url=first.url("/value"), critic_hz=1000) as policy:
            eventually(lambda: policy.service.tap.connected)
            client = NativeClient(policy.url())
            client.ask(act(SPEC))
            eventually(lambda: track(first))
            _stop(first)
            eventually(lambda: not policy.service.tap.connected)
            assert client.ask(act(SPEC, 2))["type"] == "chunk"
            client.ask({"type": "reset", "robot": "r1", "episode": "e2", "task": TASKS[0]})
            client.ask({"type": "outcome", "robot": "r1", "episode": "e2", "success": False})
            with critic_server(models, port=port) as second:
                seen = eventually(lambda: track(second), timeout=15)
                eventually(lambda: track(second).finished)
                assert seen.episode == "e2" and track(second).outcomes[0]["success"] is False
                eventually(
                    lambda: client.ask(act(SPEC, 3, episode="e3"))["type"] == "chunk" and track(second).episode == "e3"
                )
            client.socket.close()


def _stop(served: Served) -> None:
    """Ask a served app's server to end, and wait until its port is free."""
    served.running.stop()
    eventually(lambda: not _listening(served.port))


def _listening(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
