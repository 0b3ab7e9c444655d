"""TLS with a CA of our own: those who trust it are served, those who do not are told; nobody is served in the clear."""

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import grpc
import numpy as np
import pytest
from structlog.testing import capture_logs
from websockets.sync.client import connect

from recap_client import cli as client_cli
from recap_client.fleet import FleetSettings, Worker
from recap_client.policy import RemotePolicy
from recap_client.robots.base import Observation
from recap_client.session import ServiceUnavailable, Session
from recap_client.tls import CA_VARIABLE, client_context
from repository_factory import TASKS, robot_spec
from service_harness import NativeClient, Served, act, critic_server, eventually, fetch, policy_server
from services.common.settings import Tls
from services.common.tls import TlsError, server_context
from services.common.tls import client_context as service_client_context
from services.options import ServeArgs
from services.supervise import serve_one

SPEC = robot_spec()


@dataclass(frozen=True)
class Authority:
    """A CA, a certificate of it for 127.0.0.1, and another CA that knows nothing of either."""

    folder: Path

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def stranger(self) -> Path:
        return self.folder / "stranger.pem"

    @property
    def tls(self) -> Tls:
        return Tls(self.folder / "service.pem", self.folder / "service.key")


class Arm:
    """As much of a robot as a fleet needs to open its connections."""

    spec = SPEC


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    folder = tmp_path_factory.mktemp("authority")
    new = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    for name in ("ca", "stranger"):
        openssl(folder, *new, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}")
    openssl(
        folder, *new, "-keyout", "service.key", "-out", "service.pem", "-subj", "/CN=service", "-CA", "ca.pem",
        "-CAkey", "ca.key", "-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE",
    )  # fmt: skip
    (folder / "service.key").chmod(0o600)
    return Authority(folder)


@pytest.fixture(scope="module")
def served(models: Path, authority: Authority) -> Iterator[Served]:
    with policy_server(models, tls=authority.tls, lerobot_port=0) as service:
        yield service


def url(served: Served) -> str:
    return f"wss://127.0.0.1:{served.port}/act"


def test_who_trusts_the_authority_is_served_and_who_does_not_is_told_what_to_do(
    served: Served, authority: Authority
) -> None:
    session = Session(url(served), "policy", SPEC, tls_ca=authority.ca)
    assert session.call({"type": "ping", "t": 0.0})["type"] == "pong"
    session.close()
    for ca in (authority.stranger, None):
        with pytest.raises(
            ServiceUnavailable, match=r"certificate is not trusted; name the file of its CA with --tls-ca"
        ):
            Session(url(served), "policy", SPEC, tls_ca=ca)
    with pytest.raises(ServiceUnavailable, match=r"none\.pem: expected a file of CA certificates"):
        Session(url(served), "policy", SPEC, tls_ca=authority.folder / "none.pem")
    with pytest.raises(ServiceUnavailable, match="not trusted"):  # the certificate is for the address, not for the name
        Session(url(served).replace("127.0.0.1", "localhost"), "policy", SPEC, tls_ca=authority.ca)


