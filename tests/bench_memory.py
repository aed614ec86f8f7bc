"""Bytes: the peak of a training step, and the largest batch that fits on a card.

`peak_bytes` counts every tensor from when an operation makes it until it is freed: in the forward pass, the backward
pass and recomputed layers. It counts storages, so views are free. What existed before (weights, gradients, moments)
does not count, nor does a kernel's workspace. The count is exact and the same on every machine. It needs shapes alone,
so it can follow a step of LION-XXL on fake tensors.
"""

import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import rehearse
import torch
import torch.nn.functional as F
from conftest import OFFICIAL, ROOT
from einops import rearrange
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import weights
from lion_mini import Lion, LionConfig
from lion_mini.model import bert, t5, vit
from lion_mini.model.lion import Batch, LionModel, skeleton
from lion_mini.quantize import to_int8
from lion_mini.text.vocabularies import Vocabularies
from lion_mini.training.stages import STAGES, groups, part_of, unfreeze
from train import autocast

CPU = torch.device("cpu")
STATE = 12  # bytes for each trained parameter: its gradient and AdamW's two moments, in float32


class Peak(TorchDispatchMode):
    """Counts the bytes that are alive, at every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note((args, kwargs), new=False)
        out = func(*args, **(kwargs or {}))
        self.note(out, new=True)
        return out

    def note(self, tree: Any, new: bool) -> None:
        for tensor in tree_leaves(tree):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                size = storage.nbytes() if new else 0
                self.known.add(storage._cdata)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.free, storage._cdata, size)

    def free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_bytes(run: Callable[[], object]) -> int:
    with Peak() as peak:
        run()
    return peak.most


# --- a training step


def training(
    config: LionConfig,
    text: Vocabularies,
    number: int,
    half: bool,
    card: bool = False,
    device: torch.device = CPU,
    int8: bool = False,
) -> tuple[Lion, Callable[[Batch], None], Callable[[Batch], None]]:
    """A stage's model, the two passes of a micro-batch, and a whole step, as in train.py. `half` is autocast.

    On a `card` the frozen matrices are bfloat16. With `int8` the frozen linear layers are int8.
    """
    stage = STAGES[number]
    with device:
        model = LionModel(replace(config, **stage.model))
    frozen = {name for name, parameter in model.named_parameters() if part_of(name) is None and parameter.ndim > 1}
    to_int8(model, frozen if int8 else ())
    trained = unfreeze(model, stage)
    for name, parameter in model.named_parameters():
        if card and name in frozen - {"t5.shared.weight"} and parameter.is_floating_point():
            parameter.data = parameter.data.bfloat16()
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)  # there from the second micro-batch of a step on
    optimizer = AdamW(groups(trained, stage.constant), lr=0.0, fused=True)

    def passes(batch: Batch) -> None:
        with autocast(device, half):
            loss = model(batch, stage.mean)
        loss.backward()

    def step(batch: Batch) -> None:
        passes(batch)
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Lion(model, text), passes, step


def made_up(lion: Lion, number: int, size: int, words: tuple[int, int]) -> tuple[Any, ...]:
    """Arguments of `Lion.batch`: noise, and prompts and answers of so many tokens (an "a" is one)."""
    side, tags, tasks = lion.config.vit.image_size, ["a", "a"], STAGES[number].tasks
    question = " ".join("a" * max(1, words[0] + 1 - len(lion.training_prompt("a", tags))))
    answer = " ".join("a" * (words[1] - 1))
    kinds = [tasks[i % len(tasks)] for i in range(size)]
    return torch.randn(size, 3, side, side), [question] * size, [tags] * size, kinds, [answer] * size


def held(model: nn.Module) -> int:
    """Bytes of the parameters, and of gradients and moments."""
    parameters = list(model.parameters())
    return sum(p.nbytes for p in parameters) + STATE * sum(p.numel() for p in parameters if p.requires_grad)


def one_layer(model: LionModel, tokens: int, size: int, half: bool) -> int:
    """The peak of one encoder layer's forward and backward pass."""
    x = torch.randn(size, tokens, model.config.t5.width, requires_grad=True)
    bias, task = torch.zeros(1, model.config.t5.heads, tokens, tokens), torch.zeros(size, dtype=torch.long)

    def run() -> None:
        with autocast(CPU, half):
            y = model.t5.encoder[0](x, bias, task)
        y.backward(y.detach())

    return peak_bytes(run)


# --- the largest batch


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None,
          dropout: float = 0.0, record: object = None) -> Tensor:  # fmt: skip
    """`layers.attention` as a card computes it: the kernel keeps no scores."""
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    return rearrange(x, "b h t e -> b t (h e)")


def step_bytes(
    config: LionConfig,
    text: Vocabularies,
    size: int,
    recompute: bool,
    words: tuple[int, int],
    number: int = 3,
    int8: bool = False,
) -> int:
    """All that a stage takes on a card: weights, gradients, moments, and the peak of the two passes."""
    with FakeTensorMode() as mode:
        lion, passes, _ = training(config, text, number, half=True, card=True, int8=int8)
    real = lion.batch(*made_up(lion, number, size, words))
    with mode, ExitStack() as stack:
        for module in (bert, t5, vit):
            stack.enter_context(patch.object(module, "attention", fused))
        batch = replace(real, **{name: mode.from_tensor(x) for name, x in vars(real).items() if x is not None})
        lion.model.recompute(recompute)
        return held(lion.model) + peak_bytes(lambda: passes(batch))


def bytes_by_batch(
    config: LionConfig, text: Vocabularies, recompute: bool, words: tuple[int, int], int8: bool = False
) -> tuple[int, int]:
    """a and b of bytes = a + b * batch, from batches of 2 and 4."""
    two, four = (step_bytes(config, text, size, recompute, words, int8=int8) for size in (2, 4))
    return 2 * two - four, (four - two) // 2


# --- convert and load


WATCHED = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
"""


def process(*command: object) -> tuple[float, int]:
    """Seconds and peak memory of a script in a process of its own. Linux only.

    The process reports its own peak: what wait4 gives its parent is at least what the parent held at the fork.
    """
    start = time.perf_counter()
    line = [sys.executable, "-c", WATCHED, *map(str, command)]
    done = subprocess.run(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert not done.returncode, f"{command[0]}: {done.stderr}"
    return time.perf_counter() - start, 1024 * int(done.stderr.split()[-1])


def official_files(config: LionConfig, folder: Path) -> list[object]:
    """Write the files of a release of that size, random. Returns the command that converts them."""
    plan = skeleton(config).state_dict()
    tables = {"vit": weights.EVA, "t5": weights.T5, "ram": weights.RAM, "lion": weights.LION}
    files: dict[str, rehearse.Manifest] = {}
    for kind, table in tables.items():
        names = {weights.translate(ours, weights.inverted(table)): tensor.shape for ours, tensor in plan.items()}
        files[kind] = {name: shape for name, shape in names.items() if name is not None}
    texts = ("bert-base-uncased/vocab.txt", "flan-t5/tokenizer.json", *Vocabularies.FILES[2:])
    rehearse.write(files, [OFFICIAL / text for text in texts], folder)
    (folder / "sizes.json").write_text(config.to_json())
    return [*rehearse.conversion(folder), "--config", folder / "sizes.json"]
