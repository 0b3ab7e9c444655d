"""The policy service over `recap.v1`: chunks, seeds, order, errors, health."""

from collections.abc import Iterator
from pathlib import Path
from threading import Thread, Timer

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from recap_client.images import JpegImage, decode_jpeg, encode_jpeg
from recap_model import conditioning
from recap_model.spec import spec_from_json
from repository_factory import CHUNK, TASKS, build_repository, expected_actions, robot_spec
from service_harness import NativeClient, Served, act, eventually, observation, policy_server
from services.common.metrics import LATENCY_BUCKETS_S, STAGES
from services.common.settings import PolicySettings

SPEC = robot_spec()


@pytest.fixture(scope="module")
def served(models: Path) -> Iterator[Served]:
    with policy_server(models) as server:
        yield server


@pytest.fixture
def client(served: Served) -> Iterator[NativeClient]:
    with NativeClient(served.url()) as native:
        yield native


def test_the_first_message_introduces_the_model(client: NativeClient, served: Served) -> None:
    welcome = client.welcome
    assert (welcome["type"], welcome["protocol"], welcome["kind"]) == ("welcome", "recap.v1", "policy")
    assert (welcome["beta"], welcome["conditioning"]) == (1.0, "positive")
    assert welcome["model"] == {"name": "policy", "version": "1", "hash": served.engine.hash}
    assert spec_from_json(welcome["spec"]).robot == SPEC


def test_a_chunk_is_what_the_model_makes_of_the_observation_and_the_seed(client: NativeClient, served: Served) -> None:
    seen = observation(SPEC, seed=3)
    reply = client.ask(act(SPEC, seq=7, observation=seen, seed=11))
    assert (reply["type"], reply["seq"], reply["t_obs"]) == ("chunk", 7, 12.5)
    assert reply["actions"].dtype == np.float32 and reply["actions"].shape == (CHUNK, 4)
    tokens, mask = served.engine.tokenizer(conditioning.positive_prompt(seen["prompt"]))
    noise = np.random.default_rng([11, 7]).standard_normal((CHUNK, 4), dtype=np.float32)
    images = np.stack([seen["images"]["front"], seen["images"]["top"]])
    want = expected_actions(images, seen["state"], tokens, mask, noise)
    np.testing.assert_allclose(reply["actions"], want, atol=1e-4)
    timing = reply["server_timing"]
    assert {"decode_ms", "queue_ms", "infer_ms", "encode_ms", "total_ms"} <= set(timing)
    assert all(isinstance(value, float) and value >= 0 for value in timing.values())


def test_a_seed_repeats_a_chunk_and_without_one_the_noise_moves_on(client: NativeClient) -> None:
    first, again = client.ask(act(SPEC, seed=5)), client.ask(act(SPEC, seed=5))
    np.testing.assert_array_equal(first["actions"], again["actions"])
    assert not np.array_equal(client.ask(act(SPEC, seed=6))["actions"], first["actions"])
    assert not np.array_equal(client.ask(act(SPEC))["actions"], client.ask(act(SPEC))["actions"])


def test_jpeg_frames_reach_the_model_as_their_pixels(client: NativeClient, served: Served) -> None:
    seen = observation(SPEC)
    files = {name: encode_jpeg(image, 95) for name, image in seen["images"].items()}
    client.ask(act(SPEC, observation=seen | {"images": {k: JpegImage(v) for k, v in files.items()}}))
    pixels = [decode_jpeg(files[camera]) for camera in ("front", "top")]
    np.testing.assert_array_equal(served.engine.calls[-1]["images"][0], pixels)


def test_reset_outcome_and_ping_are_answered(client: NativeClient) -> None:
    assert client.ask({"type": "reset", "robot": "r", "episode": "e", "task": TASKS[0]}) == {"type": "ok"}
    assert client.ask({"type": "outcome", "robot": "r", "episode": "e", "success": True}) == {"type": "ok"}
    pong = client.ask({"type": "ping", "t": 4.25})
    assert pong["type"] == "pong" and pong["t"] == 4.25 and isinstance(pong["t_server"], float)


