"""Other ways to hold a linear layer, for the machine at hand. Nothing here is part of the method.

    Int8Linear      a weight in eight bits, for a card or laptop of 8 GB       `weights.py convert --dtype int8`
    PackedLinear    a weight laid out for the CPU's matrix kernels             `Lion.from_pretrained(..., packed=True)`

Both take the place of `nn.Linear` in a finished model and leave the files that describe it as they are.
next: files.py
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 16  # above that, spelling the weight out pays


class Int8Linear(nn.Module):
    """y = (x W^T) * scale + bias, where row i of the layer that this replaces is about scale_i * W_i, W within +-127.

    Only the weight is rounded: products and sums are x's dtype, in which the weight is spelled out for a moment. For a
    few rows, a beam search's, that would take longer than the product: on a CPU the bytes are multiplied as they are.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, scale = quantise(linear.weight, linear.weight.dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:  # (..., d) -> (..., out)
        rows = x.reshape(-1, x.shape[-1])
        if readable(rows, self.weight):
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale).view(*x.shape[:-1], len(self.weight))
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


def readable(x: Tensor, weight: Tensor) -> bool:  # (r, d), (out, d)
    """Whether PyTorch's product for few rows can take these. It reads 32 bytes at a time and trusts its caller that
    they lie where the processor wants them; that of float32 is slow, and none has a gradient."""
    few = len(x) <= FEW_ROWS and x.device.type == "cpu" and x.dtype == torch.bfloat16 and not x.requires_grad
    return few and all(number % 32 == 0 for number in (x.shape[1], x.data_ptr(), weight.data_ptr()))


def quantise(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # (out, d) -> (out, d) int8, (out,)
    """Each row in steps of its own, a 127th of its largest value. The scale is rounded to its dtype before the row is
    divided by it, so that what bfloat16 loses of it is not lost from the weight."""
    if weight.is_meta:
        return torch.empty(weight.shape, dtype=torch.int8, device="meta"), weight[:, 0].to(dtype)
    scale = (weight.float().abs().amax(1) / 127).clamp_min(1e-30).to(dtype)
    return (weight.float() / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale


class PackedLinear(nn.Module):
    """`nn.Linear` for answering on a CPU: its weight stands in the blocks in which oneDNN reads it. A product with few
    rows, a beam search's, is bound by that reading, and takes half the time."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:  # (..., d) -> (..., out)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Every linear layer with the module that it belongs to and its name there. None is held on to here: a layer that
    is replaced goes, and its weight with it."""
    for parent in [module for module in model.modules() if not isinstance(module, nn.Linear)]:
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                yield parent, name, child


def to_int8(model: nn.Module) -> None:
    for parent, name, linear in linears(model):
        setattr(parent, name, Int8Linear(linear))


def pack(model: nn.Module) -> None:
    """Lay the model's weights out for this CPU, one after the other: memory holds no more than a sublayer's twice.

    The model answers as before, to rounding; it can no longer be saved, moved or trained. On other devices, and where
    PyTorch was built without oneDNN, this does nothing.
    """
    for parent, name, linear in linears(model):
        known = linear.weight.dtype == torch.float32 or has_bfloat16()
        if linear.weight.device.type == "cpu" and torch.backends.mkldnn.is_available() and known:
            setattr(parent, name, PackedLinear(linear))


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself; where it does not, float32 is faster."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def usable(device: str | torch.device) -> torch.device:
    """The device, if this machine has it and this PyTorch can use it; else a ValueError."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ImportError) as error:
        why = str(error).split("\n")[0].split(". ")[0]
        raise ValueError(f"the device {str(device)!r} cannot be used: {why}; cpu always can") from None


def best_dtype(device: str | torch.device) -> torch.dtype:
    kind = torch.device(device).type
    fast = has_bfloat16() if kind == "cpu" else kind == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if fast else torch.float32
