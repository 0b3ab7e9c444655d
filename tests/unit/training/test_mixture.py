"""Mixtures of robots: who is in a batch, what the model gets of each, and what the published checkpoint knows."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_factory import SMOLVLA
from recap_client.spec import Camera
from recap_model import conditioning
from recap_model.cli import main
from recap_model.manifest import read_manifest
from recap_model.normalize import NormStats
from recap_model.policy.load import load_policy
from recap_model.policy.model import Policy
from recap_model.spec import PolicySpec
from training import distill, offline, presets
from training.loader import Loader
from training.mixture import Mixture, MixtureError, read_mixture
from training.mixture_start import start_mixture
from training.mixture_table import Frames, MixtureSampler, identity_stats, load_members, member_rows, stack
from training.policy_loss import policy_loss
from training.start import config_for, with_weights
from training.table import TableSource, load_table, prompted
from two_robots import ARM, CART, make_dataset

DEBUG = presets.load("debug").policy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """arm/dataset, cart/dataset, and mix.json of both: three quarters and one quarter, everything positive."""
    root = tmp_path_factory.mktemp("mixture")
    for robot in (ARM, CART):
        make_dataset(root / robot.robot, robot)
    entries = [{"dataset": f"{r.robot}/dataset", "name": r.robot, "weight": w} for r, w in ((ARM, 3), (CART, 1))]
    (root / "mix.json").write_text(json.dumps([{**entry, "expert": True} for entry in entries]))
    return root


@pytest.fixture(scope="module")
def loaded(folder) -> tuple[Mixture, tuple[TableSource, ...]]:
    mixture = read_mixture(folder / "mix.json")
    return mixture, load_members(mixture, "recap")


@pytest.fixture(scope="module")
def trained(folder) -> Path:
    command = ["train", "policy", "--mixture", str(folder / "mix.json"), "--serve", "cart", "--names-in-prompt"]
    assert main([*command, "--preset", "debug", "--steps", "4", "--out", str(folder / "policy")]) == 0
    return folder / "policy"


@given(
    st.lists(st.floats(0.01, 100.0), min_size=1, max_size=5), st.integers(1, 40), st.integers(0, 9), st.integers(0, 999)
)
def test_every_batch_has_its_size_and_the_shares_but_for_rounding(weights, size, seed, step):
    shares = np.array(weights) / sum(weights)
    edges = np.cumsum([0, *(30 + 5 * i for i in range(len(weights)))])
    groups = [np.arange(a, b) for a, b in pairwise(edges)]
    rows = MixtureSampler(groups, shares, size, seed)(step)
    counts = np.histogram(rows, edges)[0]
    assert len(rows) == size == counts.sum() and (np.abs(counts - shares * size) < 1 + 1e-9).all()
    assert all(c > len(g) or len(np.unique(rows[np.isin(rows, g)])) == c for c, g in zip(counts, groups, strict=True))
    again = MixtureSampler(groups, shares, size, seed)
    again(step + 3)  # whatever was drawn before
    np.testing.assert_array_equal(again(step), rows)


def test_over_many_batches_the_shares_are_those_of_the_weights():
    groups, shares = [np.arange(50), np.arange(50, 60), np.arange(60, 90)], np.array([0.63, 0.3, 0.07])
    sampler = MixtureSampler(groups, shares, 4, 0)
    rows = np.concatenate([sampler(step) for step in range(2000)])
    np.testing.assert_allclose(np.histogram(rows, [0, 50, 60, 90])[0] / len(rows), shares, atol=0.01)
    assert set(rows) == set(range(90))


def test_frames_arrive_normalised_with_their_own_statistics_and_padded(loaded):
    mixture, sources = loaded
    policy, _, specs = start_mixture(DEBUG, mixture, sources, None)
    table, config = stack(sources, specs, policy.config), policy.config
    assert (config.cameras, config.state_dim, config.action_dim) == (2, 3, 3)
    assert table.camera_mask is not None and table.action_mask is not None
    for source, rows in zip(sources, member_rows(mixture, sources, positive=False), strict=True):
        own = source.table
        state, action, cameras = own.state.shape[1], own.action.shape[1], own.images.shape[1]
        for padded, raw, width in ((table.state, own.state, state), (table.action, own.action, action)):
            stats = NormStats.of(raw)
            np.testing.assert_allclose(padded[rows, :width] * stats.std + stats.mean, raw, atol=1e-5)
            assert not padded[rows, width:].any()
        assert table.action_mask[rows, :action].all() and not table.action_mask[rows, action:].any()
        np.testing.assert_array_equal(table.images[rows][:, :cameras], own.images)
        assert not table.images[rows][:, cameras:].any()
        assert table.camera_mask[rows].sum(1).tolist() == [cameras] * len(own)
        np.testing.assert_array_equal(table.end[rows] - rows, own.end - np.arange(len(own)))
        assert [table.tasks[i] for i in table.task[rows]] == [own.tasks[i] for i in own.task]
    assert len(np.unique(table.episode)) == sum(len(np.unique(source.table.episode)) for source in sources)


@settings(max_examples=20)
@given(st.lists(st.integers(0, 11), min_size=1, max_size=9))
def test_frames_of_several_tables_are_read_in_the_order_that_is_asked_for(rows):
    parts = [np.arange(8 * k * 3, dtype=np.uint8).reshape(8, k, 1, 1, 3)[: 8 if k == 1 else 4] for k in (1, 2)]
    whole = np.concatenate([np.pad(p, ((0, 0), (0, 2 - p.shape[1]), (0, 0), (0, 0), (0, 0))) for p in parts])
    np.testing.assert_array_equal(Frames(parts, 2)[np.array(rows)], whole[rows])


def test_what_is_padding_in_an_action_trains_nothing(loaded):
    mixture, sources = loaded
    policy, files, specs = start_mixture(DEBUG, mixture, sources, None)
    torch.nn.init.normal_(policy.expert.action_out.weight, std=0.1)
    table = stack(sources, specs, policy.config)
    cart = member_rows(mixture, sources, positive=False)[1][:4]
    loader = Loader(table, files.tokenizer, chunk=policy.config.chunk, dropout=0.0, shift=0, seed=0)
    policy_loss(policy, loader(cart, 0), 1, torch.Generator().manual_seed(0)).backward()
    gradient = policy.expert.action_out.weight.grad
    assert gradient is not None and gradient[0].any() and not gradient[1:].any()


@pytest.mark.parametrize("special", [None, (2, 3)])
def test_the_served_policy_sees_what_it_saw_in_training(special):
    """Normalised, padded and masked in a batch, or in physical units with fewer cameras: the same velocities."""
    everybody = replace(SMOLVLA, image_tokens=special, state_dim=8, action_dim=6)
    torch.manual_seed(0)
    trained = Policy(everybody, identity_stats(8, 6)).eval()
    rng = np.random.default_rng(0)
    data = {"state": rng.normal(5.0, 3.0, (9, 2)), "action": rng.normal(-1.0, 0.1, (9, 1))}
    stats = {kind: NormStats.of(values) for kind, values in data.items()}
    robot = replace(CART, cameras=(Camera("eye", 64, 64),))
    served = with_weights(trained, config_for(everybody, robot, Path("c")), stats)
    assert served.config.empty_cameras == (0 if special is None else 1)
    images = torch.from_numpy(rng.integers(0, 256, (3, 1, 64, 64, 3), np.uint8))
    black = torch.cat([images, torch.zeros_like(images)], dim=1)
    state = torch.from_numpy(data["state"][:3]).float()
    tokens = torch.from_numpy(rng.integers(4, 20, (3, 16)))
    mask, both = tokens > 6, torch.tensor([[True, False]] * 3)
    padded = torch.zeros(3, 8)
    padded[:, :2] = (state - torch.tensor(stats["state"].mean)) / torch.tensor(stats["state"].std)
    noise, time = torch.randn(3, 8, 6), torch.rand(3)
    with torch.no_grad():
        theirs = trained.velocity(noise, time, trained.read(trained.see(black), padded, tokens, mask, both))
        ours = served.velocity(noise, time, served.read(served.see(images), state, tokens, mask))
        unmasked = trained.velocity(noise, time, trained.read(trained.see(black), padded, tokens, mask))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (unmasked - theirs).abs().max() > 1e-4


def test_the_checkpoint_serves_the_chosen_robot_and_knows_the_others(trained, folder):
    policy, files = load_policy(trained)
    sources = {robot.robot: load_table(folder / robot.robot / "dataset") for robot in (ARM, CART)}
    assert files.spec.robot == sources["cart"].robot and policy.config.cameras == 1
    assert (policy.config.state_dim, policy.config.action_dim) == (2, 1)
    assert (policy.config.state_width, policy.config.action_width) == (3, 3)
    for name, source in sources.items():
        np.testing.assert_array_equal(files.stats[f"{name}/state"].q01, NormStats.of(source.table.state).q01)
        np.testing.assert_array_equal(files.stats[f"{name}/action"].std, NormStats.of(source.table.action).std)
    np.testing.assert_array_equal(files.stats["state"].mean, files.stats["cart/state"].mean)
    manifest, known = read_manifest(trained), json.loads((trained / "mixture.json").read_text())
    assert manifest.parents == {f"dataset/{name}": source.hash for name, source in sources.items()}
    assert manifest.parameters["serves"] == known["serves"] == "cart"
    assert [(d["name"], d["share"], d["dataset"]) for d in known["datasets"]] == [
        ("arm", 0.75, sources["arm"].hash), ("cart", 0.25, sources["cart"].hash)
    ]  # fmt: skip
    assert manifest.metrics["datasets"]["arm"]["epochs"] == pytest.approx(0.75 * 4 * 16 / 21)


def test_the_names_of_the_robots_numbers_stand_in_the_prompt_as_it_is_served(trained):
    files = load_policy(trained)[1]
    assert isinstance(files.spec, PolicySpec) and files.spec.names_in_prompt
    text = conditioning.positive_prompt(files.spec.text("the door"))
    assert text == "the door\nState: x, speed\nAction: force\nAdvantage: positive\n"
    assert not files.tokenizer.unknown_words(text)
    assert replace(files.spec, names_in_prompt=False).text("the door") == "the door"


def test_the_service_reads_the_prompt_that_training_read(trained, folder):
    from services.policy.pipeline import PolicyPipeline

    files = load_policy(trained)[1]
    engine = SimpleNamespace(
        spec=files.spec,
        tokenizer=files.tokenizer,
        name="policy",
        input_names=("noise",),
        input_shapes={"noise": (8, 3)},
    )
    table = prompted(load_table(folder / "cart" / "dataset").table, files.spec)
    table = replace(table, indicator=np.ones(len(table), np.int8))
    batch = Loader(table, files.tokenizer, chunk=8, dropout=0.0, shift=0, seed=0)(np.arange(1), 0)
    served = PolicyPipeline(engine, None, 1.0)._encode_positive("the door")
    np.testing.assert_array_equal(batch.tokens[0], served[0])
    np.testing.assert_array_equal(batch.token_mask[0], served[1])


def test_what_judges_and_distils_it_reads_the_same_prompt(trained, folder, tmp_path, monkeypatch):
    policy, files = load_policy(trained)
    table = load_table(folder / "cart" / "dataset").table
    served = files.tokenizer(conditioning.positive_prompt(files.spec.text(table.tasks[0])))
    batch = offline._loader(policy, files, table, conditioning.POSITIVE)(np.arange(1), 0)
    np.testing.assert_array_equal(batch.tokens[0], served[0])
    taught: list[tuple[str, ...]] = []

    class Seen(distill.Lessons):
        def __init__(self, table, *arguments, **options):
            taught.append(table.tasks)
            super().__init__(table, *arguments, **options)

    monkeypatch.setattr(distill, "Lessons", Seen)
    command = ["distill", str(trained), "--dataset", str(folder / "cart" / "dataset"), "--preset", "debug"]
    assert main([*command, "--steps", "1", "--batch-size", "4", "--out", str(tmp_path / "student")]) == 0
    assert taught == [tuple(files.spec.text(task) for task in table.tasks)] != [table.tasks]


def test_the_checkpoint_exports_within_tolerance(trained, tmp_path):
    assert (
        main(["export", str(trained), "--target", "torch", "--out", str(tmp_path / "repo"), "--batch-sizes", "1"]) == 0
    )
    parity = json.loads((tmp_path / "repo" / "policy" / "1" / "parity.json").read_text())
    assert parity["max_abs"] < 1e-4
    assert json.loads((tmp_path / "repo" / "policy" / "1" / "spec.json").read_text())["names_in_prompt"] is True


def test_another_robot_of_the_mixture_goes_on_with_its_own_statistics(trained, folder):
    out, data = folder / "arm-policy", str(folder / "arm" / "dataset")
    command = ["train", "policy", "--init", str(trained), "--dataset", data, "--expert", "--preset", "debug"]
    assert main([*command, "--steps", "2", "--batch-size", "4", "--out", str(out)]) == 0
    (policy, files), before = load_policy(out), load_policy(trained)[1]
    assert files.spec.robot == load_table(Path(data)).robot and policy.config.cameras == 2
    np.testing.assert_array_equal(files.stats["state"].mean, before.stats["arm/state"].mean)
    assert files.spec.names_in_prompt and read_manifest(out).parameters["mode"] == "imitation"


def test_an_interrupted_mixture_ends_bit_equal_to_a_straight_run(trained, folder):
    command = ["train", "policy", "--mixture", str(folder / "mix.json"), "--serve", "cart", "--names-in-prompt"]
    command += ["--preset", "debug", "--steps", "4", "--out", str(folder / "again")]
    draw = MixtureSampler.__call__

    def interrupted(self, step):
        if step == 2:
            raise KeyboardInterrupt
        return draw(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MixtureSampler, "__call__", interrupted)
        assert main(command) == 130
    assert not (folder / "again").exists()
    assert main(command) == 0
    assert (trained / "model.safetensors").read_bytes() == (folder / "again" / "model.safetensors").read_bytes()


GOOD = {"dataset": "d", "weight": 1.0}


@pytest.mark.parametrize(
    "content, said",
    [
        ("[", "expected JSON, got text that is none"),
        ({"sets": []}, "expected a list of datasets, as"),
        ([], "expected a list of datasets, as"),
        ([{"weight": 1}], r"datasets\[0\].dataset: expected the folder of a dataset, got None"),
        ([GOOD, {**GOOD, "wieght": 2}], r"datasets\[1\]: expected the keys .* got also \['wieght'\]"),
        ([{**GOOD, "weight": 0}], r"weight: expected a positive number, got 0"),
        ([{**GOOD, "weight": float("inf")}], r"weight: expected a positive number, got inf"),
        ([{**GOOD, "weight": "1"}], r"weight: expected a positive number, got '1'"),
        ([{**GOOD, "expert": "yes"}], r"expert: expected true or false, got 'yes'"),
        ([{**GOOD, "labels": "l", "expert": True}], r"expected `labels` or `expert = true` .*, got both"),
        ([{**GOOD, "name": "a/b"}], r"name: expected a name without '/', got 'a/b'"),
        ([GOOD, GOOD], r"expected datasets with distinct names, got \['d', 'd'\]; give them a `name` each"),
    ],
)
def test_malformed_mixture_files_are_refused(tmp_path, content, said):
    path = tmp_path / "mix.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(MixtureError, match=said):
        read_mixture(path)


def test_toml_and_json_say_the_same(tmp_path):
    entries = [{"dataset": "one", "weight": 3.0, "labels": "l"}, {"dataset": "two", "expert": True}]
    (tmp_path / "a.json").write_text(json.dumps({"datasets": entries}))
    (tmp_path / "a.toml").write_text(
        '[[datasets]]\ndataset = "one"\nweight = 3.0\nlabels = "l"\n[[datasets]]\ndataset = "two"\nexpert = true\n'
    )
    both = [read_mixture(tmp_path / name) for name in ("a.json", "a.toml")]
    assert both[0].members == both[1].members and both[0].shares.tolist() == [0.75, 0.25]
    with pytest.raises(
        MixtureError, match=r"--serve: expected the name of a dataset of .*, in \['one', 'two'\], got 'x'"
    ):
        read_mixture(tmp_path / "a.json", "x")


def test_what_does_not_go_with_a_mixture_is_refused(folder, capsys):
    def refused(*argv: str) -> str:
        assert main(["train", "policy", "--preset", "debug", "--out", str(folder / "x"), *argv]) == 2
        return " ".join(capsys.readouterr().err.split())

    mix, data = ("--mixture", str(folder / "mix.json")), ("--dataset", str(folder / "cart" / "dataset"))
    assert "--dataset, --mixture: expected one of the two, got neither" in refused()
    assert "--dataset, --mixture: expected one of the two, got both" in refused(*mix, *data)
    assert "--serve: expected --mixture" in refused(*data, "--serve", "cart")
    assert "--labels: expected none beside --mixture" in refused(*mix, "--labels", str(folder))
    assert "--positive-share, --cotrain-share: expected none beside --mixture" in refused(
        *mix, "--positive-share", "0.5", "--cotrain-share", "0.5"
    )
    (folder / "bare.json").write_text(json.dumps([{"dataset": "cart/dataset"}]))
    said = refused("--mixture", str(folder / "bare.json"))
    assert "mode 'recap' needs `labels` (made by `recap label --n episode`) or `expert = true`" in said


def test_frames_of_two_sizes_are_refused(folder, tmp_path):
    wide = replace(CART, cameras=(Camera("eye", 16, 16),))
    make_dataset(tmp_path, wide, (4,))
    (tmp_path / "m.json").write_text(
        json.dumps(
            [{"dataset": str(folder / "arm" / "dataset"), "name": "arm"}, {"dataset": "dataset", "name": "small"}]
        )
    )
    with pytest.raises(MixtureError, match="got arm 32x32, small 16x16; resize the frames"):
        load_members(read_mixture(tmp_path / "m.json"), "imitation")
