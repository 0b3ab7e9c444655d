"""Our SmolVLA against LeRobot's own class: same random weights, every branch, fp32, 1e-5."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from lerobot.policies.common.vla_utils import make_att_2d_masks

from lerobot_smolvla import lerobot_policy, our_policy, write_vlm
from recap_model.policy import flow
from recap_model.policy.language import prefix_mask
from recap_model.policy.lerobot_weights import from_lerobot, to_lerobot

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
BATCH = 2


@dataclass(frozen=True)
class Case:
    """vlm: sizes that differ. options: LeRobot's configuration. present: cameras that the robot has."""

    vlm: dict[str, int] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    frame: tuple[int, int] = (48, 64)
    cameras: int = 2
    present: int = 2


CASES = {
    "cross_attn": Case(),
    "self_attn": Case(options={"attention_mode": "self_attn"}),
    "32 language layers": Case(vlm={"layers": 32}, options={"num_vlm_layers": 32}),
    "all language layers": Case(vlm={"layers": 4}, options={"num_vlm_layers": 0}),
    "cross-attention alone": Case(options={"self_attn_every_n_layers": -1}),
    "every fourth layer joint": Case(options={"self_attn_every_n_layers": 4}),
    "half as many expert layers": Case(options={"num_expert_layers": 8, "self_attn_every_n_layers": -1}),
    "padding on the left": Case(frame=(64, 40)),
    "frames made smaller": Case(frame=(120, 160)),
    "frames made larger": Case(frame=(30, 34)),
    "frames as they are": Case(frame=(64, 64)),
    "grid of six": Case(vlm={"side": 96}),
    "shuffle of four": Case(vlm={"shuffle": 4}),
    "a camera missing": Case(cameras=3),
    "empty cameras": Case(options={"empty_cameras": 2}),
    "image tokens": Case(options={"add_image_special_tokens": True}),
    "image tokens and empty cameras": Case(options={"add_image_special_tokens": True, "empty_cameras": 1}),
    "prefix padded": Case(options={"prefix_length": 40}),
    "wider vectors": Case(options={"max_state_dim": 7, "max_action_dim": 9}),
    "no padding of vectors": Case(options={"max_state_dim": 5, "max_action_dim": 4}),
    "other expert width": Case(options={"expert_width_multiplier": 0.5}),
    "other periods": Case(options={"min_period": 1e-2, "max_period": 2.0, "num_steps": 10}),
}


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def case(request, tmp_path_factory):
    c = CASES[request.param]
    theirs = lerobot_policy(
        write_vlm(tmp_path_factory.mktemp("vlm"), **c.vlm), frame=c.frame, cameras=c.cameras, **c.options
    )
    return theirs, our_policy(theirs, present=c.present, frame=c.frame), c


