"""Layouts that LeRobot's class cannot run are refused before any weight is made; JSON goes both ways."""

from dataclasses import replace

import pytest

from recap_model.policy.config import (
    ConvConfig,
    ExpertConfig,
    ExpertLayer,
    LanguageConfig,
    PolicyConfig,
    PolicyConfigError,
    SiglipConfig,
    expert_plan,
)

LANGUAGE = LanguageConfig(layers=16)


def test_plan_of_the_released_checkpoint():
    plan = expert_plan(LANGUAGE, ExpertConfig())
    assert plan == tuple(ExpertLayer(i, i % 2 == 0) for i in range(16))


def test_fewer_expert_layers_skip_language_layers():
    plan = expert_plan(LANGUAGE, ExpertConfig(layers=8, self_attn_every=0))
    assert [step.at for step in plan] == list(range(0, 16, 2)) and not any(step.joint for step in plan)


@pytest.mark.parametrize(
    "expert",
    [
        ExpertConfig(layers=8),
        ExpertConfig(layers=8, attention="self_attn"),
        ExpertConfig(layers=8, self_attn_every=4),
    ],
)
def test_layouts_that_no_forward_runs_are_refused(expert):
    with pytest.raises(PolicyConfigError, match=r"expected attention 'cross_attn' with self_attn_every 0"):
        expert_plan(LANGUAGE, expert)


@pytest.mark.parametrize("layers", [5, 17])
def test_expert_layers_divide_the_language_layers(layers):
    with pytest.raises(PolicyConfigError, match=f"expected a divisor of 16 language layers, got {layers}"):
        expert_plan(LANGUAGE, ExpertConfig(layers=layers))


CONFIG = PolicyConfig(
    SiglipConfig(), LANGUAGE, ExpertConfig(), 2, 6, 6, frame=(480, 640), state_width=32, action_width=32,
    image_tokens=(1, 2), empty_cameras=1,
)  # fmt: skip


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, vision=ConvConfig(), image_tokens=None, frame=None)])
def test_json_round_trip(config):
    assert PolicyConfig.from_json(config.to_json()) == config


def test_a_config_from_before_a_field_existed_still_reads():
    old = replace(CONFIG, vision=ConvConfig(), image_tokens=None, frame=None, empty_cameras=0).to_json()
    for key in ("frame", "image_tokens", "empty_cameras", "max_delay"):
        del old[key]
    assert PolicyConfig.from_json(old).frame_size == (64, 64)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"family": "pi05"}, r"family: expected one of \['smolvla'\], got 'pi05'"),
        ({"vision": {"kind": "resnet"}}, r"vision.kind: expected 'conv' or 'siglip', got 'resnet'"),
        ({"depth": 3}, r"unexpected keyword argument 'depth'"),
        ({"state_width": 4}, r"state_width: expected at least 6, the robot's own, got 4"),
        ({"max_delay": 8}, r"max_delay: expected 0 to 7 actions of a chunk of 8, got 8"),
    ],
)
def test_bad_configs_are_refused(change, message):
    with pytest.raises(PolicyConfigError, match=message):
        PolicyConfig.from_json({**CONFIG.to_json(), **change})
