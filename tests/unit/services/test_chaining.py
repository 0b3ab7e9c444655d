"""Real-time chunking end to end: a real exported graph in a real service, asked by the real control loop."""

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from exporters.torch_graph import write_torch
from exporters.wrap import policy_graph
from model_factory import ROBOT, TASKS, save_policy
from recap_client.delay import Delay
from recap_client.policy import RemotePolicy
from recap_client.robots.base import Observation, StepResult
from recap_client.runtime import LoopSettings, run_episode
from recap_model.manifest import publish, write_manifest
from recap_model.policy.load import load_policy
from recap_model.policy.static import GraphOptions
from recap_model.rtc import correct, inpainting_weights, prefix_weights
from recap_model.spec import PolicySpec, write_spec
from repository_factory import robot_spec
from service_harness import NativeClient, Served, SpyEngine, act, policy_server
from services.common.errors import ServiceError
from services.common.repository import open_model
from services.common.server import running
from services.common.settings import PolicySettings
from services.common.torch_engine import TorchEngine
from services.policy.app import create_app
from services.policy.chaining import SCHEDULE, Previous, graph_inputs, read_previous

SPEC = PolicySpec(ROBOT, 8, 16)
CHUNK, WIDTH, STEPS = 8, 4, 3
SHAPES = {"previous": (CHUNK, WIDTH), "prefix_weights": (CHUNK,), "guidance_weights": (STEPS,)}
NAN = np.full((2, WIDTH), np.nan, np.float32)


@pytest.fixture(scope="module")
def continuing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service whose graph was made from a checkpoint with the inputs of real-time chunking."""
    root = tmp_path_factory.mktemp("rtc")
    policy, files = load_policy(save_policy(root / "checkpoint"))
    graph = policy_graph("policy", policy, GraphOptions(rtc=True), files)
    with publish(root / "models" / "policy") as folder:
        (version := folder / "1").mkdir()
        write_torch(graph, version)
        write_spec(files.spec, version / "spec.json")
        files.tokenizer.save(version / "tokenizer.json")
        write_manifest(version, "model", parents={"checkpoint": files.manifest.hash}, parameters={})
    engine = SpyEngine(TorchEngine(open_model(root / "models", "policy"), device="cpu"))
    app = create_app(engine, PolicySettings())  # type: ignore[arg-type]
    with running(app, app.state.limits) as bound:
        yield Served(bound, app.state.service, engine)


@pytest.fixture(scope="module")
def plain(models: Path) -> Iterator[Served]:
    """A service whose graph has no such inputs."""
    with policy_server(models) as served:
        yield served


class Table:
    """A robot of the model's spec that only counts; its frames depend on the scene and the step."""

    spec = ROBOT

    def __init__(self, spec: Any = ROBOT, limit: int = 40) -> None:
        self.spec, self.limit, self.done = spec, limit, list[np.ndarray | None]()

    def prompt(self, task: str) -> str:
        return task

    def reset(self, task: str, seed: int) -> None:  # noqa: ARG002
        self.done, self.random = [], np.random.default_rng(seed)

    def observe(self) -> Observation:
        images = {c.name: self.random.integers(0, 256, (c.height, c.width, 3), np.uint8) for c in self.spec.cameras}
        state = self.random.uniform(-1, 1, len(self.spec.state)).astype(np.float32)
        return Observation(images, state, time.monotonic())

    def act(self, action: np.ndarray) -> StepResult:
        return self._step(action)

    def hold(self) -> StepResult:
        return self._step(None)

    def _step(self, action: np.ndarray | None) -> StepResult:
        self.done.append(action)
        over = len(self.done) >= self.limit
        return StepResult(over, False if over else None, np.zeros(len(self.spec.action), np.float32))

    def close(self) -> None: ...


def episode(served: Served, robot: Table | None = None, **settings: Any) -> Any:
    """(result, robot, the engine's calls) of one episode in lock step."""
    robot = robot or Table()
    served.engine.calls.clear()
    policy = RemotePolicy(served.url(), robot.spec)
    try:
        loop = LoopSettings(realtime=False, **settings)
        result = run_episode(robot, robot.spec.tasks[0], 3, policy=policy, settings=loop)
    finally:
        policy.close()
    return result, robot, list(served.engine.calls)


def ramp(rows: int = CHUNK) -> np.ndarray:
    return np.linspace(-0.4, 0.6, rows * WIDTH, dtype=np.float32).reshape(rows, WIDTH)


