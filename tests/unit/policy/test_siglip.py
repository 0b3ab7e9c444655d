"""The parts of SmolVLM2's tower that have no weights, against torch's and transformers' own."""

import pytest
import torch
from torch.nn import functional as F
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector, SmolVLMVisionEmbeddings

from recap_model.policy.config import SiglipConfig
from recap_model.policy.siglip import SiglipTower, pixel_shuffle, position_ids, resize_matrix, resized_shape


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("grid", [4, 6, 7, 12, 27, 32])
def test_position_ids_are_those_of_transformers_in_the_training_dtype(grid, dtype):
    config = SmolVLMVisionConfig(hidden_size=1, image_size=grid * 2, patch_size=2, num_attention_heads=1)
    table = SmolVLMVisionEmbeddings(config)
    with torch.no_grad():
        for p in table.parameters():
            p.zero_()
        seen = []
        table.position_embedding.register_forward_hook(lambda _, args, __: seen.append(args[0]))
        pixels = torch.zeros(1, 3, 2 * grid, 2 * grid, dtype=getattr(torch, dtype))
        table.to(pixels.dtype)(pixels, torch.ones(1, grid, grid, dtype=torch.bool))
    assert torch.equal(position_ids(grid, dtype), seen[0][0])


def test_scaled_float32_positions_repeat_the_first_row_and_never_reach_the_last():
    ids = position_ids(32, "float32_scaled").reshape(32, 32)
    assert ids[0].tolist() == [0, 0, *range(1, 31)] and int(ids.max()) == 990
    assert torch.equal(position_ids(32, "bfloat16"), torch.arange(1024))


@pytest.mark.parametrize("frame", [(48, 64), (64, 40), (480, 640), (30, 34), (64, 64), (65, 64), (512, 512)])
def test_resize_as_two_matrix_products_is_torchs_interpolation(frame):
    side = 64
    height, width = resized_shape(frame, side)
    pixels = torch.rand(2, 3, *frame)
    ours = resize_matrix(frame[0], height, side) @ pixels @ resize_matrix(frame[1], width, side).T
    theirs = F.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=False)
    theirs = F.pad(theirs, (side - width, 0, side - height, 0))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_pixel_shuffle_is_transformers():
    x = torch.randn(2, 64, 5)
    assert torch.equal(pixel_shuffle(x, 4), SmolVLMConnector.pixel_shuffle(None, x, 4))


def test_an_image_that_the_connector_cannot_divide_is_refused():
    with pytest.raises(ValueError, match=r"a multiple of patch_size \* shuffle \(16 \* 4\), got 96"):
        SiglipTower(SiglipConfig(image_size=96, width=8, layers=1, heads=1, intermediate=8), 8, (96, 96))
