"""Layers of the static inference graph: weights fused and cast once, everything else in fp32.

Matrix products run in the graph's dtype; the residual stream, norms, softmax and rotary embedding stay in fp32, so that
fp16 cannot overflow and bf16 does not accumulate its rounding over the layers.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recap_model.policy.language import ROPE_WAVELENGTH, Layer
from recap_model.policy.siglip import SiglipLayer, SiglipTower, pixel_shuffle

Attention = Literal["matmul", "sdpa", "onnxruntime"]
MASKED = -30000.0  # exp(MASKED) is 0 in fp32; fits fp16, where finfo(fp32).min would become -inf


class Dense(nn.Module):
    """A linear map with constant weights in `dtype`: [..., in] in any dtype -> [..., out] in `dtype`."""

    weight: Tensor  # [in, out]: exported as one MatMul with a constant, which quantisers and parsers recognise
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().T.to(dtype).contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        if x.is_cuda:
            return F.linear(x, self.weight.T, self.bias)  # the bias in the epilogue of the product
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


def dense(*parts: nn.Linear, dtype: torch.dtype, scale: float = 1.0) -> Dense:
    """Several linear maps of the same input as one; the outputs of the first are multiplied by `scale`."""
    weights = [part.weight * (scale if i == 0 else 1.0) for i, part in enumerate(parts)]
    biases = [part.bias * (scale if i == 0 else 1.0) for i, part in enumerate(parts) if part.bias is not None]
    return Dense(torch.cat(weights), torch.cat(biases) if biases else None, dtype)


def rope_table(length: int, head_dim: int) -> Tensor:
    """fp32 [length, 2, head_dim]: cosines (twice) and sines (the first half negated) of every position."""
    exponent = torch.arange(head_dim // 2, dtype=torch.float32) * (2.0 / head_dim)
    radians = torch.arange(length, dtype=torch.float32)[:, None] / ROPE_WAVELENGTH**exponent
    cos, sin = radians.cos(), radians.sin()
    return torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)], dim=1)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x [B, L, heads, D], table [B or 1, L, 2, D] -> rotated fp32 [B, L, heads, D]."""
    x, half = x.float(), x.shape[-1] // 2
    swapped = torch.cat([x[..., half:], x[..., :half]], dim=-1)
    return x * table[:, :, :1] + swapped * table[:, :, 1:]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, how: Attention) -> Tensor:
    """q [B, L, H, D], scaled; k, v [B, G, S, D] in the graph's dtype; bias fp32 [B, 1, L or 1, S] -> [B, L, H*D].

    The H / G query heads that share a key head are rows of one matrix product: nothing is copied per head.
    """
    batch, length, heads, width = q.shape
    kv = k.shape[1]
    groups = heads // kv
    grouped = q.transpose(1, 2) if groups == 1 else q.unflatten(2, (kv, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    grouped = grouped.to(k.dtype)
    if how == "sdpa":
        mask = None if bias is None else _per_group(bias, groups).to(k.dtype)
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=1.0)
    else:
        scores = (grouped @ k.transpose(2, 3)).float()
        if bias is not None:
            scores = scores + _per_group(bias, groups)
        out = scores.softmax(-1).to(v.dtype) @ v
    if groups == 1:
        return out.transpose(1, 2).flatten(2)
    return out.unflatten(2, (groups, length)).permute(0, 3, 1, 2, 4).reshape(batch, length, heads * width)


def _per_group(bias: Tensor, groups: int) -> Tensor:
    """A mask over queries, repeated for the query heads that are rows of one product."""
    return bias if bias.shape[2] == 1 or groups == 1 else bias.repeat(1, 1, groups, 1)


def rms_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """`norm` (an RMSNorm) in the form that exporters' fusions recognise; on a GPU torch's own kernel."""
    if x.is_cuda:
        return norm(x)
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by tanh in the form that onnxruntime fuses into one operator; on a GPU torch's own kernel."""
    if x.is_cuda:
        return F.gelu(x, approximate="tanh")
    inner = (x * 0.7978845608028654) * (x * (x * 0.044715) + 1.0)
    return (x * 0.5) * (inner.tanh() + 1.0)


class StaticSiglipLayer(nn.Module):
    def __init__(self, layer: SiglipLayer, dtype: torch.dtype, how: Attention) -> None:
        super().__init__()
        self.heads, self.how = layer.heads, how
        self.norm1, self.norm2 = layer.norm1, layer.norm2
        scale = (layer.q.in_features // layer.heads) ** -0.5
        self.qkv = dense(layer.q, layer.k, layer.v, dtype=dtype, scale=scale)
        self.o, self.up, self.down = (dense(m, dtype=dtype) for m in (layer.o, layer.up, layer.down))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(self.attend(self.qkv(self.norm1(x)))).float()
        return x + self.down(gelu_tanh(self.up(self.norm2(x)))).float()

    def attend(self, qkv: Tensor) -> Tensor:
        """[N, patches, 3 * width] -> [N, patches, width]. For "onnxruntime" an operator that torch cannot run."""
        if self.how == "onnxruntime":
            q, k, v = qkv.chunk(3, dim=-1)
            attributes: dict[str, Any] = {"num_heads": self.heads, "scale": 1.0}
            return torch.onnx.ops.symbolic(
                "com.microsoft::MultiHeadAttention", (q, k, v), attributes, dtype=q.dtype, shape=q.shape, version=1
            )
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).unbind(2)
        return attend(q, k.transpose(1, 2), v.transpose(1, 2), None, self.how)


class StaticSiglip(nn.Module):
    """uint8 frames [N, H, W, 3] -> tokens fp32 [N, tokens, out]; scaling and positions are part of the weights."""

    rows: Tensor
    columns: Tensor
    position: Tensor

    def __init__(self, tower: SiglipTower, dtype: torch.dtype, how: Attention) -> None:
        super().__init__()
        self.config, self.resizes = tower.config, tower.resizes
        self.register_buffer("rows", tower.rows)
        self.register_buffer("columns", tower.columns)
        # patches arrive as (row, channel, column); a pixel p stands for 2p/255 - 1
        weight = tower.patch.weight.permute(0, 2, 1, 3).flatten(1)
        self.patch = Dense(weight * (2.0 / 255.0), None, dtype)
        bias = tower.patch.bias - weight.sum(1)
        self.register_buffer("position", (tower.position[tower.position_ids] + bias).detach().float())
        layers = (StaticSiglipLayer(layer, dtype, how) for layer in tower.layers)  # type: ignore[arg-type]
        self.layers = nn.ModuleList(layers)
        self.norm = tower.norm
        self.connector = Dense(tower.connector.weight * tower.out**0.5, None, dtype)

    def forward(self, images: Tensor) -> Tensor:
        grid, size = self.config.grid, self.config.patch_size
        pixels = images.permute(0, 1, 3, 2).float()  # [N, H, 3, W]
        if self.resizes:
            pixels = (self.rows @ pixels.flatten(2)).unflatten(2, (3, -1)) @ self.columns.T
        patches = (
            pixels.reshape(-1, grid, size, 3, grid, size).permute(0, 1, 4, 2, 3, 5).reshape(-1, grid**2, 3 * size**2)
        )
        x = self.patch(patches).float() + self.position
        for layer in self.layers:
            x = layer(x)
        return self.connector(pixel_shuffle(self.norm(x), self.config.shuffle)).float()


class StaticLayer(nn.Module):
    """One transformer layer with fused projections.

    joint: keys and values come from the layer's own stream (language layers, joint expert layers).
    last: only keys and values are ever read.
    """

    def __init__(self, layer: Layer, dtype: torch.dtype, *, joint: bool = True, last: bool = False) -> None:
        super().__init__()
        self.head_dim, self.joint, self.last = layer.head_dim, joint, last
        self.kv_heads = layer.k.out_features // layer.head_dim
        scale = layer.head_dim**-0.5
        self.input_norm = layer.input_norm
        own = (layer.k, layer.v) if last else (layer.q, layer.k, layer.v) if joint else (layer.q,)
        self.project = dense(*own, dtype=dtype, scale=1.0 if last else scale)
        if not joint:
            self.k, self.v = dense(layer.k, dtype=dtype), dense(layer.v, dtype=dtype)
        if not last:
            self.post_norm = layer.post_norm
            self.o = dense(layer.o, dtype=dtype)
            self.gate_up = dense(layer.mlp.gate, layer.mlp.up, dtype=dtype)
            self.down = dense(layer.mlp.down, dtype=dtype)

    def heads(self, x: Tensor) -> Tensor:
        """[B, L, width] -> [B, L, heads, head_dim]."""
        return self.project(rms_norm(x, self.input_norm)).unflatten(2, (-1, self.head_dim))

    def split(self, heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fused heads -> queries, keys, values [B, L, *, head_dim]."""
        count = heads.shape[2] - 2 * self.kv_heads
        q, k, v = heads.split([count, self.kv_heads, self.kv_heads], dim=2)
        return q, k, v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residual, then the MLP block; x fp32."""
        x = x + self.o(attended).float()
        gate, up = self.gate_up(rms_norm(x, self.post_norm)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up).float()