def test_the_welcome_says_whether_the_model_can_continue_a_chunk(continuing: Served, plain: Served) -> None:
    for served, able in ((continuing, True), (plain, False)):
        with NativeClient(served.url()) as client:
            assert client.welcome["rtc"] is able


def test_rows_reach_the_graph_where_they_belong(continuing: Served) -> None:
    """What the engine sees is the request's chunk from row 0 on, with the schedule of the library."""
    with NativeClient(continuing.url()) as client:
        for horizon, fields in ((2, {}), (4, {"horizon": 4}), (5, {"horizon": 50})):
            reply = client.ask(act(ROBOT, previous=ramp(5), delay=2, seed=1, **fields))
            assert reply["type"] == "chunk"
            seen = continuing.engine.calls[-1]
            np.testing.assert_array_equal(seen["previous"][0, :5], ramp(5))
            np.testing.assert_array_equal(seen["prefix_weights"][0], prefix_weights(2, horizon, CHUNK, SCHEDULE))
            np.testing.assert_array_equal(seen["guidance_weights"][0], inpainting_weights(STEPS))


def test_the_rows_that_will_have_run_come_back_and_the_rest_is_new(continuing: Served) -> None:
    with NativeClient(continuing.url()) as client:
        free = client.ask(act(ROBOT, seed=1))["actions"]
        for delay in range(1, CHUNK + 1):
            held = client.ask(act(ROBOT, seed=1, previous=ramp(), delay=delay))["actions"]
            np.testing.assert_allclose(held[:delay], ramp()[:delay], atol=1e-5)
            assert (np.abs(held - ramp())[delay:].max(axis=1) > 1e-3).all()
            assert delay == CHUNK or np.abs(held - free)[delay:].max() > 1e-4, "the rest fits what was held"
        np.testing.assert_array_equal(client.ask(act(ROBOT, seed=1))["actions"], free)


@given(st.integers(1, 20), st.integers(0, 2**32))
def test_a_held_row_goes_straight_from_its_noise_to_the_old_action(steps: int, seed: int) -> None:
    """At every step it is t noise + (1 - t) action, whatever the model's velocities are."""
    random = np.random.default_rng(seed)
    noise, action = random.normal(size=(2, 1, 3, WIDTH))
    x = noise
    for i, gain in enumerate(inpainting_weights(steps).astype(float)):
        t = 1 - i / steps
        np.testing.assert_allclose(x, t * noise + (1 - t) * action, atol=1e-5)
        velocity = random.normal(size=x.shape)
        x = x - correct(velocity, x, t, action, np.ones((1, 3, 1)), gain) / steps
    np.testing.assert_allclose(x, action, atol=1e-5)


def test_the_whole_chunk_is_what_the_graph_makes_of_these_inputs(continuing: Served) -> None:
    with NativeClient(continuing.url()) as client:
        reply = client.ask(act(ROBOT, previous=ramp(6), delay=2, seed=4))
    inputs = dict(continuing.engine.calls[-1])
    inputs["previous"] = inputs["previous"].copy()
    inputs["previous"][:, 6:] = 0.9  # beyond the old chunk: no weight, no effect
    again = continuing.engine._engine.run(inputs)["actions"][0]
    np.testing.assert_allclose(np.clip(again, -1, 1), reply["actions"], atol=1e-6)


@given(st.integers(1, CHUNK), st.integers(0, 99), st.integers(0, 99))
def test_the_graphs_inputs_hold_only_rows_of_the_old_chunk(rows: int, delay: int, horizon: int) -> None:
    inputs = graph_inputs(Previous(ramp(rows), delay, horizon), SHAPES)
    assert {name: array.shape for name, array in inputs.items()} == SHAPES
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in inputs.values())
    weights = inputs["prefix_weights"]
    assert (weights[min(rows, horizon) :] == 0).all() and (weights[: min(delay, rows, horizon)] == 1).all()
    assert (np.diff(weights) <= 0).all()
    np.testing.assert_array_equal(inputs["previous"][:rows], ramp(rows))


