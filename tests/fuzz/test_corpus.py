"""The fixed corpus, and seeded mutations of it, through every decoder: typed errors only, no hang, memory bounded.
And the watch itself: a decoder that crashes, hangs or fills the memory is found."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz import run
from fuzz.guard import tried, watching
from fuzz.mutate import LONGEST, mutated
from fuzz.seeds import CORPUS, corpus, seeds
from fuzz.targets import TARGETS, Target

SEEDS = list(seeds())


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_of(name: str) -> None:
    assert corpus(name)
    with watching():
        for data in corpus(name):
            assert tried(TARGETS[name], data).finding is None


@pytest.mark.parametrize("name,seed,data", SEEDS, ids=[f"{target}-{name}" for target, name, _ in SEEDS])
def test_the_real_encoders_are_understood(name: str, seed: str, data: bytes) -> None:
    """Else the mutations would start from rubbish."""
    TARGETS[name].run(data)
    TARGETS[name].run((CORPUS / name / f"{seed}.bin").read_bytes())


@pytest.mark.parametrize(
    "name,seed,message",
    [
        ("wire", "found-deep-lists", r"wire: .*: expected at most 64 levels of maps and lists, got more"),
        ("wire", "found-no-characters", "wire: message: expected text of Unicode characters, got other numbers in <U1"),
        ("groot", "found-no-characters", "data.task: expected text of Unicode characters, got other numbers in <U1"),
        ("openpi", "found-ragged-joints", "joint_position: expected numbers, got lists of unequal lengths or depths"),
        ("spec", "found-mixed", "robot spec: expected the fields of RobotSpec, got list"),
    ],
)
def test_past_findings_are_refused_in_words(name: str, seed: str, message: str) -> None:
    with pytest.raises(Exception, match=message) as error:
        TARGETS[name].run((CORPUS / name / f"{seed}.bin").read_bytes())
    assert TARGETS[name].permits(error.value)


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "rollout"])
@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(chance=st.randoms(use_true_random=False), cut=st.integers(0, LONGEST), tail=st.binary(max_size=40))
def test_changed_messages(name: str, chance: random.Random, cut: int, tail: bytes) -> None:
    data = mutated(TARGETS[name].form, corpus(name), chance)
    with watching():
        for message in (data, data[:cut] + tail):
            assert tried(TARGETS[name], message).finding is None


def test_a_short_run_over_all_targets_finds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run.main(["--inputs", "2600", "--findings", str(tmp_path)])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (code, report["findings"]) == (0, 0), report
    assert report["inputs"] >= 2600 and {row["target"] for row in report["rows"]} == set(TARGETS)
    assert all(row["outcomes"] > 2 for row in report["rows"])


def _crashes(data: bytes) -> None:
    if b"{" in data:
        raise ZeroDivisionError("123")


def _hangs(_: bytes) -> None:
    while True:
        try:
            sum(range(100))
        except Exception:
            continue


def _fills(_: bytes) -> None:
    assert b"\x01" * (100 << 20)


@pytest.mark.parametrize("run_one,finding", [(_crashes, "crash: ZeroDivisionError at _crashes: 123"), (_hangs, "hang"),
                                             (_fills, "memory: ")])  # fmt: skip
def test_a_bad_decoder_is_found(run_one, finding: str, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    assert b"\x02" * (300 << 20)  # an earlier peak of this process
    if run_one is _hangs:
        monkeypatch.setattr("fuzz.guard.SECONDS", 0.3)
    with watching():
        verdict = tried(Target("bad", run_one, "bytes"), b"{}")
    assert verdict.finding is not None and verdict.finding.startswith(finding)


def test_findings_are_kept_and_the_same_seed_finds_them_again() -> None:
    bad = Target("bad", _crashes, "bytes")
    first, again = ([t.findings for t in run.fuzz(bad, [b"seed{", b"other"], 300, seed)][-1] for seed in (5, 5))
    assert first == again and list(first) == ["crash: ZeroDivisionError at _crashes: 123"]
    shares = run.shares(1_000_000, list(TARGETS))
    assert sum(shares.values()) >= 1_000_000 and min(shares.values()) > 10_000
