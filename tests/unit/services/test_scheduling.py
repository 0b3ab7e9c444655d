"""Scheduling through the real service: what the metrics tell, whose copy the frames are, where JPEG is decoded."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from recap_client import wire
from recap_client.images import JpegImage, encode_jpeg
from repository_factory import robot_spec
from service_harness import NativeClient, Served, act, eventually, observation, policy_server
from services.common.channel import decode
from services.common.observation import Observation, decoded, read_observation
from services.policy.fronts.openpi import read_observation as read_openpi

ROBOT = robot_spec()


@pytest.fixture
def served(models: Path) -> Iterator[Served]:
    with policy_server(models) as served:
        yield served


def metric(served: Served, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(served.get("/metrics")[1])
    (value,) = [s.value for f in families for s in f.samples if s.name == name and s.labels == labels]
    return value


def test_the_metrics_tell_depth_busy_time_and_refusals(served: Served) -> None:
    clients = [NativeClient(served.url()) for _ in range(4)]
    with served.engine.held():
        clients[0].send(act(ROBOT))
        served.engine.entered.wait(10)
        for client in clients[1:]:
            client.send(act(ROBOT))
        eventually(lambda: metric(served, "recap_act_queue_depth") == 3)
    assert [client.receive()["type"] for client in clients] == ["chunk"] * 4
    assert metric(served, "recap_act_queue_depth") == 0
    assert metric(served, "recap_engine_busy_seconds_total") > 0
    for _ in range(16):
        served.service.batcher.times.record(1, 60.0, 1e12)
    before = len(served.engine.calls)
    reply = clients[0].ask(act(ROBOT, 7, deadline_ms=20_000.0))
    assert (reply["code"], reply["seq"], reply["field"]) == ("deadline", 7, "deadline_ms")
    assert reply["expected"].startswith("at least 60000") and len(served.engine.calls) == before
    assert metric(served, "recap_act_refused_deadlines_total", when="arrival") == 1
    assert metric(served, "recap_act_refused_deadlines_total", when="queue") == 0
    assert metric(served, "recap_act_deadline_misses_total") == 1
    for client in clients:
        client.socket.close()


def test_raw_frames_stay_the_memory_that_was_unpacked() -> None:
    """On both ways in: no copy between the unpacked message and the model's inputs."""
    seen = observation(ROBOT)
    native = decode(wire.pack({"type": "act", "observation": seen}), 1 << 20)
    flat = {f"observation/{name}": frame for name, frame in seen["images"].items()}
    openpi = decode(wire.pack(flat | {"observation/state": seen["state"], "prompt": seen["prompt"]}), 1 << 20)
    ways = [
        (read_observation(native), {name: native["observation"]["images"][name] for name in seen["images"]}),
        (read_openpi(openpi, ROBOT.camera_names), {name: openpi[f"observation/{name}"] for name in seen["images"]}),
    ]
    for read, unpacked in ways:
        images = asyncio.run(decoded(read, ROBOT.cameras)).images
        assert set(images) == set(ROBOT.camera_names)
        for name, frame in images.items():
            assert np.shares_memory(frame, unpacked[name]) and not frame.flags.owndata and not frame.flags.writeable
            np.testing.assert_array_equal(frame, seen["images"][name])


def test_the_robots_that_run_out_first_share_the_next_run(served: Served) -> None:
    """Ten wait, eight fit: the two with the longest reserve stay behind, though they came first."""
    clients = [NativeClient(served.url()) for _ in range(11)]
    with served.engine.held():
        clients[0].send(act(ROBOT))
        served.engine.entered.wait(10)
        for n, client in enumerate(clients[1:]):
            seen = observation(ROBOT, state=np.full(len(ROBOT.state), n / 100, np.float32))
            client.send(act(ROBOT, observation=seen, runs_out_ms=10_000.0 - 100 * n))
            eventually(lambda n=n: served.service.batcher.depth == n + 1)
    assert [client.receive()["type"] for client in clients] == ["chunk"] * 11
    runs = [[round(100 * float(state[0])) for state in call["state"]] for call in served.engine.calls[1:]]
    assert runs == [[9, 8, 7, 6, 5, 4, 3, 2], [1, 0]]
    for client in clients:
        client.socket.close()


def test_jpeg_is_decoded_while_every_other_thread_of_the_loop_is_taken() -> None:
    seen = observation(ROBOT)
    files = {name: JpegImage(encode_jpeg(frame)) for name, frame in seen["images"].items()}

    async def test() -> set[str]:
        loop, release = asyncio.get_running_loop(), threading.Event()
        others = [loop.run_in_executor(None, release.wait, 60) for _ in range(64)]
        try:
            asking = decoded(Observation(files, seen["state"], seen["prompt"]), ROBOT.cameras)
            images = (await asyncio.wait_for(asking, 30)).images
            assert not any(other.done() for other in others)
        finally:
            release.set()
            await asyncio.gather(*others)
        return set(images)

    assert asyncio.run(test()) == set(ROBOT.camera_names)


@pytest.mark.slow
def test_the_fleet_benchmark_reports_what_it_should(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    from benchmarks.fleet import main

    short = ["--robots", "5", "--seconds", "1", "--saturate", "1", "--repeats", "5"]
    assert main(["--models", str(models), *short]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["batch"] for row in result["engine"]] == [1, 2, 4, 8]
    assert result["saturated_batch_1"]["mean_batch"] == 1.0 <= result["saturated"]["mean_batch"]
    for part in ("at_rate", "saturated", "saturated_batch_1"):
        assert result[part]["failed"] == 0 and result[part]["requests_per_s"] > 0
    assert result["at_rate"]["worst_over_median_p99"] >= 1.0
