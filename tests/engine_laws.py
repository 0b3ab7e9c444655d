"""What holds for every engine, whatever runs the model: laws that a test calls with a loaded engine of
`repository_factory.build_repository`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from repository_factory import expected_actions, expected_value
from services.common.engine import Engine, EngineError


def batch(engine: Engine, count: int, seed: int = 0) -> dict[str, Any]:
    """Seeded inputs for a policy or a critic of `repository_factory`."""
    rng = np.random.default_rng([seed, count])
    inputs = {}
    for name, shape in engine.input_shapes.items():
        size = (count, *shape)
        if name == "images":
            inputs[name] = rng.integers(0, 256, size, np.uint8)
        elif name.endswith("tokens"):
            inputs[name] = rng.integers(1, 9, size, np.int32)
        elif name.endswith("mask"):
            inputs[name] = np.arange(shape[0]) < rng.integers(1, shape[0] + 1, (count, 1))
        else:
            inputs[name] = rng.uniform(-0.8, -0.2, size).astype(np.float32)  # the toy critic is exact off its edges
    return inputs


def sample(inputs: Mapping[str, Any], i: int) -> dict[str, Any]:
    return {name: array[i : i + 1] for name, array in inputs.items()}


def answers_as_computed_by_hand(engine: Engine) -> None:
    for count in (1, 2, 3, 5, 8):
        inputs = batch(engine, count)
        outputs = engine.run(inputs)
        for i in range(count):
            one = {name: array[i] for name, array in inputs.items()}
            if engine.name == "critic":
                want: Any = expected_value(one["images"], one["state"])
                got = outputs["value"][i]
                assert outputs["probabilities"][i].sum() == pytest.approx(1.0, abs=1e-5)
            else:
                want = expected_actions(*(one[name] for name in ("images", "state", "tokens", "token_mask", "noise")))
                got = outputs["actions"][i]
            np.testing.assert_allclose(got, want, atol=2e-3 if engine.name == "critic" else 1e-4)
        assert {len(array) for array in outputs.values()} == {count}


def company_changes_nothing(engine: Engine) -> None:
    """A sample's answer does not depend on who shares its batch."""
    inputs = batch(engine, 7, seed=1)
    together = engine.run(inputs)
    for i in range(7):
        for name, array in engine.run(sample(inputs, i)).items():
            np.testing.assert_allclose(array[0], together[name][i], atol=1e-5)


def wrong_inputs_are_named(engine: Engine) -> None:
    good = batch(engine, 2)
    cases = [
        ({name: array for name, array in good.items() if name != "state"}, rf"{engine.name}: inputs: expected .*state"),
        (
            good | {"state": good["state"].astype(np.float64)},
            r"input state: expected float32 \[batch, 4\], got float64",
        ),
        (good | {"tokens": good["tokens"][:, :-1]}, r"input tokens: expected int32 \[batch, 16\], got int32 \[2, 15\]"),
        (good | {"state": good["state"][:1]}, r"batch: expected the same number .* got \[1, 2\]"),
        (batch(engine, 9), r"batch: expected at most 8 samples, got 9"),
        ({name: array[:0] for name, array in good.items()}, r"batch: expected the same number \(at least 1\)"),
    ]
    for inputs, words in cases:
        with pytest.raises(EngineError, match=words):
            engine.run(inputs)
    engine.run(good)  # and goes on


def describes_itself(engine: Engine, other: Engine) -> None:
    """As any engine of the same folder does."""
    for name in ("name", "version", "hash", "spec", "batch_sizes", "input_shapes"):
        assert getattr(engine, name) == getattr(other, name), name
    assert set(engine.input_names) == set(other.input_names)
    engine.warm_up()
    assert tuple(engine.run_times) == engine.batch_sizes and min(engine.run_times.values()) > 0


LAWS = (answers_as_computed_by_hand, company_changes_nothing, wrong_inputs_are_named)
