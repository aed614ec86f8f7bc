"""Number formats for the machine at hand: int8 weights, and whether bfloat16 is fast. Not part of the method."""

from collections.abc import Container
from functools import reduce
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .files import reading


class Int8Linear(nn.Module):
    """y = (x W^T) * scale + bias. Row i of the original weight is about scale_i * W_i, W within +-127."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        parts = quantise(linear.weight, linear.weight.dtype)
        self.weight, self.scale = (nn.Parameter(part, requires_grad=False) for part in parts)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:  # (..., d) -> (..., out)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        scale = self.scale.to(x.dtype)
        # PyTorch's int8 product: on a CPU, in bfloat16, contiguous, without a gradient, aligned to 32 bytes (it never
        # checks), and faster only for a few rows, such as a beam search's.
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        few = len(rows) <= 16 and x.device.type == "cpu" and x.dtype == torch.bfloat16 and not x.requires_grad
        if few and all(n % 32 == 0 for n in (rows.shape[1], rows.data_ptr(), self.weight.data_ptr())):
            y = torch._weight_int8pack_mm(rows, self.weight, scale).view(*x.shape[:-1], len(self.weight))
        else:
            y = Int8Product.apply(x, self.weight, scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Int8Product(torch.autograd.Function):
    """y = (x W^T) * scale. Each pass converts W to x's dtype, 8192 rows at a time; only its int8 form is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:  # (..., d), (out, d), (out,)
        ctx.save_for_backward(weight, scale)
        parts = [F.linear(x, rows.to(x.dtype)) for rows in weight.split(8192)]
        return (torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # (..., out) -> (..., d): dL/dy -> dL/dx
        weight, scale = ctx.saved_tensors
        parts = zip((grad * scale).split(8192, dim=-1), weight.split(8192), strict=True)
        return reduce(torch.add, (part @ rows.to(grad.dtype) for part, rows in parts)), None, None


def quantise(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # (out, d) -> (out, d) int8, (out,)
    """Round each row to multiples of its largest magnitude / 127. The scale is rounded to `dtype` first."""
    scale = (weight.float().abs().amax(1) / 127).clamp_min(1e-30).to(dtype)
    return (weight.float() / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def to_int8(model: nn.Module, weights: Container[str] | None = None) -> None:
    """Make the layers of these weights, or all, Int8Linear; one at a time, so that memory never holds two models."""
    for name in [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]:
        if weights is None or f"{name}.weight" in weights:
            model.set_submodule(name, Int8Linear(cast(nn.Linear, model.get_submodule(name))))


def usable(device: str | torch.device) -> torch.device:
    """The device, if this machine has it and this PyTorch can use it; else a ValueError."""
    with reading(f"the device {str(device)!r} cannot be used, cpu always can"):
        probe = torch.zeros(1, device=device)
        probe.tolist()  # meta holds no values
        return probe.device


def has_bfloat16() -> bool:  # this CPU, in hardware; elsewhere float32 is faster
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def best_dtype(device: str | torch.device) -> torch.dtype:
    kind = torch.device(device).type
    fast = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast or (kind == "cpu" and has_bfloat16()) else torch.float32
