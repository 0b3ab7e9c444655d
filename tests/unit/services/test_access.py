"""Keys and quotas at every door: who is let in, who is not, and what happens to those inside when their key ends."""

import json
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from recap_client import wire
from recap_client.session import ServiceUnavailable, Session
from repository_factory import TASKS, robot_spec
from service_harness import NativeClient, Served, act, critic_server, eventually, fetch, observation, policy_server
from services.common.auth import Gate, Refused, address
from services.common.keys import new_key, read_keys, write_keys
from services.common.quota import OverQuota
from services.common.settings import Access, Quota

SPEC = robot_spec()


class KeyFile:
    """A key file with a text for each id."""

    def __init__(self, path: Path) -> None:
        self.path, self.texts = path, dict[str, str]()
        write_keys(path, {})

    def add(self, name: str, scopes: tuple[str, ...] = ("act", "value"), expires: float | None = None,
            **quota: float) -> dict[str, str]:  # fmt: skip
        """Its headers."""
        key, self.texts[name] = new_key(name, scopes, Quota(**quota), expires=expires)  # type: ignore[arg-type]
        write_keys(self.path, read_keys(self.path) | {name: key})
        return self.headers(name)

    def headers(self, name: str, scheme: str = "Api-Key") -> dict[str, str]:
        return {"Authorization": f"{scheme} {self.texts[name]}"}

    def revoke(self, name: str) -> None:
        keys = read_keys(self.path)
        write_keys(self.path, keys | {name: replace(keys[name], revoked=time.time())})


@pytest.fixture
def keys(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "keys.jsonl")


def refused(served: Served, reason: str) -> float:
    line = next(
        line
        for line in served.get("/metrics")[1].splitlines()
        if line.startswith(f'recap_refused_total{{reason="{reason}"}}')
    )
    return float(line.rpartition(" ")[2])


def ndarray_free_observation() -> dict[str, Any]:
    body = observation(SPEC)
    images = {name: frame.tolist() for name, frame in body["images"].items()}
    return {**images, "state": body["state"].tolist(), "instruction": TASKS[0]}


def post(served: Served, headers: dict[str, str]) -> tuple[int, str]:
    return fetch(served.http("/act"), data=json.dumps(ndarray_free_observation()).encode(), headers=headers)


def status(connecting: Callable[[], Any]) -> int:
    with pytest.raises(InvalidStatus) as error:
        connecting()
    return error.value.response.status_code


def test_each_key_opens_what_its_scopes_say_and_the_shared_key_still_works(models: Path, keys: KeyFile) -> None:
    robot, screen = keys.add("robot", ("act",)), keys.add("screen", ("value",))
    keys.add("old", expires=time.time() - 1)
    access = Access(keys.path)
    with policy_server(models, access=access, api_key="shared") as policy:
        for headers in (robot, keys.headers("robot", "bearer"), {"Authorization": "Bearer shared"}):
            with NativeClient(policy.url(), additional_headers=headers) as client:
                assert client.ask(act(SPEC))["type"] == "chunk"
            assert post(policy, headers)[0] == 200
        wrong = {"Authorization": "Api-Key recap_robot.guess"}
        basic = {"Authorization": f"Basic {keys.texts['robot']}"}
        for headers, code in (({}, 401), (wrong, 401), (screen, 403), (keys.headers("old"), 401), (basic, 401)):
            assert status(lambda headers=headers: NativeClient(policy.url(), additional_headers=headers)) == code
            assert post(policy, headers)[0] == code
        assert status(lambda: NativeClient(policy.url(f"/act?api_key={keys.texts['robot']}"))) == 401, (
            "keys in urls leak"
        )
        assert [refused(policy, reason) for reason in ("unauthorized", "forbidden", "expired")] == [7.0, 2.0, 2.0]
        assert policy.get("/livez")[0] == policy.get("/metrics")[0] == 200
    with critic_server(models, access=access, api_key="shared") as critic:
        with NativeClient(critic.url("/value"), additional_headers=screen) as client:
            assert client.ask({**act(SPEC), "type": "observe"})["type"] == "value"
        assert status(lambda: NativeClient(critic.url("/value"), additional_headers=robot)) == 403
        assert critic.get("/value/stream")[0] == 401
        assert critic.get(f"/value/stream?api_key={keys.texts['robot']}")[0] == 403