def test_the_newest_observation_of_a_session_wins(served: Served, client: NativeClient) -> None:
    with served.engine.held():
        client.send(act(SPEC, 1))
        served.engine.entered.wait(10)
        for seq in (2, 3, 4):
            client.send(act(SPEC, seq))
        replaced = [client.receive() for _ in range(2)]
    assert [(reply["seq"], reply["code"]) for reply in replaced] == [(2, "superseded"), (3, "superseded")]
    assert [client.receive()["seq"] for _ in range(2)] == [1, 4]


def test_sessions_that_wait_are_answered_in_one_batch(served: Served, client: NativeClient) -> None:
    others = [NativeClient(served.url()) for _ in range(5)]
    alone = [other.ask(act(SPEC, observation=observation(SPEC, seed=i), seed=i)) for i, other in enumerate(others)]
    with served.engine.held():
        client.send(act(SPEC, 1))
        served.engine.entered.wait(10)
        for i, other in enumerate(others):
            other.send(act(SPEC, observation=observation(SPEC, seed=i), seed=i))
        eventually(lambda: served.service.batcher.depth == 5)
    together = [other.receive() for other in others]
    assert [reply["server_timing"]["batch_size"] for reply in together] == [5.0] * 5
    for one, all_ in zip(alone, together, strict=True):
        np.testing.assert_allclose(one["actions"], all_["actions"], atol=1e-6)
    client.receive()
    for other in others:
        other.socket.close()


def test_a_deadline_is_answered_while_the_engine_runs(served: Served, client: NativeClient) -> None:
    with served.engine.held():
        reply = client.ask(act(SPEC, 9, deadline_ms=30.0))
    assert (reply["type"], reply["seq"], reply["code"]) == ("error", 9, "deadline")
    assert client.ask(act(SPEC, 10, deadline_ms=20_000.0))["type"] == "chunk"


def test_health_and_metrics_answer_while_the_engine_runs(served: Served, client: NativeClient) -> None:
    with served.engine.held():
        client.send(act(SPEC))
        served.engine.entered.wait(10)
        assert served.get("/livez") == (200, "OK\n")
        assert served.get("/healthz") == (200, "OK\n")
        assert served.get("/readyz")[0] == 200
        assert served.get("/metrics")[0] == 200
        assert client.ask({"type": "ping", "t": 1.0})["type"] == "pong"
    assert client.receive()["type"] == "chunk"


def test_metrics_have_the_agreed_names_and_buckets(served: Served, client: NativeClient) -> None:
    client.ask(act(SPEC))
    families = {f.name: f for f in text_string_to_metric_families(served.get("/metrics")[1])}
    assert {
        "recap_act_latency_seconds",
        "recap_act_requests",
        "recap_act_batch_size",
        "recap_act_superseded",
        "recap_act_deadline_misses",
        "recap_sessions",
        "recap_model_info",
    } <= set(families)
    buckets: dict[str, list[float]] = {}
    for sample in families["recap_act_latency_seconds"].samples:
        if sample.name.endswith("_bucket") and sample.labels["le"] != "+Inf":
            buckets.setdefault(sample.labels["stage"], []).append(float(sample.labels["le"]))
    milliseconds = (1, 2, 5, 8, 10, 15, 20, 25, 33, 40, 50, 66, 100, 150, 250, 500, 1000)
    assert buckets == {stage: [ms / 1000 for ms in milliseconds] for stage in STAGES}
    assert len(LATENCY_BUCKETS_S) == len(milliseconds)
    ok = [s for s in families["recap_act_requests"].samples if s.labels == {"dialect": "recap.v1", "code": "ok"}]
    assert ok[0].name == "recap_act_requests_total" and ok[0].value >= 1
    assert families["recap_model_info"].samples[0].labels["version"] == "1"
    assert next(iter(families["recap_sessions"].samples)).value >= 1


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_the_flow_begins_at_a_part_of_its_noise(models: Path, scale: float) -> None:
    with policy_server(models, noise_scale=scale) as served, NativeClient(served.url()) as client:
        assert client.welcome["noise_scale"] == scale
        replies = [client.ask(act(SPEC, seed=seed)) for seed in (1, 2)]
        whole = np.random.default_rng([2, 1]).standard_normal((CHUNK, 4), dtype=np.float32)
        np.testing.assert_array_equal(served.engine.calls[-1]["noise"][0], whole * np.float32(scale))
        assert np.array_equal(replies[0]["actions"], replies[1]["actions"]) == (scale == 0)


