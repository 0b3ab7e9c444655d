"""Laws of the rollout log: reading inverts recording; a damaged file gives a readable prefix and says so."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mcap.reader import make_reader

from recap_client.record import EpisodeInfo, Outcome, Recorder, RecordError, RolloutError, StepRecord, read_rollout
from recap_client.spec import ActionDim, Camera, RobotSpec, StateDim

SPEC = RobotSpec(
    "toy", (Camera("a", 6, 8), Camera("b", 4, 4)), (StateDim("x", "m"), StateDim("y", "rad")),
    (ActionDim("dx", "m", -1, 1), ActionDim("dy", "m", -1, 1), ActionDim("g", "1", 0, 1)), 20.0, ("do it",),
)  # fmt: skip
INFO = EpisodeInfo(SPEC, "do it", "doing", 7, "e-7", {"name": "p", "version": "1", "hash": "abc"}, False, "fast", 0.25)


def steps(count: int, seed: int = 0) -> list[StepRecord]:
    rng = np.random.default_rng(seed)
    return [
        StepRecord(
            step=k, t=100.0 + 0.05 * k, state=rng.normal(size=2).astype(np.float32),
            action=rng.normal(size=3).astype(np.float32),
            images={c.name: rng.integers(0, 256, (c.height, c.width, 3), dtype=np.uint8) for c in SPEC.cameras},
            proposed=rng.normal(size=3).astype(np.float32) if k % 2 else None, chunk=k // 4, intervention=k % 3 == 0,
            value=-float(rng.random()) if k % 4 else None,
        )
        for k in range(count)
    ]  # fmt: skip


def record(path: Path, records: list[StepRecord], outcome: Outcome, **options: object) -> None:
    recorder = Recorder(path, INFO, wait=True, **options)  # type: ignore[arg-type]
    for item in records:
        recorder.step(item)
    assert recorder.close(outcome) is None


def assert_prefix(path: Path, records: list[StepRecord], count: int) -> None:
    rollout = read_rollout(path)
    assert rollout.steps == count
    for row, item in enumerate(records[:count]):
        assert rollout.t[row] == item.t
        np.testing.assert_array_equal(rollout.state[row], item.state)
        np.testing.assert_array_equal(rollout.action[row], item.action)
        expected = np.full(3, np.nan, np.float32) if item.proposed is None else item.proposed
        np.testing.assert_array_equal(rollout.proposed[row], expected)
        assert rollout.chunk[row] == item.chunk and rollout.intervention[row] == item.intervention
        np.testing.assert_equal(rollout.value[row], np.nan if item.value is None else item.value)
        for name, frame in item.images.items():
            np.testing.assert_array_equal(rollout.images[name][row], frame)


@given(st.integers(0, 6), st.integers(0, 10**6), st.sampled_from([True, False, None]), st.integers(0, 99))
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_reading_inverts_recording(tmp_path_factory, count, seed, success, missed) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp("log") / "e.mcap"
    records = steps(count, seed)
    record(path, records, Outcome(success, count, "operator", missed))
    rollout = read_rollout(path)
    assert_prefix(path, records, count)
    assert rollout.complete and rollout.success is success and rollout.reason == "operator"
    assert (rollout.missed_deadlines, rollout.dropped) == (missed, 0)
    for name in ("spec", "task", "task_name", "seed", "episode", "demonstration", "style", "clock_offset_s"):
        assert getattr(rollout, name) == getattr(INFO, name)
    assert rollout.policy == INFO.policy and rollout.control_hz == SPEC.control_hz


def test_nan_in_the_state_survives(tmp_path: Path) -> None:
    item = steps(1)[0]
    bad = StepRecord(0, item.t, np.array([np.nan, 1], np.float32), item.action, item.images)
    record(tmp_path / "e.mcap", [bad], Outcome(None, 1, "error"))
    np.testing.assert_array_equal(read_rollout(tmp_path / "e.mcap").state, [[np.nan, 1]])


def test_standard_readers_open_it(tmp_path: Path) -> None:
    record(tmp_path / "e.mcap", steps(5), Outcome(True, 5, "success"))
    with (tmp_path / "e.mcap").open("rb") as stream:
        reader = make_reader(stream, validate_crcs=True)
        topics = [channel.topic for _, channel, _ in reader.iter_messages()]
        assert next(iter(reader.iter_metadata())).metadata == {"schema": "1"}
        for schema, _, message in reader.iter_messages():
            assert schema is not None and schema.encoding == "jsonschema"
            json.loads(schema.data), json.loads(message.data)
    assert topics.count("/step") == topics.count("/camera/a") == 5


def test_every_truncation_gives_a_prefix_or_a_rollout_error(tmp_path: Path) -> None:
    records = steps(12)
    path = tmp_path / "e.mcap"
    recorder = Recorder(path, INFO, wait=True, flush_s=0.0)  # a flush a step
    for item in records:
        recorder.step(item)
    recorder.close(Outcome(True, 12, "success"))
    whole = path.read_bytes()
    cut, lengths = tmp_path / "cut.mcap", []
    for size in range(0, len(whole), 97):
        cut.write_bytes(whole[:size])
        try:
            rollout = read_rollout(cut)
        except RolloutError:
            continue
        assert not rollout.complete and rollout.success is None and rollout.reason == "interrupted"
        assert_prefix(cut, records, rollout.steps)
        lengths.append(rollout.steps)
    assert lengths == sorted(lengths) and lengths[0] <= 1 and lengths[-1] == 12


def test_flipped_bytes_never_change_what_is_read(tmp_path: Path) -> None:
    records = steps(4)
    path = tmp_path / "e.mcap"
    record(path, records, Outcome(True, 4, "success"), flush_s=0.0)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(whole), 60):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            rollout = read_rollout(path)
        except RolloutError:
            continue
        assert_prefix(path, records, rollout.steps)


@pytest.mark.parametrize("data", [b"", b"not an mcap file at all", b"\x89MCAP0\r\n"])
def test_other_files_are_refused_by_name(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.mcap").write_bytes(data)
    with pytest.raises(RolloutError, match=r"x\.mcap: expected a rollout log"):
        read_rollout(tmp_path / "x.mcap")
    with pytest.raises(RolloutError, match="missing"):
        read_rollout(tmp_path / "missing.mcap")


def test_jpeg_recording_and_summary_reading(tmp_path: Path) -> None:
    record(tmp_path / "e.mcap", steps(3), Outcome(False, 3, "timeout"), image_format="jpeg")
    assert read_rollout(tmp_path / "e.mcap").images["a"].shape == (3, 6, 8, 3)
    summary = read_rollout(tmp_path / "e.mcap", images=False)
    assert summary.images == {} and summary.steps == 3 and summary.success is False


def test_a_finished_file_is_never_overwritten(tmp_path: Path) -> None:
    record(tmp_path / "e.mcap", steps(1), Outcome(True, 1, "success"))
    with pytest.raises(RecordError, match=r"e\.mcap"):
        Recorder(tmp_path / "e.mcap", INFO)
    assert read_rollout(tmp_path / "e.mcap").success


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="cannot write the rollout log"):
        Recorder(tmp_path / "file" / "e.mcap", INFO)


def test_a_frame_that_cannot_be_encoded_stops_the_log_not_the_robot(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "e.mcap", INFO, wait=True)
    good = steps(2)
    recorder.step(good[0])
    recorder.step(StepRecord(1, 1.0, good[1].state, good[1].action, {"a": np.zeros((2, 2), np.uint8)}))
    error = recorder.close(Outcome(True, 2, "success"))
    assert error is not None and "uint8 [H, W, 3]" in str(error) and not (tmp_path / "e.mcap").exists()