def test_a_revoked_key_is_refused_and_its_sessions_are_told_why(models: Path, keys: KeyFile) -> None:
    good, bad = keys.add("good"), keys.add("bad")
    with policy_server(models, access=Access(keys.path)) as served:
        openpi = connect(served.url(), additional_headers=bad, proxy=None, compression=None)
        openpi.recv(10)
        with (
            NativeClient(served.url(), additional_headers=bad) as ending,
            NativeClient(served.url(), additional_headers=good) as staying,
        ):
            assert ending.ask(act(SPEC))["type"] == "chunk"
            keys.revoke("bad")
            replies, code = ending.until_closed()
            assert [(reply["type"], reply["code"], reply["message"]) for reply in replies] == [
                ("error", "unauthorized", "key bad: revoked")
            ]
            assert code == 1008
            assert openpi.recv(10) == "unauthorized: key bad: revoked"
            with pytest.raises(ConnectionClosed, match="1008"):
                openpi.recv(10)
            assert status(lambda: NativeClient(served.url(), additional_headers=bad)) == 401
            assert staying.ask(act(SPEC))["type"] == "chunk"
            assert served.service.connections.count == 1
            late = keys.add("late")
            eventually(lambda: "late" in served.service.gate.keys)
            with NativeClient(served.url(), additional_headers=late) as client:
                assert client.ask(act(SPEC))["type"] == "chunk"


def test_the_event_stream_of_a_revoked_key_ends(models: Path, keys: KeyFile) -> None:
    keys.add("screen", ("value",))
    with critic_server(models, access=Access(keys.path)) as served:
        url = served.http(f"/value/stream?api_key={keys.texts['screen']}")
        with urllib.request.urlopen(url, timeout=20) as stream:
            assert stream.readline() == b"retry: 1000\n"
            keys.revoke("screen")
            assert b"data" not in stream.read()
        eventually(lambda: served.service.gate._sessions == 0)


def test_a_broken_key_file_changes_nothing(models: Path, keys: KeyFile) -> None:
    headers = keys.add("arm")
    with (
        policy_server(models, access=Access(keys.path)) as served,
        NativeClient(served.url(), additional_headers=headers) as client,
        capture_logs() as logs,
    ):
        text = keys.path.read_text()
        keys.path.write_text(text[:-20])
        eventually(lambda: any("line 1: expected a key" in entry.get("error", "") for entry in logs))
        assert client.ask(act(SPEC))["type"] == "chunk"
        keys.path.unlink()
        eventually(lambda: any("cannot read the key file" in entry.get("error", "") for entry in logs))
        assert client.ask(act(SPEC))["type"] == "chunk"
        keys.path.write_text("")
        assert client.until_closed()[1] == 1008
        assert keys.texts["arm"].partition(".")[2] not in str(logs)


def test_a_rate_is_held_told_and_keeps_the_connection(models: Path, keys: KeyFile) -> None:
    headers = keys.add("arm", rate=0.001, burst=2)
    with policy_server(models, access=Access(keys.path)) as served:
        with (
            NativeClient(served.url(), additional_headers=headers) as client,
            NativeClient(served.url(), additional_headers=headers) as other,
        ):
            assert client.ask(act(SPEC))["type"] == other.ask(act(SPEC))["type"] == "chunk"
            reply = client.ask(act(SPEC, 7))
            assert (reply["code"], reply["seq"]) == ("rate_limited", 7) and reply["retry_after_s"] > 900
            assert client.ask(act(SPEC, 8))["code"] == "rate_limited", "the connection is kept"
        assert refused(served, "rate") == 2.0
        request = urllib.request.Request(served.http("/act"), b"{}", headers)
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request, timeout=20)
        assert error.value.code == 429 and int(error.value.headers["Retry-After"]) > 900
        with connect(served.url(), additional_headers=headers, proxy=None, compression=None) as openpi:
            openpi.recv(10)
            openpi.send(wire.pack(observation(SPEC)))
            assert str(openpi.recv(10)).startswith("rate_limited: arm: expected at most 0.001 requests a second")


def test_bytes_requests_in_flight_and_sessions_have_bounds_of_their_own(models: Path, keys: KeyFile) -> None:
    keys.add("thin", bytes_per_s=1000), keys.add("one", in_flight=1), keys.add("single", sessions=1)
    with policy_server(models, access=Access(keys.path)) as served:
        with NativeClient(served.url(), additional_headers=keys.headers("thin")) as client:
            assert client.ask(act(SPEC))["type"] == "chunk"
            assert "1000 bytes a second" in client.ask(act(SPEC))["message"]
        with (
            NativeClient(served.url(), additional_headers=keys.headers("one")) as client,
            NativeClient(served.url(), additional_headers=keys.headers("one")) as other,
        ):
            with served.engine.held():
                client.send(act(SPEC, 1))
                served.engine.entered.wait(10)
                assert "1 requests at once" in other.ask(act(SPEC, 2))["message"]
            assert client.receive()["seq"] == 1
            assert eventually(lambda: other.ask(act(SPEC, 3))["type"] == "chunk")
        with NativeClient(served.url(), additional_headers=keys.headers("single")):
            assert status(lambda: NativeClient(served.url(), additional_headers=keys.headers("single"))) == 429
        eventually(lambda: NativeClient(served.url(), additional_headers=keys.headers("single")))
        assert [refused(served, reason) for reason in ("bytes", "sessions")] == [1.0, 1.0]


