"""Bytes: what a training step needs at its fullest, and the largest batch that fits into so much memory.

`peak_bytes` counts every tensor that is made while something runs, when it is made and when it goes, whatever made it:
the forward pass, a layer computed again, the backward pass. It sees storages, so views cost nothing and what existed
before (weights, gradients, moments) is not counted, and neither is what a kernel takes for itself meanwhile. The count
is exact and the same on every machine; and since it needs no numbers, only shapes, it can follow a step of the real
LION-XXL on fake tensors, which hold nothing.
"""

import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from conftest import OFFICIAL, ROOT
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import weights
from lion_mini import Lion, LionConfig
from lion_mini.data.mixture import Batch
from lion_mini.model import layers
from lion_mini.model.lion import Text
from lion_mini.training.stages import STAGES, choose, groups, part_of
from train import Gradients, mixed_precision, share_of_loss

STATE = 12  # bytes for each parameter that trains: its gradient and AdamW's two moments, all float32


class Peak(TorchDispatchMode):
    """Sees every operation; a class only because torch wants one."""

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
                weakref.finalize(storage, self.gone, storage._cdata, size)

    def gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_bytes(run: Callable[[], object]) -> int:
    with Peak() as peak:
        run()
    return peak.most


# --- a training step


def training(
    config: LionConfig, text: Text, number: int, size: int, words: tuple[int, int], half: bool, card: bool = False
) -> tuple[Lion, Batch, Callable[[], Tensor], Callable[[], None]]:
    """A stage's model and batch, its forward and backward pass, and its whole step, as train.py does them.

    `words` are the tokens of prompt and answer. On a `card` what is frozen is bfloat16, and attention keeps no scores.
    """
    stage = STAGES[number]
    model = Lion(replace(config, **stage.model), text)
    trained = choose(model, stage)
    if card:
        for name, parameter in model.named_parameters():
            if part_of(name) is None and parameter.ndim > 1 and name != "t5.shared.weight":
                parameter.data = parameter.data.bfloat16()
    optimizer = AdamW(groups(trained, stage), lr=0.0, fused=True)
    gradients = Gradients(list(trained.values()), torch.device("cpu"))
    batch = made_up(model, stage.tasks, size, *words)

    def passes() -> Tensor:
        gradients.flat.zero_()
        with mixed_precision("cpu", half):
            loss = share_of_loss(model, batch, stage.mean, size * words[1])
        loss.backward()
        return loss.detach()

    def step() -> None:
        passes()
        gradients.clip(1.0)
        optimizer.step()

    return model, batch, passes, step


def made_up(model: Lion, tasks: tuple[str, ...], size: int, prompt: int, answer: int) -> Batch:
    """Noise, and texts of so many tokens: every "a" is one."""
    config, tags = model.config, ["a", "a"]
    question = " ".join("a" * max(1, prompt + 1 - len(model.training_prompt("a", tags))))
    side = config.vit.image_size
    said = " ".join("a" * (answer - 1))
    kinds = [tasks[i % len(tasks)] for i in range(size)]
    pixels = torch.randn(size, 3, side, side)
    return Batch(pixels, [question] * size, [said] * size, [tags] * size, kinds, ["made up"] * size, [])


def held(model: nn.Module) -> tuple[int, int]:
    """Bytes of the parameters, and of what AdamW holds beside those that train."""
    parameters = list(model.parameters())
    return sum(p.nbytes for p in parameters), STATE * sum(p.numel() for p in parameters if p.requires_grad)


def one_layer(model: Lion, tokens: int, size: int, half: bool) -> int:
    """The peak of one encoder layer's forward and backward pass."""
    x = torch.randn(size, tokens, model.config.t5.width, requires_grad=True)
    bias = torch.zeros(1, model.config.t5.heads, tokens, tokens)
    task = torch.zeros(size, dtype=torch.long)

    def run() -> None:
        with mixed_precision("cpu", half):
            y = model.t5.encoder[0](x, bias, task)
        y.backward(y.detach())

    return peak_bytes(run)


# --- the largest batch


def step_bytes(config: LionConfig, text: Text, size: int, recompute: bool, words: tuple[int, int]) -> int:
    """All that a step of stage 3 takes on a card: weights, trained state, and the peak of its two passes."""
    distinct = lambda pixels, **_: (pixels, torch.arange(len(pixels)))  # tensors that hold nothing cannot say
    fused = lambda q, k, v, mask, scale, dropout: scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
    kernels = patch.object(layers, "plain_attention", fused)  # the CPU's way for bfloat16; a card's keeps no scores
    with FakeTensorMode(), patch.object(Tensor, "unique", distinct), kernels:
        model, _, passes, _ = training(config, text, 3, size, words, half=True, card=True)
        model.recompute(recompute)
        return sum(held(model)) + peak_bytes(passes)


def line(config: LionConfig, text: Text, recompute: bool, words: tuple[int, int]) -> tuple[int, int]:
    """a and b of bytes = a + b * batch, from batches of 2 and 4."""
    two, four = (step_bytes(config, text, size, recompute, words) for size in (2, 4))
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


def process(script: str | Path, *arguments: str | Path) -> tuple[float, int]:
    """Seconds and peak memory of a script in a process of its own (Linux).

    The process is asked itself: what the system tells its parent is at least what the parent held when it forked.
    """
    start = time.perf_counter()
    command = [sys.executable, "-c", WATCHED, str(script), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert not done.returncode, f"{script}: {done.stderr}"
    return time.perf_counter() - start, 1024 * int(done.stderr.split()[-1])


def official_files(config: LionConfig, folder: Path) -> list[str | Path]:
    """The files of a release of that size, random, and the command that converts them."""
    plan = Lion.plan(config).state_dict()
    (folder / "t5").mkdir()
    (folder / "config.json").write_text(config.to_json())
    shutil.copy(OFFICIAL / "flan-t5" / "tokenizer.json", folder / "t5")
    command: list[str | Path] = [
        "weights.py", "convert", "--config", folder / "config.json", "--t5", folder / "t5",
        "--bert", OFFICIAL / "bert-base-uncased", "--ram-tags", OFFICIAL / "ram_tag_list.txt",
        "--ram-thresholds", OFFICIAL / "ram_tag_list_threshold.txt",
    ]  # fmt: skip
    for kind, table in (("vit", weights.EVA), ("t5", weights.T5), ("ram", weights.RAM), ("lion", weights.LION)):
        names = {weights.translate(ours, weights.inverted(table)): tensor.shape for ours, tensor in plan.items()}
        tensors = {name: 0.02 * torch.randn(shape) for name, shape in names.items() if name is not None}
        if kind == "t5":
            save_file(tensors, folder / "t5" / "model.safetensors")
        else:
            halves = {name: tensor.half() for name, tensor in tensors.items()}
            torch.save(halves if kind == "vit" else {"model": tensors}, folder / f"{kind}.pth")
            command += [f"--{kind}", folder / f"{kind}.pth"]
    return command
