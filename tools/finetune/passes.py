"""RMSNorm and RoPE with their derivatives written out: a fifth of the passes over memory that autograd would make."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normal = x * scale
        moved = gradient * normal
        by_weight = moved.flatten(0, -2).sum(0)
        share = moved.mul_(weight).mean(-1, keepdim=True)
        by_x = (gradient * weight).sub_(normal.mul_(share)).mul_(scale)
        return by_x, by_weight, None


class Rotate(torch.autograd.Function):
    """RoPE of the rotate-half kind: x [n_tokens, n_head, d_head], cos and sin [n_tokens, 1, d_head / 2]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _turn(gradient, *ctx.saved_tensors, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    turned = torch.empty_like(x)
    torch.mul(a, cos, out=turned[..., :half]).addcmul_(b, sin, value=-direction)
    torch.mul(b, cos, out=turned[..., half:]).addcmul_(a, sin, value=direction)
    return turned