def test_the_service_is_full_at_its_number_of_sessions_and_addresses_have_quotas(models: Path) -> None:
    with policy_server(models, access=Access(quota=Quota(rate=0.001, burst=1), max_sessions=1)) as served:
        with NativeClient(served.url()) as client:
            assert status(lambda: NativeClient(served.url())) == 503
            assert client.ask(act(SPEC))["type"] == "chunk"
            assert client.ask(act(SPEC))["message"].startswith("127.0.0.1: expected at most 0.001 requests")
        assert refused(served, "full") == 1.0


def gate(path: Path | None = None, **options: Any) -> Gate:
    return Gate(Access(path), options.pop("api_key", None), **options)


def test_admins_are_those_with_the_scope_or_the_operators_own_key(keys: KeyFile) -> None:
    keys.add("boss", ("admin",)), keys.add("arm")
    door = gate(keys.path, api_key="shared", admin_key="operator")
    for text in (keys.texts["boss"], "operator"):
        door.admit_key(text, "peer", "admin", where="")
    for text, code in (
        (keys.texts["arm"], "forbidden"),
        ("shared", "forbidden"),
        ("guess", "unauthorized"),
        ("", "unauthorized"),
    ):
        with pytest.raises(Refused) as error:
            door.admit_key(text, "peer", "admin", where="")
        assert error.value.fault.code == code
    for text in (keys.texts["boss"], "operator"):
        with pytest.raises(Refused):
            door.admit_key(text, "peer", "act", where="")
    assert gate().admit({}, "peer", "act").name == "peer"
    with pytest.raises(Refused):
        gate().admit({}, "peer", "admin")


def test_a_key_expires_under_an_open_session_and_new_limits_count_at_once(keys: KeyFile) -> None:
    keys.add("arm", expires=100.0, rate=1000)
    now = [99.0]
    door = gate(keys.path, wall=lambda: now[0], clock=lambda: 0.0)
    caller = door.admit_key(keys.texts["arm"], "peer", "act", where="")
    caller.spend(1, 0)
    key = door.keys["arm"]
    door.keys = {"arm": replace(key, quota=Quota(rate=1))}
    caller.spend(1, 0)
    with pytest.raises(OverQuota):
        caller.spend(1, 0)
    now[0] = 100.0
    with pytest.raises(Refused, match="key arm: expired"):
        caller.spend(1, 0)
    door.keys = {"arm": replace(key, expires=None, scopes=("value",))}
    with pytest.raises(Refused, match="expected the scope act, got value"):
        caller.check()
    door.keys = {"arm": replace(new_key("arm")[0])}
    with pytest.raises(Refused, match="revoked"):
        caller.check()


def test_refusals_reach_people_and_never_hold_a_key(
    models: Path, keys: KeyFile, caplog: pytest.LogCaptureFixture
) -> None:
    keys.add("arm", ("value",))
    with policy_server(models, access=Access(keys.path)) as served, capture_logs() as logs:
        with pytest.raises(ServiceUnavailable, match=r"HTTP 403; set a key that it takes, with --api-key"):
            Session(served.url(), "policy", SPEC, headers=keys.headers("arm"))
        for _ in range(5):
            status(lambda: NativeClient(served.url()))
        refusals = [entry["reason"] for entry in logs if entry["event"] == "caller refused"]
        assert refusals[0] == "forbidden" and "unauthorized" in refusals
        assert keys.texts["arm"].partition(".")[2] not in str(logs) + caplog.text
        assert "handshake" not in caplog.text


@pytest.mark.parametrize(
    ("peer", "host"),
    [("ipv4:192.0.2.1:55", "192.0.2.1"), ("ipv6:[::1]:55", "::1"), ("ipv6:%5B::1%5D:55", "::1"), ("unix:", "unix:")],
)
def test_grpc_names_peers_its_own_way(peer: str, host: str) -> None:
    assert address(peer) == host


def test_a_robot_may_say_what_it_is_and_is_refused_when_it_is_another(models: Path) -> None:
    other = replace(SPEC, control_hz=50.0)
    for server, path in ((policy_server, "/act"), (critic_server, "/value")):
        with server(models) as served, NativeClient(served.url(path)) as client:
            reset = {"type": "reset", "robot": "r", "episode": "e", "task": TASKS[0]}
            assert client.ask(reset | {"spec": SPEC.to_json()})["type"] == "ok"
            assert client.ask(reset | {"spec": replace(SPEC, tasks=("dance",)).to_json()})["type"] == "ok"
            reply = client.ask(reset | {"spec": other.to_json()})
            assert (reply["code"], reply["field"]) == ("spec_mismatch", "spec.control_hz")
            assert (reply["expected"], reply["got"]) == ("20.0", "50.0")
            if server is policy_server:
                counted = 'recap_act_requests_total{code="spec_mismatch",dialect="recap.v1"} 1.0'
                assert counted in served.get("/metrics")[1]
            for bad in (5, {}, {"cameras": 1}, {**SPEC.to_json(), "cameras": []}):
                assert client.ask(reset | {"spec": bad})["code"] == "bad_message"
            assert client.ask(reset)["type"] == "ok"
