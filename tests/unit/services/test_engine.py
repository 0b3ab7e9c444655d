"""The embedded engine: what it computes, what it refuses."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from recap_model.manifest import ManifestError
from recap_model.spec import CriticSpec, PolicySpec
from repository_factory import CHUNK, MAX_TOKENS, expected_actions, expected_value
from services.common.engine import EngineError, load_engine
from services.common.repository import RepositoryError
from services.policy.pipeline import load_policy_engine


def batch(count: int) -> dict[str, np.ndarray]:
    g = np.random.default_rng(count)
    return {
        "images": g.integers(0, 256, (count, 2, 16, 16, 3), dtype=np.uint8),
        "state": g.normal(size=(count, 4)).astype(np.float32),
        "tokens": g.integers(1, 9, (count, MAX_TOKENS), dtype=np.int32),
        "token_mask": np.tile(np.arange(MAX_TOKENS) < 6, (count, 1)),
        "noise": g.normal(size=(count, CHUNK, 4)).astype(np.float32),
    }


@pytest.mark.parametrize("count", range(1, 9))
def test_every_sample_of_every_batch_size_equals_the_formula(models: Path, count: int) -> None:
    inputs = batch(count)
    actions = load_engine(models, "policy").run(inputs)["actions"]
    assert actions.shape == (count, CHUNK, 4)
    for i in range(count):
        want = expected_actions(*(inputs[k][i] for k in ("images", "state", "tokens", "token_mask", "noise")))
        np.testing.assert_allclose(actions[i], want, atol=1e-4)


def test_guidance_mixes_the_two_prompts(models: Path) -> None:
    inputs = batch(2)
    guided = inputs | {
        "unconditional_tokens": inputs["tokens"] // 2,
        "unconditional_mask": inputs["token_mask"],
        "beta": np.array([1.0, 3.0], np.float32),
    }
    engine, plain = load_engine(models, "policy_guided"), load_engine(models, "policy")
    actions = engine.run(guided)["actions"]
    c = plain.run(inputs)["actions"]
    u = plain.run(inputs | {"tokens": guided["unconditional_tokens"]})["actions"]
    np.testing.assert_allclose(actions[0], c[0], atol=1e-5)
    np.testing.assert_allclose(actions[1], u[1] + 3 * (c[1] - u[1]), atol=1e-5)


def test_critic_gives_a_distribution_and_its_mean(models: Path) -> None:
    inputs = {k: v for k, v in batch(3).items() if k != "noise"}
    inputs["state"][:, 0] = (-0.9, -0.5, -0.1)
    out = load_engine(models, "critic").run(inputs)
    np.testing.assert_allclose(out["probabilities"].sum(1), 1, atol=1e-5)
    want = [expected_value(inputs["images"][i], inputs["state"][i]) for i in range(3)]
    np.testing.assert_allclose(out["value"], want, atol=0.01)


def test_identity_and_shapes_come_from_the_folder(models: Path) -> None:
    engine = load_engine(models, "policy")
    assert (engine.name, engine.version, len(engine.hash)) == ("policy", "1", 64)
    assert isinstance(engine.spec, PolicySpec) and isinstance(load_engine(models, "critic").spec, CriticSpec)
    assert engine.batch_sizes == (1, 2, 4, 8)
    assert engine.input_shapes["noise"] == (CHUNK, 4)
    engine.warm_up()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"images": np.zeros((1, 2, 16, 16, 3), np.float32)}, ["images", "uint8", "float32"]),
        ({"images": np.zeros((1, 2, 8, 16, 3), np.uint8)}, ["images", "2, 16, 16, 3", "2, 8, 16, 3"]),
        ({"state": np.zeros((1, 5), np.float32)}, ["state", "4", "5"]),
        ({"state": np.zeros((2, 4), np.float32)}, ["batch"]),
        ({"noise": None}, ["inputs", "noise"]),
    ],
)
def test_wrong_inputs_are_named(models: Path, change: dict, words: list[str]) -> None:
    inputs = {k: v for k, v in (batch(1) | change).items() if v is not None}
    with pytest.raises(EngineError) as error:
        load_engine(models, "policy").run(inputs)
    assert all(word in str(error.value) for word in words), error.value


def test_too_many_samples_are_refused(models: Path) -> None:
    with pytest.raises(EngineError, match="at most 8 samples, got 9"):
        load_engine(models, "policy").run(batch(9))


def test_a_changed_model_is_refused(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models, tmp_path / "m")
    model = tmp_path / "m" / "policy" / "1" / "model.onnx"
    model.write_bytes(model.read_bytes() + b"\0")
    with pytest.raises(ManifestError, match="content hash"):
        load_engine(tmp_path / "m", "policy")


def test_the_highest_version_is_served(models: Path, tmp_path: Path) -> None:
    for version in ("1", "2", "10"):
        shutil.copytree(models / "policy" / "1", tmp_path / "policy" / version)
    assert load_engine(tmp_path, "policy").version == "10"


def test_missing_things_are_named(models: Path, tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="recap export"):
        load_engine(tmp_path / "nowhere", "policy")
    with pytest.raises(RepositoryError, match="policy_guided"):
        load_engine(models, "absent")
    with pytest.raises(EngineError, match="expected one of"):
        load_engine(models, "policy", "abacus")
    with pytest.raises(EngineError, match="beta"):
        load_policy_engine(models, 0.5, "onnxruntime")
