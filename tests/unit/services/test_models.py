"""Models that change while robots are served: real sockets, real engines, models whose actions tell them apart."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from model_versions import SHIFT, add_version
from recap_client.policy import RemotePolicy
from recap_client.robots.base import Observation
from recap_model.cli import main
from repository_factory import TASKS, build_repository, robot_spec
from service_harness import NativeClient, Served, act, eventually, fetch, observation, policy_server
from services.common.settings import ModelSource
from services.policy.models import difference, position

SPEC, KEY = robot_spec(), "a long admin key"


@contextmanager
def serving(models: Path, **parts: Any) -> Iterator[Served]:
    source = ModelSource(models, admin_key=KEY, audit=models.parent / "audit.jsonl")
    with policy_server(models, source=source, **parts) as served:
        add_versions(models)
        yield served


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Version 1, which is live; `serving` adds 2 and 3, whose actions are SHIFT and 2 SHIFT higher."""
    return build_repository(tmp_path / "models", models=("policy",))


def add_versions(root: Path) -> None:
    """What comes after the start, which takes the highest version that is there."""
    for version in (2, 3):
        if not (root / "policy" / str(version)).exists():
            add_version(root, version, shift=(version - 1) * SHIFT)


def change(served: Served, action: str, **options: Any) -> dict[str, Any]:
    status, body = post(served, action, options)
    assert status == 200, body
    return json.loads(body)


def post(served: Served, action: str, options: Any, key: str = KEY) -> tuple[int, str]:
    data = json.dumps(options).encode()
    return fetch(served.http(f"/models/{action}"), data=data, headers={"Authorization": f"Bearer {key}"})


def refusal(served: Served, action: str, **options: Any) -> tuple[int, str]:
    status, body = post(served, action, options)
    return status, json.loads(body)["error"]["message"]


def level(client: NativeClient, *, episode: str = "e1", robot: str = "r1") -> int:
    """How many SHIFTs the answer lies above version 1's: the version, told by its actions. Same noise always."""
    reply = client.ask(act(SPEC, 1, seed=1, robot=robot, episode=episode))
    assert reply["type"] == "chunk", reply
    return round((float(np.mean(reply["actions"])) - BASE[0]) / SHIFT)


BASE: list[float] = []


@pytest.fixture(autouse=True, scope="module")
def base(models: Path) -> None:
    with policy_server(models) as served, NativeClient(served.url()) as client:
        BASE[:] = [float(np.mean(client.ask(act(SPEC, 1, seed=1))["actions"]))]


