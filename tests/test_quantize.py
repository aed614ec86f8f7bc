"""int8 linear layers, and which dtype a device computes in."""

import re
from pathlib import Path

import pytest
import torch
from conftest import convert, relative
from torch import Tensor, nn

import weights
from lion_mini import Lion, toy
from lion_mini.files import read_folder
from lion_mini.model.layers import attention
from lion_mini.quantize import Int8Linear, best_dtype, quantise, to_int8
from lion_mini.toy import scores


@pytest.fixture(scope="module")
def int8_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8") / "golden"
    assert convert(folder, dtype="int8") == 0
    return folder


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists the mapped files")
def test_no_file_of_an_int8_folder_stays_mapped(int8_folder: Path) -> None:
    """A mapped file counts as memory beside the copy of its tensors."""
    tensors = read_folder(int8_folder, "cpu", None)
    assert tensors
    assert str(int8_folder) not in Path("/proc/self/maps").read_text()


def test_a_row_is_rounded_to_half_a_step_of_its_own() -> None:
    weight = torch.randn(7, 33) * torch.logspace(-20, 3, 7)[:, None]
    weight[3] = 0
    for dtype in (torch.float32, torch.bfloat16):
        rounded, scale = quantise(weight, dtype)
        assert scale.dtype == dtype
        error = (rounded * scale.float()[:, None] - weight).abs()
        assert (error <= 0.501 * scale.float()[:, None]).all()
        assert (rounded.abs().amax(1)[[0, 1, 2, 4, 5, 6]] >= 126).all()
        assert not rounded[3].any()