def test_the_variable_and_the_option_name_the_authority(
    served: Served, authority: Authority, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(CA_VARIABLE, raising=False)
    assert client_cli.main(["spec", "--url", url(served)]) == 2
    assert "--tls-ca" in capsys.readouterr().err
    monkeypatch.setenv(CA_VARIABLE, str(authority.stranger))  # the option is stronger
    assert client_cli.main(["spec", "--url", url(served), "--tls-ca", str(authority.ca)]) == 0
    assert '"robot": "metaworld"' in capsys.readouterr().out
    assert os.environ[CA_VARIABLE] == str(authority.stranger), "and of this command alone"
    RemotePolicy(url(served), SPEC, tls_ca=authority.ca).close()
    Worker(FleetSettings(f"{__name__}:Arm", policy_url=url(served), tls_ca=authority.ca)).close()
    monkeypatch.setenv(CA_VARIABLE, str(authority.ca))
    policy = RemotePolicy(url(served), SPEC)
    policy.reset("e", TASKS[0])
    images = {c.name: np.zeros((c.height, c.width, 3), np.uint8) for c in SPEC.cameras}
    assert policy.infer(Observation(images, np.zeros(4, np.float32), 0.0), TASKS[0]).actions.shape[1] == 4
    policy.close()


def test_nothing_is_served_in_the_clear(served: Served, authority: Authority) -> None:
    plain = f"ws://127.0.0.1:{served.port}/act"
    with pytest.raises(
        ServiceUnavailable, match=r"is the policy service running there, and without TLS \(else wss://\)"
    ):
        Session(plain, "policy", SPEC, timeout_s=30)
    with pytest.raises((OSError, HTTPException)):
        fetch(f"http://127.0.0.1:{served.port}/livez")
    with NativeClient(url(served), ssl=client_context(url(served), authority.ca)) as client:
        assert client.ask(act(SPEC))["type"] == "chunk"


def test_a_plain_service_is_not_taken_for_a_safe_one(models: Path, authority: Authority) -> None:
    with policy_server(models) as served, pytest.raises(ServiceUnavailable, match=r"with TLS \(else ws://\)"):
        Session(url(served), "policy", SPEC, tls_ca=authority.ca)


def test_the_grpc_port_has_the_same_certificate(served: Served, authority: Authority) -> None:
    target = f"127.0.0.1:{served.front('lerobot')}"
    trusting = grpc.ssl_channel_credentials(authority.ca.read_bytes())
    with grpc.secure_channel(target, trusting) as channel:
        ready = channel.unary_unary("/transport.AsyncInference/Ready")
        assert ready(b"", timeout=20) == b""
    with grpc.insecure_channel(target) as channel, pytest.raises(grpc.RpcError):
        channel.unary_unary("/transport.AsyncInference/Ready")(b"", timeout=20)


def test_stopping_drains_over_tls_too(models: Path, authority: Authority) -> None:
    with policy_server(models, tls=authority.tls) as served:
        client = NativeClient(url(served), ssl=client_context(url(served), authority.ca))
        with served.engine.held():
            client.send(act(SPEC, 1))
            served.engine.entered.wait(10)
            served.running.stop()
        replies, code = client.until_closed()
        assert ([reply["seq"] for reply in replies], code) == ([1], 1001)


def test_the_policy_shows_the_critic_its_own_certificate_under_any_name(models: Path, authority: Authority) -> None:
    context = service_client_context(authority.tls.cert, own=True)
    with critic_server(models, tls=authority.tls) as critic:
        link = f"wss://localhost:{critic.port}/value"
        with policy_server(models, critic_url=link, critic_tls=context) as policy, NativeClient(policy.url()) as client:
            eventually(lambda: policy.service.tap.connected)
            assert client.ask(act(SPEC))["type"] == "chunk"
            eventually(lambda: critic.service.episodes.track("r1", "e1") is not None)
    stranger = service_client_context(authority.stranger, own=True)
    with critic_server(models, tls=authority.tls) as critic, pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
        connect(f"wss://localhost:{critic.port}/value", ssl=stranger, proxy=None)


def test_what_does_not_fit_is_refused_with_words_before_anything_is_loaded(
    models: Path, authority: Authority, tmp_path: Path
) -> None:
    folder, good = authority.folder, authority.tls
    text = tmp_path / "text"
    text.write_text("hello")
    locked = tmp_path / "locked.key"
    openssl(folder, "pkey", "-in", "service.key", "-aes256", "-passout", "pass:x", "-out", str(locked))
    for tls, words in (
        (Tls(folder / "none.pem", good.key), r"none\.pem: cannot read the TLS certificate \(No such file"),
        (Tls(good.cert, text), r"text: expected a TLS key in PEM form"),
        (Tls(good.cert, folder / "ca.key"), "they do not belong together"),
        (Tls(good.key, good.cert), "not a PEM certificate and its PEM key"),
        (Tls(good.cert, locked), "without a password"),
    ):
        with pytest.raises(TlsError, match=words):
            server_context(tls)
    with pytest.raises(TlsError, match="--tls-cert and --tls-key together"):
        serve_one(ServeArgs("policy", models, policy_port=0, tls_cert=good.cert))
    (tmp_path / "open.key").write_bytes(good.key.read_bytes())
    (tmp_path / "open.key").chmod(0o644)
    with capture_logs() as logs:
        server_context(Tls(good.cert, tmp_path / "open.key"))
    assert [entry["event"] for entry in logs] == ["every account of this machine can read the TLS key"]