def test_no_previous_chunk_is_zeros_and_zeros_are_off() -> None:
    assert all(not array.any() for array in graph_inputs(None, SHAPES).values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"previous": [[0.0] * WIDTH]}, "previous: expected float32 [1 to 8, 4], got list"),
        ({"previous": ramp(9)}, "previous: expected float32 [1 to 8, 4], got float32 [9, 4]"),
        ({"previous": ramp()[:0]}, "previous: expected float32 [1 to 8, 4], got float32 [0, 4]"),
        ({"previous": ramp()[:, :3]}, "previous: expected float32 [1 to 8, 4], got float32 [8, 3]"),
        ({"previous": ramp()[0]}, "previous: expected float32 [1 to 8, 4], got float32 [4]"),
        ({"previous": np.zeros((2, WIDTH), np.int64)}, "previous: expected float32 [1 to 8, 4], got int64 [2, 4]"),
        ({"previous": NAN}, "previous: expected finite numbers, got NaN or infinity"),
        ({"previous": ramp(), "delay": -1}, "delay: expected a whole number >= 0, got -1.0"),
        ({"previous": ramp(), "delay": 1.5}, "delay: expected a whole number >= 0, got 1.5"),
        ({"delay": "two"}, "delay: expected a number, got str"),
        ({"previous": ramp(), "horizon": -2}, "horizon: expected a whole number >= 0, got -2.0"),
        ({"switched": 3}, "switched: expected a map with delay and seam, got int"),
        ({"switched": {"seam": 0.1}}, "delay: expected a whole number >= 0 in `switched`, got none"),
        ({"switched": {"delay": 1, "seam": 1.5}}, "seam: expected a number from 0 to 1, got 1.5"),
        ({"switched": {"delay": 1, "seam": float("nan")}}, "seam: expected a finite number, got nan"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(continuing: Served, fields: dict[str, Any], message: str) -> None:
    with NativeClient(continuing.url()) as client:
        reply = client.ask(act(ROBOT, 6, **fields))
        assert (reply["type"], reply["seq"], reply["code"]) == ("error", 6, "bad_message")
        assert reply["message"] == message and reply["field"] == message.split(":")[0]
        assert client.ask(act(ROBOT, 7))["type"] == "chunk", "the connection is kept"


@given(st.floats(1, 1e30), st.sampled_from([np.float16, np.float32, np.float64]))
def test_actions_beyond_the_limits_count_as_the_limit(size: float, dtype: type) -> None:
    with np.errstate(over="ignore"):
        raw = np.full((2, WIDTH), size).astype(dtype)
    if not np.isfinite(raw).all():
        with pytest.raises(ServiceError, match="finite"):
            read_previous({"previous": raw}, SPEC)
        return
    previous = read_previous({"previous": raw}, SPEC)
    assert previous is not None and previous.actions.dtype == np.float32 and (previous.actions == 1).all()


def test_a_model_without_it_refuses_a_previous_chunk_and_says_what_to_do(plain: Served) -> None:
    with NativeClient(plain.url()) as client:
        reply = client.ask(act(robot_spec(), 5, previous=ramp(), delay=1))
        assert (reply["code"], reply["field"], reply["got"]) == ("bad_message", "previous", "one")
        assert "`recap export CHECKPOINT --rtc`" in reply["expected"]
        assert client.ask(act(robot_spec(), 6, switched={"delay": 1, "seam": None}))["type"] == "chunk"


def test_what_the_robot_measured_is_exported(continuing: Served) -> None:
    def count(name: str, part: str) -> float:
        families = {f.name: f for f in text_string_to_metric_families(continuing.get("/metrics")[1])}
        return next(s.value for s in families[name].samples if s.name == f"{name}_{part}")

    before = [
        count(name, part) for name in ("recap_act_delay_steps", "recap_act_seam_error") for part in ("count", "sum")
    ]
    with NativeClient(continuing.url()) as client:
        client.ask(act(ROBOT, switched={"delay": 3, "seam": 0.25}))
        client.ask(act(ROBOT, switched={"delay": 1, "seam": None}))
    after = [
        count(name, part) for name in ("recap_act_delay_steps", "recap_act_seam_error") for part in ("count", "sum")
    ]
    np.testing.assert_allclose(np.subtract(after, before), [2, 4, 1, 0.25])


def test_the_loop_sends_the_rows_that_remain_from_the_observations_step(continuing: Served) -> None:
    """Lock step, 150 +- 50 ms at 20 Hz: every request carries the newest chunk's rows from its own step on, and the
    largest delay of the last replies."""
    replies: list[np.ndarray] = []
    continuing.engine.edit = lambda outputs: replies.append(outputs["actions"][0].copy()) or outputs  # type: ignore[func-returns-value]
    try:
        result, robot, calls = episode(continuing, chunks="rtc", delay=Delay(0.15, 0.05))
    finally:
        continuing.engine.edit = lambda outputs: outputs
    assert len(result.delays) > 5 and set(result.delays) <= {2, 3, 4} and len(set(result.delays)) > 1
    assert result.starved == result.delays[0], "only until the first reply"
    asked = used = 0  # by the actions that have run: none until the first reply, which is used from its first row on
    for number, call in enumerate(calls[1:], 1):
        start, step = asked, max(used, asked + 4)  # four rows, or as many as the reply took
        rest = np.clip(replies[number - 1][step - start :], -1, 1)
        np.testing.assert_array_equal(call["previous"][0, : len(rest)], rest)
        assert not call["previous"][0, len(rest) :].any()
        delay = max(result.delays[max(0, number - 8) : number])
        held = prefix_weights(delay, min(delay, len(rest)), CHUNK, SCHEDULE)
        np.testing.assert_array_equal(call["prefix_weights"][0], held)
        if number < len(result.delays):
            asked, used = step, step + result.delays[number]
    first = result.delays[0]
    np.testing.assert_allclose(robot.done[first], np.clip(replies[0][0], -1, 1))
    assert result.act_latency_s[0] == pytest.approx(0.15, abs=0.05), "the simulated delay, not the machine's"


def test_a_reply_that_is_not_later_than_expected_makes_no_jump(continuing: Served) -> None:
    """The policy is untrained and jumps at every switch; a row that the new chunk is held to does not."""
    plainly, _, _ = episode(continuing, chunks="switch", delay=Delay(0.15, 0.05))
    assert min(plainly.seams) > 0.02
    chained, _, _ = episode(continuing, Table(limit=80), chunks="rtc", delay=Delay(0.15, 0.05))
    delays = chained.delays
    early = [delays[n] < max(delays[max(0, n - 8) : n]) for n in range(1, len(delays))]
    seams = np.array(chained.seams)
    assert 0 < sum(early) == (seams < 1e-5).sum() < len(seams)
    assert seams[seams >= 1e-5].min() > 0.02


@pytest.mark.parametrize("chunks", ["switch", "latest", "ensemble", "rtc"])
def test_a_lock_step_episode_repeats(continuing: Served, chunks: str) -> None:
    runs = [episode(continuing, Table(limit=16), chunks=chunks, delay=Delay(0.1, 0.05)) for _ in range(2)]
    (first, one, _), (second, other, _) = runs
    assert (first.delays, first.seams, first.starved) == (second.delays, second.seams, second.starved)
    for a, b in zip(one.done, other.done, strict=True):
        assert (a is None) == (b is None) and (a is None or np.array_equal(a, b))


def test_latest_and_ensemble_ask_in_every_step(continuing: Served) -> None:
    for chunks in ("latest", "ensemble"):
        _, _, calls = episode(continuing, Table(limit=6), chunks=chunks)
        assert len(calls) == 6


def test_a_model_without_it_is_served_by_switching_with_one_warning(plain: Served, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        result, _, calls = episode(plain, Table(robot_spec(), 20), chunks="rtc")
    assert result.starved == 0 and len(calls) == 5 and "previous" not in calls[0]
    warned = [r.message for r in caplog.records if "switched plainly" in r.message]
    assert len(warned) == 1 and "`recap export --rtc`" in warned[0]


def test_a_service_that_changes_its_mind_costs_one_request(plain: Served, caplog: Any, monkeypatch: Any) -> None:
    """It says that it can continue a chunk, and then refuses: the episode goes on by switching."""
    monkeypatch.setattr("services.policy.pipeline.PolicyPipeline.rtc", True)
    with caplog.at_level(logging.WARNING):
        result, _, calls = episode(plain, Table(robot_spec(), 20), chunks="rtc")
    assert result.starved == 0 and len(calls) == len(result.delays) >= 4
    assert sum("switched plainly" in record.message for record in caplog.records) == 1


def test_the_command_reports_delays_and_seams(continuing: Served, capsys: Any, monkeypatch: Any) -> None:
    from recap_client import cli

    monkeypatch.setattr("recap_client.fleet.open_robot", lambda *_: Table(limit=20))
    command = ["run", "--task", TASKS[0], "--url", continuing.url(), "--chunks", "rtc", "--delay-ms", "150"]
    assert cli.main([*command, "--jitter-ms", "50", "--fast"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["chunks"] == "rtc" and 2 <= summary["delay_steps_mean"] <= summary["delay_steps_max"] <= 4
    assert 0 < summary["seam_error_mean"] <= summary["seam_error_max"] <= 1
    assert cli.main([*command, "--realtime"]) == 2 and "expected --fast with them" in capsys.readouterr().err
    assert (
        cli.main([*command, "--jitter-ms", "-1", "--fast"]) == 2 and "expected seconds >= 0" in capsys.readouterr().err
    )