@pytest.mark.parametrize("rows", [5, 8200])  # many rows are dequantised in parts
@pytest.mark.parametrize(("dtype", "half"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
def test_int8_linear_is_the_linear_layer_of_its_rounded_weight(rows: int, dtype: torch.dtype, half: bool) -> None:
    """Its output and gradient, `half` under autocast. The backward pass needs the bytes and the scale alone."""
    layer, kept = Int8Linear(nn.Linear(32, rows).requires_grad_(False).to(dtype)), list[Tensor]()

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    weight, bound = layer.weight.double() * layer.scale.double()[:, None], 0.02 if half or dtype.itemsize == 2 else 1e-6
    for shape in ((2, 3), (7,), (3, 0), (40, 1)):
        x = torch.randn(*shape, 32, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                y = layer(x)
            assert layer(x.detach()).dtype == y.dtype == (torch.bfloat16 if half else dtype)
            answer = layer(x.detach())
        pull = torch.randn_like(y)
        y.backward(pull)
        assert x.grad is not None
        for found, exact in ((y, x.double() @ weight.T + layer.bias), (answer, y), (x.grad, pull.double() @ weight)):
            assert not exact.numel() or relative(found, exact) < bound
    assert kept
    assert all(tensor.dtype == torch.int8 or tensor.ndim == 1 for tensor in kept)


@pytest.mark.parametrize("width", [64, 96, 100])
def test_int8_linear_with_few_rows(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in bfloat16 with few rows or many, and a width that the kernel can read or cannot."""
    layer = Int8Linear(nn.Linear(width, 37).requires_grad_(False).bfloat16())
    x = torch.randn(3, 20, width).bfloat16()
    weight = layer.weight.double() * layer.scale.double()[:, None]
    shifted = torch.randn(6 * width + 1).bfloat16()[1:].view(2, 3, width)
    for rows in (x, x[:, :5], x[:, ::4], x[0, 3], shifted):
        exact = rows.double() @ weight.T + layer.bias.double()
        assert relative(layer(rows), exact) < 0.01
    assert layer(x[:, :2].requires_grad_()).requires_grad
    assert layer(x[:, :0]).shape == (3, 0, 37)
    calls: list[int] = []
    kernel = torch._weight_int8pack_mm

    def counted(rows: Tensor, *rest: Tensor) -> Tensor:
        calls.append(len(rows))
        return kernel(rows, *rest)

    monkeypatch.setattr(torch, "_weight_int8pack_mm", counted)
    for rows in (x, x[:, :5], x[0, 3], shifted):
        layer(rows)
    assert calls == ([15, 1] if width % 32 == 0 else [])
    memory = torch.zeros(layer.weight.numel() + 1, dtype=torch.int8)  # as in a file that another program laid out
    memory[1:] = layer.weight.flatten()
    before, layer.weight.data = layer(x), memory[1:].view_as(layer.weight)
    assert relative(layer(x[:, :2]), before[:, :2]) < 0.01
    assert len(calls) < 3


def test_int8_folder(int8_folder: Path, golden_folder: Path) -> None:
    whole, small = Lion.from_pretrained(golden_folder).model, Lion.from_pretrained(int8_folder).model
    layers = [name for name, module in whole.named_modules() if isinstance(module, nn.Linear)]
    assert layers == [name for name, module in small.named_modules() if isinstance(module, Int8Linear)]
    state = small.state_dict()
    for name, tensor in whole.state_dict().items():
        part = name.removesuffix(".weight")
        if part in layers and name != part:
            rounded, scale = quantise(tensor, torch.bfloat16)
            assert torch.equal(state[name], rounded), name
            assert torch.equal(state[f"{part}.scale"], scale.float()), name
        else:
            assert torch.equal(state[name], tensor.bfloat16().float()), name
    size, before = (sum(p.stat().st_size for p in f.glob("*.safetensors")) for f in (int8_folder, golden_folder))
    assert size < 0.4 * before
    stored = Lion.from_pretrained(int8_folder, dtype=None)
    assert stored.dtype == torch.bfloat16
    small_ones = [one for one in stored.model.parameters() if one.dtype == torch.int8]
    assert all(one.data_ptr() % 32 == 0 for one in small_ones)  # which the CPU's int8 product needs


def test_a_weight_is_rounded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounded = []

    def counted(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rounded.append(weight.shape)
        return quantise(weight, dtype)

    monkeypatch.setattr(weights, "quantise", counted)
    assert convert(tmp_path / "out", dtype="int8") == 0
    stored = read_folder(tmp_path / "out", "cpu", None)
    assert len(rounded) == sum(tensor.dtype == torch.int8 for tensor in stored.values())


def test_int8_in_memory_is_int8_on_disk(int8_folder: Path, golden_folder: Path) -> None:
    whole = Lion.from_pretrained(golden_folder, dtype=torch.bfloat16).model
    to_int8(whole)
    stored = Lion.from_pretrained(int8_folder, dtype=None).model.state_dict()
    close = [name for name, tensor in whole.state_dict().items() if tensor.dtype == torch.int8]
    assert close
    for name in close:  # rounded once from float32, once from bfloat16
        assert (whole.state_dict()[name].int() - stored[name].int()).abs().max() <= 2, name


def test_int8_is_no_format_of_the_release(int8_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert weights.main(["export", str(int8_folder), "--out", str(tmp_path / "lion.pth")]) == 2
    assert re.search(r"the release has no qformer\.\S+\.weight in torch.int8", capsys.readouterr().err)
    assert weights.main(["inspect", str(int8_folder)]) == 0
    assert "t5.encoder.0.ff.wo.scale" in capsys.readouterr().out


def test_tiny_in_int8_sees_as_well(tmp_path: Path) -> None:
    """The toy metrics of 60 scenes; the README has those of 1,000."""
    whole, small = Lion.from_pretrained("tiny"), Lion.from_pretrained("tiny")
    to_int8(small.model)
    scenes = [toy.scene(i, "test") for i in range(60)]
    rows = [scores.toy_scores(scores.ask(lion, scenes)) for lion in (whole, small)]
    for before, after in zip(*rows, strict=True):
        assert after.score > before.score - 0.05, (before, after)


def test_best_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("lion_mini.quantize.has_bfloat16", lambda fast=fast: fast)
        assert best_dtype("cpu") == dtype
    assert best_dtype("mps") == torch.float32


def test_attention_in_bfloat16_is_attention() -> None:
    """On a CPU it takes a way of its own; that is what float32 makes of the same numbers."""
    q, k, v = (torch.randn(2, 3, n, 8).bfloat16() for n in (5, 7, 7))
    bias, seen = torch.randn(1, 3, 5, 7).bfloat16(), torch.rand(2, 1, 1, 7) > 0.4
    seen[..., 0] = True
    for mask, scale in ((None, None), (bias, 1.0), (seen, 0.5), (bias.masked_fill(~seen, -torch.inf), None)):
        exact = mask if mask is None or mask.dtype == torch.bool else mask.float()
        coarse, precise = (
            [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)] for dtype in (q.dtype, torch.float32)
        )
        found = attention(coarse[0], coarse[1], coarse[2], mask, scale)
        expected = attention(precise[0], precise[1], precise[2], exact, scale)
        assert found.dtype == torch.bfloat16
        assert relative(found.float(), expected) < 0.02, (mask is None, scale)
        pull = torch.randn_like(expected)  # of the sum whose gradients training would need
        gradients = torch.autograd.grad((found * pull).sum(), coarse)
        for ours, theirs in zip(gradients, torch.autograd.grad((expected * pull).sum(), precise), strict=True):
            assert relative(ours.float(), theirs) < 0.03, (mask is None, scale)
    shares = torch.eye(7).bfloat16().expand(2, 3, 7, 7)  # as values they let the probabilities be seen
    kept, dropped = (attention(q, k, shares, dropout=p) for p in (0.0, 0.5))
    gone = dropped == 0
    assert 0.3 < gone.float().mean() < 0.7
    assert torch.equal(dropped[~gone], 2 * kept[~gone])


def test_no_part_takes_the_slow_kernel_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bias in float32 before the attention would be enough: in bfloat16 the fused kernel takes thrice as long."""
    model = Lion.from_pretrained("tiny")
    monkeypatch.delattr("torch.nn.functional.scaled_dot_product_attention")
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 3, 48, 48), ["where?", "what is it?"], ["a", "b c"], None, ["image"] * 2)