def metric(served: Served, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(served.get("/metrics")[1])
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def test_a_swap_under_load_fails_no_request(repository: Path) -> None:
    """Four sessions ask without a pause while the model goes 1 -> 2 -> 3 -> back, by force and by episodes."""
    stop, failures, counts = threading.Event(), list[Any](), [0] * 4

    def robot(number: int, url: str) -> None:
        with NativeClient(url) as client:
            while not stop.is_set():
                counts[number] += 1
                reply = client.ask(act(SPEC, counts[number], robot=f"r{number}", episode=str(counts[number] // 5)))
                if reply["type"] != "chunk":
                    failures.append(reply)

    with serving(repository) as served:
        threads = [threading.Thread(target=robot, args=(n, served.url())) for n in range(4)]
        for thread in threads:
            thread.start()
        steps: list[tuple[str, dict[str, Any]]] = [
            ("load", {"version": 2, "state": "live"}),
            ("load", {"version": 3, "state": "canary", "share": 0.5}),
            ("promote", {"force": True}),
            ("rollback", {}),
            ("load", {"version": 3, "state": "live"}),
        ]
        for action, options in steps:
            done = sum(counts)
            change(served, action, **options)
            eventually(lambda done=done: sum(counts) > done + 40)
        stop.set()
        for thread in threads:
            thread.join(20)
        assert failures == [] and min(counts) > 10
        assert json.loads(served.get("/models", {"Authorization": f"Bearer {KEY}"})[1])["live"]["version"] == "3"
        answered = {v: metric(served, "recap_model_requests_total", version=v) for v in ("1", "2", "3")}
        assert all(answered.values()) and metric(served, "recap_act_requests_total", code="ok") == sum(counts)
        # version 1 is not kept: two changes later it is freed, and is no longer announced
        assert metric(served, "recap_model_info", version="1") == 0 and metric(served, "recap_model_info") == 2


def test_a_session_keeps_its_model_until_its_episode_ends(repository: Path) -> None:
    with serving(repository) as served, NativeClient(served.url()) as client:
        assert level(client) == 0
        change(served, "load", version=2, state="live")
        assert [level(client), level(client, episode="e2"), level(client)] == [0, 1, 1]
        change(served, "load", version=3, state="live", force=True)
        assert level(client) == 2
        assert change(served, "rollback")["live"]["version"] == "2"
        assert level(client) == 1  # at once, in the middle of the episode
        client.ask({"type": "reset", "robot": "r1", "episode": "e1", "task": ""})
        assert level(client) == 1
        assert change(served, "rollback")["live"]["version"] == "3"  # what was rolled back is kept


def test_a_canary_answers_its_share_of_episodes_always_the_same_ones(repository: Path) -> None:
    episodes = [f"e{n}" for n in range(60)]
    with serving(repository) as served, NativeClient(served.url()) as client:
        change(served, "load", version=2, state="canary", share=0.3)
        first = [level(client, episode=episode) for episode in episodes]
        assert first == [int(position("r1", episode) < 0.3) for episode in episodes] and 5 < sum(first) < 35
        assert [level(client, episode=episode) for episode in reversed(episodes)] == first[::-1]
        assert change(served, "rollback")["canary"] is None
        assert {level(client, episode=episode) for episode in episodes[:20]} == {0}
        assert metric(served, "recap_model_requests_total", version="2", role="canary") == 2 * sum(first)


def test_a_failing_canary_is_no_robots_trouble(repository: Path) -> None:
    with serving(repository) as served, NativeClient(served.url()) as client:
        change(served, "load", version=2, state="canary", share=1.0)
        assert level(client) == 1
        served.service.models._canary.slot.engine._sessions.clear()  # it breaks: every run raises
        assert [level(client), level(client)] == [0, 0]
        assert metric(served, "recap_canary_failures_total") == 1
        assert metric(served, "recap_act_requests_total", code="internal") == 0


def test_a_shadow_is_compared_and_never_sent(repository: Path) -> None:
    with serving(repository) as served, NativeClient(served.url()) as client:
        change(served, "load", version=3, state="shadow", every=2)
        for number in range(4):
            assert level(client) == 0
            assert client.ask(act(SPEC, 9))["type"] == "chunk"  # without a seed: the noise is the same for both
            eventually(lambda n=number: metric(served, "recap_shadow_requests_total", result="compared") == n + 1)
        mean = metric(served, "recap_shadow_action_difference_sum") / 4
        assert mean == pytest.approx(2 * SHIFT / 2, rel=1e-3)  # the range of an action is 2
        assert metric(served, "recap_model_requests_total", version="3") == 0
        change(served, "promote")
        assert level(client, episode="next") == 2


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ({"version": 4, "state": "live"}, 422, "a first request to the new model failed: the model gave NaN"),
        ({"version": 9, "state": "live"}, 422, "expected a version folder 9, got [1, 2, 3, 4]"),
        ({"version": 2, "state": "live", "path": ".."}, 422, "expected a folder below the service's model repository"),
        ({"version": 2, "state": "live", "path": "/etc"}, 422, "expected a folder below the service's"),
        ({"version": 1, "state": "live", "path": "linked"}, 422, "below the service's model repository"),
        ({"version": 1, "state": "live", "path": "wide"}, 422, "spec.cameras differs: expected [{'name': 'front'"),
        ({"version": 1, "state": "live", "path": "long"}, 422, "spec.chunk: expected 8 actions, as the live"),
        ({"version": 1, "state": "live", "path": "torn"}, 422, "content hash: expected"),
        ({"version": 2}, 400, "state: expected one of shadow, canary, live, got None"),
        ({"version": 2, "state": "canary", "share": 1.5}, 400, "share: expected a number from 0 to 1, got 1.5"),
        ({"version": True, "state": "live"}, 400, "version: expected a whole number from 1, got True"),
        ({"state": "live", "every": 0}, 400, "every: expected a whole number from 1, got 0"),
        ({"state": "live", "colour": 1}, 400, "colour: expected one of"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_changes_nothing(
    broken: tuple[Served, NativeClient], options: dict[str, Any], status: int, words: str
) -> None:
    served, client = broken
    threads = threading.active_count()
    assert level(client) == 0
    got, message = refusal(served, "load", **options)
    assert got == status and words in message, message
    assert level(client, episode=message[:50]) == 0
    listing = served.service.models.listing()
    assert (listing["previous"], listing["canary"], listing["shadow"], listing["loading"]) == (None, None, None, False)
    eventually(lambda: sum("engine-" in thread.name for thread in threading.enumerate()) == 1)
    assert threading.active_count() <= threads + 4


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, NativeClient]]:
    root = build_repository(tmp_path_factory.mktemp("broken") / "models", models=("policy",))
    build_repository(root / "wide", size=24, models=("policy",))
    add_version(root / "long", 1, chunk=16)
    build_repository(root / "torn", models=("policy",))
    with (root / "torn/policy/1/model.onnx").open("ab") as stream:
        stream.write(b"\0")
    outside = build_repository(root.parent / "outside", models=("policy",))
    (root / "linked").mkdir()
    (root / "linked/policy").symlink_to(outside / "policy")
    with serving(root) as served, NativeClient(served.url()) as client:
        add_version(root, 4, nan=True)
        yield served, client


def test_only_admins_change_models_and_only_where_there_are_some(repository: Path) -> None:
    with policy_server(repository) as closed:
        status, body = post(closed, "load", {"version": 2, "state": "live"})
        assert status == 404 and "set RECAP_ADMIN_KEY in the environment of the service" in body
    with serving(repository) as served:
        for key in ("another", ""):
            status, body = post(served, "rollback", {}, key)
            assert status == 401 and "a key of this service, got none or another" in body and KEY not in body
        assert refusal(served, "rollback")[0] == refusal(served, "promote")[0] == refusal(served, "unload")[0] == 409
        assert refusal(served, "explode")[0] == 400
    with policy_server(repository, source=ModelSource(repository, admin_key=KEY), api_key="for robots") as served:
        assert post(served, "rollback", {}, "for robots")[0] == 403
        assert post(served, "load", {"version": 2, "state": "shadow"})[0] == 200


def test_a_reply_names_its_model_when_it_is_not_that_of_the_welcome(repository: Path) -> None:
    with serving(repository) as served, NativeClient(served.url()) as client:
        assert "model" not in client.ask(act(SPEC))
        policy = RemotePolicy(served.url(), SPEC)
        policy.reset("e1", TASKS[0])
        seen = observation(SPEC)
        looked = Observation(seen["images"], seen["state"], 0.0)
        assert policy.infer(looked, TASKS[0]).model == policy.identity == client.welcome["model"]
        change(served, "load", version=2, state="live", force=True)
        live = served.service.models.live.identity
        assert client.ask(act(SPEC))["model"] == live and live["version"] == "2"
        assert policy.infer(looked, TASKS[0]).model == live and policy.identity["version"] == "1"
        change(served, "rollback")
        assert "model" not in client.ask(act(SPEC)) and policy.infer(looked, TASKS[0]).model == policy.identity
        policy.close()
        with NativeClient(served.url()) as late:
            change(served, "rollback")
            assert late.welcome["model"]["version"] == "1" and late.ask(act(SPEC))["model"] == live


def test_every_change_is_on_record_with_who_and_what(repository: Path) -> None:
    with serving(repository) as served:
        change(served, "load", version=2, state="live")
        refusal(served, "load", version=9, state="live")
    lines = [json.loads(line) for line in (repository.parent / "audit.jsonl").read_text().splitlines()]
    start = lines.pop(0)
    assert (start["who"], start["what"], start["options"]) == ("service", "start", {"version": None})
    assert start["to"]["live"]["version"] == "1"
    assert [(line["what"], line["result"][:7]) for line in lines] == [
        ("load", "begun"), ("load", "done"), ("load", "begun"), ("load", "refused"),
    ]  # fmt: skip
    assert lines[1]["from"]["version"] == "1" and lines[1]["to"]["live"]["version"] == "2"
    assert lines[1]["to"]["live"]["hash"] != lines[1]["from"]["hash"]
    assert {line["peer"] for line in lines} == {"127.0.0.1"} and {line["who"] for line in lines} == {
        "environment-admin"
    }
    assert KEY not in (repository.parent / "audit.jsonl").read_text()


def test_the_difference_is_a_share_of_the_range() -> None:
    ours, theirs = np.zeros((8, 4), np.float32), np.zeros((8, 4), np.float32)
    ours[3, 2] = 0.5
    assert difference(ours, theirs, SPEC) == difference(theirs, ours, SPEC) == 0.25
    assert difference(ours, ours, SPEC) == 0.0


def test_a_change_that_cannot_be_put_on_record_is_not_made(repository: Path) -> None:
    source = ModelSource(repository, admin_key=KEY, audit=Path("/dev/full"))
    with policy_server(repository, source=source) as served:
        add_versions(repository)
        status, message = refusal(served, "load", version=2, state="live")
        assert status == 500 and "cannot write the audit log" in message
        assert served.service.models.listing()["live"]["version"] == "1"


def test_the_command_line_changes_models_and_says_what_is_wrong(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def recap(*arguments: str) -> tuple[int, str]:
        code = main(["models", *arguments])
        out, err = capsys.readouterr()
        return code, (out or err).splitlines()[-1 if out else 0]

    with serving(repository) as served:
        at = ("--url", f"http://127.0.0.1:{served.port}")
        assert "RECAP_ADMIN_KEY: expected the admin's key" in recap("list", *at)[1]
        monkeypatch.setenv("RECAP_ADMIN_KEY", "another")
        code, line = recap("list", *at)
        assert code == 2 and "401" in line and "a key of this service, got none or another" in line
        monkeypatch.setenv("RECAP_ADMIN_KEY", KEY)
        assert (
            json.loads(recap("load", *at, "--version", "2", "--state", "canary", "--share", "0.25")[1])["canary"][
                "share"
            ]
            == 0.25
        )
        assert json.loads(recap("promote", *at)[1])["live"]["version"] == "2"
        assert json.loads(recap("rollback", *at)[1])["previous"]["version"] == "2"
        assert json.loads(recap("list", *at)[1])["versions"] == [1, 2, 3]
        main(["models", "list", *at])
        assert "a restart serves version 3, unless `recap serve` has --model-version 1\n" in capsys.readouterr().out
        recap("load", *at, "--version", "3", "--state", "live")
        main(["models", "list", *at])
        assert "a restart" not in capsys.readouterr().out
        code, line = recap("unload", *at)
        assert code == 2 and "409: no shadow is loaded" in line
    code, line = recap("list", *at)
    assert code == 2 and "expected a policy service, got none" in line