def observe(c: Case, action_width: int, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(12)[None] < torch.tensor([[7], [11]])
    return {
        "images": torch.randint(0, 256, (BATCH, c.present, *c.frame, 3), dtype=torch.uint8, generator=g),
        "state": torch.randn(BATCH, 5, generator=g),
        "tokens": torch.randint(0, 15, (BATCH, 12), generator=g) * mask,
        "token_mask": mask,
        "noise": torch.randn(BATCH, 6, action_width, generator=g),
    }


def their_batch(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    images = x["images"].permute(1, 0, 4, 2, 3).float() / 255
    return {f"observation.images.c{i}": image for i, image in enumerate(images)} | {
        "observation.state": x["state"].clone(),
        "observation.language.tokens": x["tokens"],
        "observation.language.attention_mask": x["token_mask"],
    }


def their_prefix(theirs, x):
    batch = their_batch(x)
    images, masks = theirs.prepare_images(batch)
    state = theirs.prepare_state(batch)
    return theirs.model.embed_prefix(images, masks, x["tokens"], x["token_mask"], state=state)


def test_prefix_keys_values_step_and_chunk(case):
    theirs, ours, c = case
    x = observe(c, ours.config.padded_action)
    with torch.no_grad():
        embeddings, pad, block = their_prefix(theirs, x)
        our_embeddings, our_pad = ours.embed_prefix(ours.see(x["images"]), x["state"], x["tokens"], x["token_mask"])
        torch.testing.assert_close(our_embeddings[our_pad], embeddings[pad], **TOLERANCE)

        _, cache = theirs.model.vlm_with_expert.forward(
            attention_mask=make_att_2d_masks(pad, block),
            position_ids=torch.cumsum(pad, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[embeddings, None],
            use_cache=True,
        )
        mask, positions = prefix_mask(our_pad)
        _, ours_cache = ours.language(our_embeddings, mask, positions, stop=ours.expert.depth)
        for layer, (keys, values) in zip(cache.layers, ours_cache, strict=False):
            torch.testing.assert_close(keys[our_pad], layer.keys.transpose(1, 2)[pad], **TOLERANCE)
            torch.testing.assert_close(values[our_pad], layer.values.transpose(1, 2)[pad], **TOLERANCE)
        assert len(ours_cache) == ours.expert.depth <= len(cache.layers)

        prefix = ours.read(ours.see(x["images"]), x["state"], x["tokens"], x["token_mask"])
        time = torch.tensor([0.3, 0.9])
        step = theirs.model.denoise_step(pad, cache, x["noise"], time)
        torch.testing.assert_close(ours.velocity(x["noise"], time, prefix), step, **TOLERANCE)

        chunk = theirs.predict_action_chunk(their_batch(x), noise=x["noise"])
        torch.testing.assert_close(ours.sample_actions(**x), chunk, **TOLERANCE)
    assert chunk.std() > 0.1  # actions that the weights have something to do with


GRADIENT_CASES = ("cross_attn", "self_attn", "half as many expert layers", "image tokens and empty cameras")


@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_gradients_of_the_training_loss(name, tmp_path):
    c = CASES[name]
    options = {**c.options, "train_expert_only": False, "freeze_vision_encoder": False}
    theirs = lerobot_policy(write_vlm(tmp_path / "vlm", **c.vlm), frame=c.frame, cameras=c.cameras, **options)
    ours = our_policy(theirs, present=c.present, frame=c.frame)
    x = observe(c, ours.config.padded_action, seed=3)
    actions, time = torch.randn(BATCH, 6, 4), torch.tensor([0.2, 0.7])
    valid = torch.tensor([[True] * 6, [True, True, True, False, False, False]])
    batch = their_batch(x) | {"action": actions, "action_is_pad": ~valid}
    loss, _ = theirs.forward(batch, noise=x["noise"], time=time)
    loss.backward()

    noisy, target = flow.interpolate(ours.normalize_actions(actions), x["noise"], time)
    prefix = ours.read(ours.see(x["images"]), x["state"], x["tokens"], x["token_mask"])
    our_loss = flow.loss(ours.velocity(noisy, time, prefix)[..., :4], target[..., :4], valid)
    our_loss.backward()

    torch.testing.assert_close(our_loss, loss, **TOLERANCE)
    reference = dict(theirs.named_parameters())
    compared = 0
    for ours_name, p in ours.named_parameters():
        other = reference[to_lerobot(ours_name)]
        if p.grad is None or other.grad is None:
            # what LeRobot freezes (the last language layer, final norm and head) reaches no action, or only by its K, V
            assert not other.requires_grad or not other.grad, ours_name
            continue
        torch.testing.assert_close(p.grad, other.grad, **TOLERANCE, msg=lambda m, n=ours_name: f"{n}: {m}")
        compared += other.grad.abs().max() > 1e-4
    assert compared > 150


def test_every_name_has_one_partner(tmp_path):
    theirs = lerobot_policy(write_vlm(tmp_path / "vlm"))
    ours = our_policy(theirs)
    names = {name for name, _ in theirs.named_parameters()}
    assert {to_lerobot(name) for name, _ in ours.named_parameters()} == names
    assert all(to_lerobot(from_lerobot(name)) == name for name in names)
    assert from_lerobot("model.something_else.weight") is None