def test_a_part_of_the_noise_is_none_to_all_of_it() -> None:
    with pytest.raises(ValueError, match=r"noise_scale: expected 0 to 1, got 1\.5"):
        PolicySettings(noise_scale=1.5)


def test_guidance_reaches_the_model_with_both_prompts(models: Path) -> None:
    with policy_server(models, beta=2.5) as served, NativeClient(served.url()) as client:
        assert client.welcome["beta"] == 2.5
        assert client.ask(act(SPEC))["type"] == "chunk"
        call, tokenizer = served.engine.calls[-1], served.engine.tokenizer
        np.testing.assert_array_equal(call["tokens"][0], tokenizer(conditioning.positive_prompt(TASKS[0]))[0])
        np.testing.assert_array_equal(
            call["unconditional_tokens"][0], tokenizer(conditioning.unconditional_prompt(TASKS[0]))[0]
        )
        assert call["beta"].tolist() == [2.5]


def test_actions_that_are_not_finite_are_never_sent(tmp_path: Path) -> None:
    models = build_repository(tmp_path, models=["policy"], nan_actions=True)
    with policy_server(models) as served, NativeClient(served.url()) as client:
        reply = client.ask(act(SPEC))
        assert (reply["type"], reply["code"], reply["field"]) == ("error", "internal", "actions")
        assert client.ask({"type": "ping", "t": 0.0})["type"] == "pong"


def test_a_key_is_asked_of_every_caller_when_there_is_one(models: Path) -> None:
    with policy_server(models, api_key="secret") as served:
        for headers in ({}, {"Authorization": "Api-Key wrong"}, {"Authorization": "Basic secret"}):
            with pytest.raises(InvalidStatus) as error:
                connect(served.url(), additional_headers=headers, proxy=None).recv()
            assert error.value.response.status_code == 401
        for scheme in ("Api-Key", "Bearer"):
            with NativeClient(served.url(), additional_headers={"Authorization": f"{scheme} secret"}) as client:
                assert client.ask(act(SPEC))["type"] == "chunk"
        assert served.get("/livez")[0] == 200


def test_a_web_page_of_a_stranger_cannot_drive_a_robot(served: Served) -> None:
    with pytest.raises(InvalidStatus):
        connect(served.url(), origin="http://evil.example", proxy=None).recv()  # type: ignore[arg-type]


def test_stopping_finishes_what_was_asked_and_says_goodbye(models: Path) -> None:
    with policy_server(models) as served:
        client, idle = NativeClient(served.url()), NativeClient(served.url())
        served.engine.gate.clear()
        client.send(act(SPEC, 1))
        served.engine.entered.wait(10)
        Timer(0.4, served.engine.gate.set).start()
        replies: list[dict] = []
        reader = Thread(target=lambda: replies.append(client.receive()))
        reader.start()
    reader.join(10)
    assert replies[0]["type"] == "chunk" and replies[0]["seq"] == 1
    for one in (client, idle):
        with pytest.raises(ConnectionClosed, match="1001"):
            one.receive(5)


def test_an_engine_that_hangs_does_not_keep_the_service_from_stopping(models: Path) -> None:
    with policy_server(models) as served:
        client = NativeClient(served.url())
        served.engine.gate.clear()
        client.send(act(SPEC, 1))
        served.engine.entered.wait(10)
    served.engine.gate.set()
    with pytest.raises(ConnectionClosed, match="1001"):
        client.receive(5)


def test_a_request_after_the_end_has_begun_is_told_so(models: Path) -> None:
    with policy_server(models) as served, NativeClient(served.url()) as client:
        served.service.connections.stopping.set()
        reply = client.ask(act(SPEC))
        assert (reply["type"], reply["code"]) == ("error", "shutting_down")
        assert served.get("/readyz")[0] == 503
