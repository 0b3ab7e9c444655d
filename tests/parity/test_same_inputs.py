"""The same raw frame reaches the model as the same bytes from the training loader and from the service."""

import json

import numpy as np
import pytest

from recap_client.record import read_rollout
from recap_client.wire import pack, unpack
from recap_model import conditioning
from recap_model.tokenizer import TextTokenizer, word_tokenizer
from services.common.observation import Observation
from services.policy.pipeline import PolicyPipeline
from trained import make_data
from training.loader import Loader
from training.table import load_table


class SpyEngine:
    """Stands at the engine interface: what arrives here is what the model sees."""

    def __init__(self, spec, tokenizer, chunk):
        self.spec, self.tokenizer, self.name = spec, tokenizer, "policy"
        self.input_names = ("images", "state", "tokens", "token_mask", "noise")
        self.input_shapes = {"noise": (chunk, len(spec.robot.action))}


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    root = make_data(tmp_path_factory.mktemp("same"))
    source = load_table(root / "dataset")
    tokenizer = word_tokenizer(source.table.tasks, 16)
    tokenizer.save(root / "tokenizer.json")  # the service reads the file the checkpoint carries
    return root, source, tokenizer, TextTokenizer.load(root / "tokenizer.json", 16)


def test_loader_and_service_agree_bit_for_bit(sides):
    from dataclasses import replace

    from recap_model.spec import PolicySpec

    root, source, tokenizer, served = sides
    positive = replace(source.table, indicator=np.ones(len(source.table), np.int8))
    loader = Loader(positive, tokenizer, chunk=8, dropout=0.3, shift=2, seed=0)
    engine = SpyEngine(PolicySpec(source.robot, 8, 16), served, 8)
    pipeline = PolicyPipeline(engine, None, 1.0)
    session = type("S", (), {"noise": lambda *_: None})()
    row = 0
    for path in sorted((root / "rollouts").glob("*.mcap")):
        rollout = read_rollout(path)
        for t in range(len(rollout.state)):
            raw = {"images": {c: frames[t] for c, frames in rollout.images.items()}, "state": rollout.state[t]}
            received = unpack(pack(raw))
            seen = Observation(received["images"], received["state"], rollout.task)
            service = pipeline._inputs(session, seen, None, 0)
            batch = loader(np.array([row]), 0, train=False)
            for ours, theirs in (
                (batch.images, "images"), (batch.state, "state"),
                (batch.tokens, "tokens"), (batch.token_mask, "token_mask"),
            ):  # fmt: skip
                assert ours[0].dtype == service[theirs].dtype, theirs
                np.testing.assert_array_equal(ours[0], service[theirs], err_msg=f"{path.name} {t} {theirs}")
            row += 1
    assert row == len(source.table) > 50


def test_the_tokenizer_file_is_the_tokenizer(sides):
    _, source, tokenizer, served = sides
    for task in source.table.tasks:
        for indicator in (1, 0, -1):
            text = conditioning.prompt(task, indicator)
            for ours, theirs in zip(tokenizer(text), served(text), strict=True):
                np.testing.assert_array_equal(ours, theirs)
    assert json.loads(served.tokenizer.to_str())["model"]["type"] == "WordLevel"
