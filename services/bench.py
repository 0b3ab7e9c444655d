"""What the service adds to the model: round trips of a robot over loopback, with the engine's own time beside them.

The service runs in a process of its own, as it would; the client is this process. The bare engine is timed here first,
alone on the machine, on the same inputs and with the same loop. Added time = round trip - bare engine call, so it
counts encoding, the network stack, decoding, queueing, thread changes and the reply: everything but the model.
"""

import json
import multiprocessing
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from websockets.sync.client import ClientConnection, connect

from recap_client import wire
from recap_client.spec import RobotSpec
from recap_model import conditioning
from recap_model.observation import prepare
from recap_model.spec import PolicySpec
from services.common.engine import Engine
from services.options import ServeArgs
from services.policy.pipeline import load_policy_engine
from services.supervise import serve_child


class BenchError(ValueError):
    """The service did not start or did not answer as it should."""


def run(models: Path, *, requests: int, warm_up: int, beta: float, engine: str) -> int:
    """Print a table and, as the last line, one JSON object. Returns the exit code."""
    loaded = load_policy_engine(models, beta, engine)
    loaded.warm_up()
    robot = loaded.spec.robot
    observation = _observation(robot)
    bare = _time_engine(loaded, observation, requests, warm_up, beta)
    loaded.close()
    trips, inside = _time_service(models, beta, engine, observation, requests, warm_up)
    added = trips - np.median(bare)
    cameras = [[camera.name, camera.height, camera.width] for camera in robot.cameras]
    result = {
        "benchmark": "service_added_latency",
        "cameras": cameras,
        "requests": requests,
        "beta": beta,
        "engine": engine,
        "bare_engine_ms": _percentiles(bare),
        "round_trip_ms": _percentiles(trips),
        "added_ms": _percentiles(added),
        "server_total_minus_infer_ms": _percentiles(inside),
    }
    _show(result)
    print(json.dumps(result))
    return 0


def _observation(robot: RobotSpec) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    images = {c.name: generator.integers(0, 256, (c.height, c.width, 3), dtype=np.uint8) for c in robot.cameras}
    prompt = robot.tasks[0] if robot.tasks else "do the task"
    return {"images": images, "state": np.zeros(len(robot.state), np.float32), "prompt": prompt}


def _time_engine(
    engine: Engine, observation: dict[str, Any], requests: int, warm_up: int, beta: float
) -> NDArray[np.float64]:
    spec = engine.spec
    task = spec.text(observation["prompt"]) if isinstance(spec, PolicySpec) else observation["prompt"]
    sample = prepare(
        observation["images"],
        observation["state"],
        conditioning.positive_prompt(task),
        spec.robot,
        engine.tokenizer,
    )
    inputs: dict[str, NDArray[Any]] = {
        "images": sample.images,
        "state": sample.state,
        "tokens": sample.tokens,
        "token_mask": sample.token_mask,
        "noise": np.zeros(engine.input_shapes["noise"], np.float32),
    }
    if beta > 1.0:
        ids, mask = engine.tokenizer(conditioning.unconditional_prompt(task))
        inputs |= {"unconditional_tokens": ids, "unconditional_mask": mask, "beta": np.asarray(beta, np.float32)}
    batch = {name: array[None] for name, array in inputs.items()}
    return np.array([_timed(lambda: engine.run(batch)) for _ in range(warm_up + requests)][warm_up:])


def _time_service(
    models: Path, beta: float, engine: str, observation: dict[str, Any], requests: int, warm_up: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    args = ServeArgs("policy", models, policy_port=port, engine=engine, beta=beta, log_format="json")
    child = context.Process(target=serve_child, args=(args, ready))
    child.start()
    try:
        if not ready.wait(120):
            raise BenchError("the service did not start within 120 s; its own message is above")
        with connect(f"ws://127.0.0.1:{port}/act", compression=None, max_size=None, proxy=None) as client:
            client.recv()
            replies: list[Any] = []
            trips = [_timed(lambda: replies.append(_ask(client, observation))) for _ in range(warm_up + requests)]
    finally:
        child.terminate()
        child.join(10)
    timing = [reply["server_timing"] for reply in replies]
    inside = [t["total_ms"] - t["infer_ms"] for t in timing]
    return np.array(trips[warm_up:]), np.array(inside[warm_up:])


def _ask(client: ClientConnection, observation: dict[str, Any]) -> Any:
    client.send(wire.pack(observation))
    reply = client.recv()
    if isinstance(reply, str):
        raise BenchError(f"the service answered: {reply}")
    return wire.unpack(reply)


def _timed(call: Any) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def _percentiles(values: NDArray[np.float64]) -> dict[str, float]:
    return {name: round(float(np.percentile(values, q)), 4) for name, q in (("p50", 50), ("p90", 90), ("p99", 99))}


def _show(result: dict[str, Any]) -> None:
    table = Table(title="policy service over loopback, milliseconds")
    for column in ("", "p50", "p90", "p99"):
        table.add_column(column)
    for name in ("bare_engine_ms", "round_trip_ms", "added_ms", "server_total_minus_infer_ms"):
        table.add_row(name[:-3].replace("_", " "), *(f"{value:.3f}" for value in result[name].values()))
    Console().print(table)
