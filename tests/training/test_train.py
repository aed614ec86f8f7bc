"""The training: what moves and what does not, the release's loss, and runs that nothing can make come out otherwise."""

import errno
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT, randomise, relative
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import AdamW
from tqdm import tqdm

import train
import weights
from lion_mini import Lion, LionConfig, files, toy
from lion_mini.config import (
    PRESETS,
    AggregatorConfig,
    QFormerConfig,
    RamConfig,
    T5Config,
    TagHeadConfig,
    VitConfig,
)
from lion_mini.data import mixture
from lion_mini.data.mixture import Samples
from lion_mini.data.records import CATEGORIES
from lion_mini.distributed import distributed
from lion_mini.images import lion_transform, open_image
from lion_mini.model.aggregator import Aggregator
from lion_mini.model.generate import GENERATION
from lion_mini.model.lion import Batch, LionModel
from lion_mini.model.qformer import QFormer
from lion_mini.quantize import Int8Linear, to_int8
from lion_mini.training.checkpoint import history
from lion_mini.training.report import log_step, right
from lion_mini.training.stages import PARTS, STAGES, TOY, Stage, changed, groups, part_of, schedule, unfreeze
from lion_mini.training.start import begin, merge

SIZES = LionConfig(
    vit=VitConfig(image_size=16, patch_size=8, width=16, depth=3, heads=2, mlp_width=24),
    taps=(2, 1, 0),
    qformer=QFormerConfig(width=16, depth=2, heads=2, mlp_width=24, queries=3, vocab_size=512, max_positions=64),
    aggregator=AggregatorConfig(heads=2, mlp_width=24),
    t5=T5Config(width=12, head_width=5, heads=2, mlp_width=20, encoder_depth=1, decoder_depth=1, vocab_size=512),
    adapter_width=4,
    ram=RamConfig(
        image_size=16, patch_size=4, width=8, depths=(2,), heads=(2,), window=4, tag_width=8, tags=len(toy.TAGS),
        head=TagHeadConfig(width=8, depth=1, heads=2, mlp_width=12),
    ),
)  # fmt: skip


SINGLE = replace(STAGES[3], new=tuple(PARTS))  # all parts at once, from none


@pytest.fixture(scope="session")
def stage0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The frozen parts of a very small LION, with random weights, as stage 0 leaves them."""
    folder = tmp_path_factory.mktemp("start") / "stage0"
    toy.write_vocabularies(folder)
    model = LionModel(SIZES)
    randomise(model, seed=1)
    frozen = {name: tensor for name, tensor in model.state_dict().items() if part_of(name) is None}
    save_file(frozen, folder / "frozen.safetensors")
    (folder / "config.json").write_text(SIZES.to_json())
    return folder


@pytest.fixture
def package(stage0: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package has these weights, and a Q-Former of stage 0."""
    qformer = QFormer(SIZES.qformer, SIZES.vit.width, SIZES.t5.width)
    file = tmp_path / "qformer.safetensors"
    save_file({f"qformer.{name}": tensor for name, tensor in qformer.state_dict().items()}, file)
    monkeypatch.setattr("lion_mini.toy.training.TINY", stage0)
    monkeypatch.setattr("lion_mini.toy.training.QFORMER", file)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with image.json, region.jsonl and their pictures: 24 records each, some without tags."""
    folder = tmp_path_factory.mktemp("data")
    for i in range(6):
        Image.frombytes("RGB", (20, 20), random.Random(i).randbytes(1200)).save(folder / f"{i}.png")
    image = [
        {"image": f"{i % 6}.png", "question": f"How many circles are there? {i}", "answer": "red " * (i % 4 + 1)}
        | ({"tags": "red, circle"} if i % 3 else {})
        for i in range(24)
    ]
    region = [
        {"image": f"{i % 6}.png", "question": f"Find the red circle {i}.", "category": "region_level",
         "answer": f"[0.000,0.042,0.{i + 100},0.333]", "tags": ["red"]}
        for i in range(24)
    ]  # fmt: skip
    (folder / "image.json").write_text(json.dumps(image))
    (folder / "region.jsonl").write_text("\n".join(map(json.dumps, region)))
    return folder


def command(number: int, init: Path | Sequence[Path], data: Path, out: Path, *more: object) -> list[str]:
    """Stage 3 begins with two results; with one folder it is a single stage, which makes everything new."""
    files = {1: ["image.json"], 2: ["region.jsonl"]}.get(number, ["image.json", "region.jsonl"])
    folders = [init] if isinstance(init, Path) else init
    words = ["--stage", number, "--init", *folders, "--data", *(data / name for name in files), "--images", data]
    words += ["--out", out, "--steps", 8, "--batch", 4, "--lr", 0.01, "--save-every", 2, "--no-bf16", "--device", "cpu"]
    return [str(word) for word in (*words, *["--single-stage"] * (number == 3 and len(folders) == 1), *more)]


def trained(out: Path) -> dict[str, Tensor]:
    return load_file(out / "trained.safetensors")


def same(one: Path, two: Path) -> None:
    a, b = trained(one), trained(two)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def logged(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# --- other processes, which can be killed


def child(argv: list[str], log: Path, env: Mapping[str, str], die_at: int | None) -> None:
    """train.py in a process of its own; with `die_at` it is killed while it writes its so-manieth checkpoint."""
    os.environ.update(env)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    honest = LionModel.forward
    LionModel.forward = lambda *args: (time.sleep(0.03), honest(*args))[1]  # type: ignore
    if die_at is not None:
        synced: list[Path] = []

        def sync(path: Path) -> None:
            synced.extend([path] * path.name.startswith(".step-"))
            if len(synced) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

        files.sync = sync
    sys.exit(train.main(argv))


def launch(argv: list[str], log: Path, processes: int = 1, die_at: int | None = None) -> list[ForkServerProcess]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "train"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(processes):
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes), "RANK": str(rank)}
        process = context.Process(target=child, args=(argv, log, env if processes > 1 else {}, die_at))
        process.start()
        started.append(process)
    return started


def finish(started: list[ForkServerProcess]) -> list[int | None]:
    for process in started:
        process.join(timeout=90)
    return [process.exitcode for process in started]


def wait_for_step(out: Path, step: int) -> None:
    deadline = time.monotonic() + 90
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_bytes().split(b"\n")) <= step:
        assert time.monotonic() < deadline, "the run does not get there"
        time.sleep(0.002)


# --- what trains

EXPECTED = {
    1: ("qformer.", "t5.encoder.0.ff.adapters.adapters.0.", "t5.decoder.0.ff.adapters.adapters.0."),
    2: ("aggregator.", "t5.encoder.0.ff.adapters.adapters.0.", "t5.decoder.0.ff.adapters.adapters.0."),
    3: ("qformer.", "aggregator.", "t5.encoder.0.ff.adapters.", "t5.decoder.0.ff.adapters.", "soft_prompt"),
}
# The last layer's text goes nowhere: only what became of the queries is read.
UNREAD = "qformer.layers.1.ff."


@pytest.mark.parametrize(("rank", "world"), [("x", "1"), ("5", "2"), ("0", "-1")])
def test_ranks_that_torchrun_never_sets(rank: str, world: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError, match=f"RANK is '{rank}' and WORLD_SIZE '{world}': unset them"):
        distributed("cpu")


@pytest.mark.parametrize("number", EXPECTED)
def test_one_step_changes_what_the_stage_trains_and_nothing_else(stage0: Path, data: Path, number: int) -> None:
    stage = replace(STAGES[number], constant={"aggregator": 0.003}) if number == 2 else STAGES[number]
    lion, _ = begin(replace(stage, new=tuple(PARTS)), [stage0], seed=0)
    model = lion.model
    randomise(model, seed=2)
    learning = unfreeze(model, stage)
    assert set(learning) == {name for name, _ in model.named_parameters() if name.startswith(EXPECTED[number])}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = AdamW(groups(learning, stage.constant), lr=0.01)
    graphs: list[bool] = []
    model.vit.register_forward_hook(lambda module, args, out: graphs.append(out[0].requires_grad))
    model(some_batch(lion, stage.tasks)).backward()
    assert graphs == [False]  # no gradient goes through the frozen ViT
    for name, parameter in learning.items():
        assert parameter.grad is not None
        assert name.startswith(UNREAD) or parameter.grad.any(), name
    optimizer.step()
    for name, tensor in model.state_dict().items():
        if not name.startswith(UNREAD):
            assert torch.equal(tensor, before[name]) == (name not in learning), name


def some_batch(lion: Lion, tasks: tuple[str, ...]) -> Batch:
    generator = torch.Generator().manual_seed(0)
    rows = [tasks[i % len(tasks)] for i in range(4)]
    pixels = torch.randn(4, 3, 16, 16, generator=generator)
    questions = [f"Is there a red circle in the image {i}?" for i in range(4)]
    return lion.batch(pixels, questions, [["red"]] * 4, rows, ["yes", "a red circle", "no", "[0.042,0.125]"])


def test_stage_3_trains_what_the_release_trains(facts: dict[str, Any], golden_folder: Path) -> None:
    learning = unfreeze(Lion.from_pretrained(golden_folder).model, STAGES[3])
    assert set(learning) == {weights.translate(name, weights.LION) for name in facts["trainable"]}


@pytest.mark.parametrize("number", STAGES)
def test_groups_partition_what_trains(golden_folder: Path, number: int) -> None:
    stage = STAGES[number]
    learning = unfreeze(Lion.from_pretrained(golden_folder).model, stage)
    found = groups(learning, stage.constant)
    names = [name for group in found for name in group["names"]]
    assert len(names) == len(set(names)) == len(learning)
    assert {id(p) for group in found for p in group["params"]} == {id(p) for p in learning.values()}
    for group in found:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert learning[name] is parameter
            vector = parameter.ndim < 2 or ".gates." in name
            assert group["weight_decay"] == (0.0 if vector else 0.05), name
            aggregator = number == 2 and name.startswith("aggregator.blocks.")
            assert group["constant"] == (1e-5 if aggregator else None), name


def test_the_papers_table() -> None:
    rows = {n: (s.batch, s.steps, s.lr, s.floor, dict(s.constant), s.warmup, s.mean) for n, s in STAGES.items()}
    assert rows[1] == (64, 30_000, 1e-5, 0.0, {}, 1000, "tokens")
    assert rows[2] == (256, 60_000, 5e-4, 1e-6, {"aggregator": 1e-5}, 1000, "tokens")
    assert rows[3] == (64, 60_000, 1e-5, 0.0, {}, 1000, "tokens")
    assert rows[4] == rows[3]
    alone = {"adapters": 1, "tags": "none"}
    assert STAGES[1].model == {"visual_input": "image", **alone}
    assert STAGES[2].model == {"visual_input": "region", **alone}
    assert STAGES[3].model == {"visual_input": "all", "adapters": 2, "tags": "soft"}


def test_frozen_parts_stay_in_eval_mode(stage0: Path) -> None:
    model = begin(SINGLE, [stage0], seed=0)[0].model
    unfreeze(model, STAGES[3])
    model.eval()
    model.train()
    assert model.ram is not None
    assert model.aggregator is not None
    assert model.qformer is not None
    layer: Any = model.t5.encoder[0]
    for frozen in (model.vit, model.ram, model.t5.shared, layer.attn, model.t5.lm_head):
        assert not any(module.training for module in frozen.modules())
    assert all(m.training for m in (model.qformer, model.qformer.layers[0], model.aggregator.blocks[0]))
    unfreeze(model, STAGES[2])
    assert not any(module.training for module in model.qformer.modules())


# --- the loss and the schedule


def golden_batch(
    lion: Lion, facts: dict[str, Any], numbers: dict[str, Tensor], i: int, rows: slice = slice(None)
) -> Batch:
    sample = facts["samples"][i]
    task = "region" if sample["category"] == "region_level" else "image"
    tags, questions, answers = (sample[name][rows] for name in ("tags", "question", "answer"))
    return lion.batch(numbers[f"s{i}.image"][rows], questions, tags, [task] * len(tags), answers)


@pytest.mark.parametrize("i", [0, 1])
@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_are_the_releases(
    golden_model: Lion, facts: dict[str, Any], numbers: dict[str, Tensor], i: int, recompute: bool
) -> None:
    batch = golden_batch(golden_model, facts, numbers, i)
    learning = unfreeze(golden_model.model, STAGES[3])
    golden_model.model.eval()
    golden_model.model.recompute(recompute)
    assert (numbers[f"s{i}.labels"] != 0).sum().item() == batch.answer_tokens()
    loss = golden_model.model(batch)
    assert relative(loss, numbers[f"s{i}.loss"].reshape(())) < 1e-4
    loss.backward()
    compared = 0
    for name in facts["trainable"]:
        expected = numbers.get(f"s{i}.grad.{name}")
        if expected is not None:
            found = learning[weights.translate(name, weights.LION) or ""].grad
            assert found is not None
            # In the norm: entry by entry, the release's own float32 is up to 1.1e-3 from what double precision gives.
            apart = (found - expected).norm() / expected.norm().clamp_min(1e-9)
            assert apart < 1e-3 or (found - expected).abs().max() < 1e-6, name
            compared += 1
    assert compared == sum(name.startswith(f"s{i}.grad.") for name in numbers) > 10


def test_recompute_runs_each_layer_again(golden_model: Lion, facts: dict[str, Any], numbers: dict[str, Tensor]) -> None:
    """In every part through which gradients pass, with the same dropout as the first time."""
    model: Any = golden_model.model
    learning = unfreeze(model, STAGES[3])
    runs: list[int] = []
    fuse = model.aggregator
    layers = [model.t5.encoder[1], model.t5.decoder[1], model.qformer.layers[1], fuse.blocks[1], fuse.proj]
    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, i=i: runs.append(i))
    found = []
    for recompute in (False, True):
        model.recompute(recompute)
        model.zero_grad()
        torch.manual_seed(0)
        model(golden_batch(golden_model, facts, numbers, 0)).backward()
        found.append({name: one.grad.clone() for name, one in learning.items() if one.grad is not None})
    assert sorted(runs) == sorted(3 * [*range(len(layers))])  # once, and once, and again
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("mean", ["tokens", "samples"])
def test_micro_batches_add_up_to_the_batch(
    golden_model: Lion, facts: dict[str, Any], numbers: dict[str, Tensor], mean: str
) -> None:
    """In double precision, and with answers of different lengths."""
    learning = unfreeze(golden_model.model.double(), STAGES[3])
    golden_model.model.eval()
    found, losses = [], []
    rows = (slice(None),), (slice(0, 1), slice(1, 2))
    for cuts in rows:
        golden_model.model.zero_grad()
        parts = [golden_batch(golden_model, facts, numbers, 0, cut) for cut in cuts]
        tokens = [part.answer_tokens() for part in parts]
        assert len(set(tokens)) == len(tokens)
        total = 0.0
        for part, count in zip(parts, tokens, strict=True):
            share = golden_model.model(part, mean) * (count / sum(tokens) if mean == "tokens" else 1 / len(parts))
            share.backward()
            total += share.item()
        losses.append(total)
        found.append({name: p.grad for name, p in learning.items() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert gradient is not None
        assert relative(found[1][name], gradient) < 1e-4 or gradient.abs().max() < 1e-9, name
    if mean == "samples":
        each = [golden_model.model(golden_batch(golden_model, facts, numbers, 0, row)).item() for row in rows[1]]
        assert losses[0] == pytest.approx(sum(each) / 2, rel=1e-5)


def test_schedule() -> None:
    assert schedule(0, 30_000, 1e-5, 0.0, 1000) == 1e-8
    assert schedule(500, 30_000, 1e-5, 0.0, 1000) == pytest.approx((1e-8 + 1e-5) / 2)
    assert schedule(1000, 30_000, 1e-5, 0.0, 1000) == 1e-5
    assert schedule(15_500, 30_000, 1e-5, 0.0, 1000) == pytest.approx(5e-6)
    assert schedule(30_000, 30_000, 1e-5, 0.0, 1000) == pytest.approx(0, abs=1e-20)
    assert 0 < schedule(29_999, 30_000, 1e-5, 0.0, 1000) < 1e-13
    assert schedule(60_000, 60_000, 5e-4, 1e-6, 1000) == pytest.approx(1e-6)
    assert schedule(99_999, 60_000, 5e-4, 1e-6, 1000) == pytest.approx(1e-6)
    rates = [schedule(step, 400, 1.0, 0.1, 40) for step in range(401)]
    assert rates[:41] == sorted(rates[:41])
    assert rates[40:] == sorted(rates[40:], reverse=True)
    assert max(rates) == rates[40] == 1.0
    assert schedule(10, 100, 1.0, 0.0, 1000) == 1.0  # a short run: a tenth is warm-up
    assert schedule(0, 1, 1.0, 0.0, 1000) == 1.0
    assert schedule(5, 100, 1.0, 0.0, 0) < 1.0


def test_new_parts() -> None:
    """The aggregator begins as LayerNorm of its first tap, the Q-Former with queries that differ. Both drop out."""
    sizes = PRESETS["tiny"]
    taps = torch.randn(3, 2, 37, sizes.vit.width)
    aggregator = Aggregator(sizes.aggregator, sizes.vit.width, 3, 8).eval()
    assert relative(aggregator.fuse(taps.unbind()), F.layer_norm(taps[0], taps.shape[-1:])) < 1e-5
    former = QFormer(sizes.qformer, sizes.vit.width, 8)
    assert former.queries.std().item() == pytest.approx(sizes.qformer.init_std, rel=0.3)
    rates = list[float]()
    drop, attend = F.dropout, F.scaled_dot_product_attention

    def dropped(x: Tensor, rate: float, training: bool) -> Tensor:
        rates.append(rate * training)
        return drop(x, rate, training)

    def attended(*args: Any, **rest: Any) -> Tensor:
        rates.append(rest["dropout_p"])
        return attend(*args, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "dropout", dropped)
        patch.setattr(F, "scaled_dot_product_attention", attended)
        for training in (True, False):
            former.train(training)(taps[0], torch.ones(2, 4, dtype=torch.long))
    looks = sum(layer.cross_attn is not None for layer in former.layers)
    sites = 1 + 4 * len(former.layers) + 2 * looks  # embeddings; two per attention, one per feed-forward layer
    assert rates == [sizes.qformer.dropout] * sites + [0.0] * sites


def test_the_single_stage() -> None:
    """It keeps the Q-Former that it begins with, and has the steps of all three."""
    args = train.parse(["--stage", "3", "--single-stage"])
    assert set(PARTS).difference(changed(3, args).new) == {"qformer"}
    assert changed(3, args).steps == sum(TOY[i].steps for i in (1, 2, 3))


def test_rates_reach_their_groups(stage0: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, norms = [], list[float]()
    step = AdamW.step

    def watched(self: AdamW) -> None:
        seen.append([(group["constant"], group["lr"]) for group in self.param_groups])
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())
        step(self)

    monkeypatch.setattr(AdamW, "step", watched)
    assert train.main(command(2, stage0, data, tmp_path / "out", "--clip", 0.01)) == 0
    assert max(norms) == pytest.approx(0.01, rel=1e-3)
    saved = torch.load(tmp_path / "out" / "checkpoints" / "step-00000008.pt", weights_only=True)["optimizer"]
    assert {group["betas"] for group in saved["param_groups"]} == {(0.9, 0.999)}
    assert {group["weight_decay"] for group in saved["param_groups"]} == {0.0, 0.05}
    for i, groups_ in enumerate(seen):
        assert {lr for constant, lr in groups_ if constant} == {1e-5}
        assert {lr for constant, lr in groups_ if not constant} == {schedule(i, 8, 0.01, 1e-6, 1000)}


# --- stage 3 begins with stages 1 and 2


@pytest.fixture(scope="session")
def two_stages(stage0: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("stages")
    for number in (1, 2):
        assert train.main(command(number, stage0, data, folder / str(number), "--keep", 1)) == 0
    return folder / "1", folder / "2"


def test_stage_3_begins_as_the_two_ended(two_stages: tuple[Path, Path]) -> None:
    lion, origin = begin(STAGES[3], two_stages, seed=0)
    model = lion.model
    one, two, tensors = trained(two_stages[0]), trained(two_stages[1]), model.state_dict()
    assert {part: where for part, where in origin.items() if where == "new"} == {"router": "new", "soft prompt": "new"}
    assert all(tensor.any() for name, tensor in (one | two).items() if name.endswith("up.weight"))  # adapters learn
    for name, tensor in one.items():
        assert torch.equal(tensors[name.replace(".adapters.adapters.0.", ".adapters.adapters.1.")], tensor)
    for name, tensor in two.items():
        assert torch.equal(tensors[name], tensor)
    layers: list[Any] = [model.t5.encoder[0], model.t5.decoder[0]]
    for layer in layers:
        mixture = layer.ff.adapters
        x = torch.randn(2, 3, SIZES.t5.width)
        for task, adapter in ((0, 0), (1, 1)):
            assert torch.equal(mixture(x, torch.tensor([task, task])), mixture.adapters[adapter](x))


def test_stage_3_takes_one_folder_per_task_in_any_order(two_stages: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = begin(STAGES[3], two_stages, seed=0)[0].model.state_dict()
    swapped = begin(STAGES[3], two_stages[::-1], seed=0)[0].model.state_dict()
    assert all(torch.equal(tensor, swapped[name]) for name, tensor in tensors.items())
    whole = shutil.copytree(two_stages[0], tmp_path / "whole")
    (whole / "config.json").write_text(replace(SIZES, stage=3).to_json())
    bare = shutil.copytree(two_stages[0], tmp_path / "bare")
    (bare / "config.json").write_text(replace(SIZES, stage=1, adapters=0, visual_input="image", tags="none").to_json())
    one, two = two_stages
    for wrong in ([one, whole], [one, one], [bare, two], [one], [two]):
        with pytest.raises(
            ValueError, match=r"image and region level cannot begin with .*stage [123]\): give a whole LION"
        ):
            begin(STAGES[3], wrong, seed=0)


def test_no_stage_begins_with_nan(two_stages: tuple[Path, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(two_stages[0], tmp_path / "folder")
    frozen = load_file(folder / "frozen.safetensors")
    save_file(frozen | {"vit.positions": frozen["vit.positions"] * math.nan}, folder / "frozen.safetensors")
    with pytest.raises(ValueError, match=r"folder: vit.positions holds NaN or infinite values"):
        begin(STAGES[1], [folder], seed=0)
    save_file(
        {name: tensor for name, tensor in frozen.items() if name != "vit.positions"}, folder / "frozen.safetensors"
    )
    with pytest.raises(ValueError, match=r"folder: vit.positions is missing here"):
        begin(STAGES[1], [folder], seed=0)


def test_a_third_task(
    stage0: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It needs its name in the config and its recipe: an adapter, a row of the router and data follow."""
    start = shutil.copytree(stage0, tmp_path / "start")
    (start / "config.json").write_text(replace(SIZES, tasks=("region", "image", "count"), adapters=3).to_json())
    monkeypatch.setitem(CATEGORIES, "count_level", "count")  # as a third name in LionConfig.tasks does
    monkeypatch.setitem(STAGES, 5, Stage(("adapters",), ("count",), 64, 8, 1e-3, model=STAGES[1].model))
    joint = replace(STAGES[3], tasks=("image", "region", "count"), model=dict(STAGES[3].model) | {"adapters": 3})
    monkeypatch.setitem(STAGES, 3, joint)
    records = json.loads((data / "image.json").read_text())
    (data / "count.json").write_text(json.dumps([record | {"category": "count_level"} for record in records]))
    for number, name in ((1, "image.json"), (2, "region.jsonl"), (5, "count.json")):
        argv = command(number, tmp_path / "1" if number == 5 else start, data, tmp_path / str(number))
        i, j = argv.index("--data"), argv.index("--images")
        assert train.main([*argv[: i + 1], str(data / name), *argv[j:]]) == 0, capsys.readouterr().err
    argv = command(3, [tmp_path / name for name in "125"], data, tmp_path / "3")
    argv.insert(argv.index("--images"), str(data / "count.json"))
    assert train.main(argv) == 0, capsys.readouterr().err
    lion = Lion.from_pretrained(tmp_path / "3")
    tensors = trained(tmp_path / "3")
    assert tensors["t5.encoder.0.ff.adapters.gates.2"].shape == (3, SIZES.t5.width)
    assert lion.generate(torch.randn(1, 3, 16, 16), ["how many?"], [["red"]], ["count"])
    assert weights.main(["export", str(tmp_path / "3"), "--out", str(tmp_path / "LION.pth")]) == 2
    assert "gates.2" in capsys.readouterr().err


def test_no_copy_outlives_its_use() -> None:
    with train.autocast(torch.device("cpu"), True):
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_cache_enabled()


def test_without_router_the_adapters_are_added(two_stages: tuple[Path, Path]) -> None:
    parts = [trained(folder) for folder in two_stages]
    generator = torch.Generator().manual_seed(3)
    parts = [{n: torch.randn(t.shape, generator=generator) for n, t in part.items()} for part in parts]
    added = merge(parts, replace(SIZES, adapters=1))
    stem = "t5.encoder.0.ff.adapters.adapters.0."
    x = torch.randn(5, SIZES.t5.width, generator=generator)

    def adapter(file: Mapping[str, Tensor]) -> Tensor:
        hidden = (x @ file[stem + "down.weight"].T + file[stem + "down.bias"]).relu()
        return (hidden @ file[stem + "up.weight"].T + file[stem + "up.bias"]) * file[stem + "scale"]

    assert relative(adapter(added), adapter(parts[0]) + adapter(parts[1])) < 1e-5


def test_stages_of_different_frozen_parts_do_not_merge(two_stages: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in two_stages[1].glob("*.*"):
        (other / path.name).write_bytes(path.read_bytes())
    frozen = load_file(other / "frozen.safetensors")
    save_file(frozen | {"t5.shared.weight": frozen["t5.shared.weight"] + 1}, other / "frozen.safetensors")
    with pytest.raises(ValueError, match=r"differ in t5\.shared\.weight"):
        begin(STAGES[3], [two_stages[0], other], seed=0)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {"visual_input": "all", "adapters": 2, "tags": "soft"}),
        (["--tags", "plain"], {"tags": "plain"}),
        (["--tags", "none"], {"tags": "none"}),
        (["--no-router"], {"adapters": 1, "adapter_width": 8}),
        (["--no-aggregator"], {"visual_input": "all", "adapters": 2, "taps": (2,)}),
        (["--single-stage"], {"visual_input": "all", "adapters": 2, "tags": "soft"}),
    ],
)
@pytest.mark.usefixtures("package")
def test_the_toy_run_and_its_ablations(tmp_path: Path, flags: list[str], expected: dict[str, Any]) -> None:
    """`python train.py` with fewer steps: through all stages to a folder that opens, and exports where it is a LION."""
    argv = ["--steps", "2", "--batch", "4", "--device", "cpu", "--out", str(tmp_path / "run"), *flags]
    assert train.main(argv) == 0
    model = Lion.from_pretrained(tmp_path / "run" / "stage3")
    assert {name: getattr(model.config, name) for name in expected} == expected
    assert model.config.made_by.count("(seed 0, ") == (1 if "--single-stage" in flags else 3)
    for name in ("loss.png", "samples.png"):
        assert Image.open(tmp_path / "run" / "stage3" / name).size[0] >= 800
    assert (tmp_path / "run" / "stage3" / "frozen.safetensors").stat().st_nlink > 1  # shared, not copied
    assert weights.main(["export", str(tmp_path / "run" / "stage3"), "--out", str(tmp_path / "LION.pth")]) == 0
    exported = torch.load(tmp_path / "LION.pth", weights_only=True)["model"]
    assert len(exported) == len(trained(tmp_path / "run" / "stage3")) + 1
    assert train.main(argv) == 2  # a folder is not trained over
    assert train.main([*argv, "--resume"]) == 0  # there is nothing left to do


def test_without_the_aggregators_blocks(
    stage0: Path, data: Path, two_stages: tuple[Path, Path], tmp_path: Path
) -> None:
    """Figure 6: the last tap goes through norm and MLP to FlanT5. Stage 3 goes on like that."""
    two, three = tmp_path / "2", tmp_path / "3"
    assert train.main(command(2, stage0, data, two, "--no-aggregator")) == 0
    assert {part_of(name) for name in trained(two)} == {"projector", "adapters"}
    lion = Lion.from_pretrained(two)
    model: Any = lion.model
    pixels = torch.randn(1, 3, 16, 16)
    visual = lion.encode_image(pixels, ["where?"])
    assert torch.equal(visual, model.aggregator.proj(model.aggregator.norm(model.vit(pixels, (2,))[1][0])))
    assert train.main(command(3, [two_stages[0], two], data, three)) == 0
    assert Lion.from_pretrained(three).config.taps == (2,)
    assert {part_of(name) for name in trained(three)} == {*PARTS} - {"aggregator"}


@pytest.mark.usefixtures("package")
def test_instructblip(stage0: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Table 4 begins with stage 1 without adapters. Its tensors have their place in BLIP-2's files."""
    toy = ["--steps", "2", "--batch", "4", "--device", "cpu", "--no-adapters", "--out", str(tmp_path / "run")]
    assert train.main(toy) == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"stage0", "stage1"}
    out = tmp_path / "out"
    assert train.main(command(1, stage0, data, out, "--no-adapters")) == 0
    assert {part_of(name) for name in trained(out)} == {"qformer"}
    lion = Lion.from_pretrained(out)
    assert lion.config.adapters == 0
    assert lion.respond([Image.new("RGB", (9, 9))], ["what?"], ["image"], GENERATION["answer"])[0].score < 0
    assert weights.main(["inspect", str(out)]) == 0
    assert weights.main(["export", str(out), "--out", str(tmp_path / "LION.pth")]) == 0
    exported = torch.load(tmp_path / "LION.pth", weights_only=True)["model"]
    assert len(exported) == len(trained(out)) + 1
    assert all(weights.translate(name, weights.BLIP2) for name in exported)
    assert train.main(command(1, out, data, tmp_path / "again")) == 0  # with adapters, which are new
    assert "adapters     trains            226   new" in capsys.readouterr().err


def test_who_made_it(tmp_path: Path) -> None:
    for name, made_by in (("one", "stage 0: a\nstage 1: b"), ("two", "stage 0: a\nstage 2: c")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(replace(SIZES, made_by=made_by).to_json())
    both = [tmp_path / "one", tmp_path / "two"]
    assert history(both, False, "stage 3: d") == "stage 0: a\nstage 1: b\nstage 2: c\nstage 3: d"
    assert history(both[:1], True, "stage 1: e") == "stage 0: a\nstage 1: e"  # its own stage 1 is trained anew


def test_fine_tuning_begins_with_everything(two_stages: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    assert train.main(command(3, two_stages, data, tmp_path / "3")) == 0
    _, origin = begin(STAGES[4], [tmp_path / "3"], seed=0)
    assert set(origin) == {"vit", "t5", "ram", *PARTS}
    assert "new" not in origin.values()
    (tmp_path / "3" / "ram_tag_list_threshold.txt").write_text("0.0\n" * len(toy.TAGS))  # any tag
    more = "--ratios", 1, 2, "--held-out", data / "image.json"
    assert train.main(command(4, tmp_path / "3", data, tmp_path / "4", *more)) == 0
    lion = Lion.from_pretrained(tmp_path / "4")
    assert lion.config.made_by.count("\n") == 3
    assert logged(tmp_path / "4")[-1]["step"] == 8

    # Held-out records without tags are tagged by RAM.
    records = json.loads((data / "image.json").read_text())
    images = [open_image(data / record["image"]) for record in records]
    pixels = torch.stack([lion_transform(image, 16) for image in images])
    questions, answers = ([record[name] for record in records] for name in ("question", "answer"))
    tags = [record.get("tags", found) for record, found in zip(records, lion.tag(images), strict=True)]
    loss = lion(pixels, questions, answers, tags, ["image"] * 24).item()
    assert logged(tmp_path / "4")[-1]["held_out_loss"] == pytest.approx(loss, rel=1e-5)


# --- held-out records


def test_held_out_records_are_measured(
    stage0: Path, data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss and score of the result are those of the last line; the records of another level are left out."""
    out, files = tmp_path / "run", [data / "image.json", data / "region.jsonl"]
    flags = "--draw-every", 3, "--images", stage0, data, "--held-out", *files  # pictures may lie below several folders
    assert train.main(command(1, stage0, data, out, *flags)) == 0
    assert f"samples.png is without 24 of 48 records: {files[1]}, record 1" in capsys.readouterr().err
    assert [line["step"] for line in logged(out) if "held_out_loss" in line] == [3, 6, 8]
    lion, records = Lion.from_pretrained(out), json.loads(files[0].read_text())
    pixels = torch.stack([lion_transform(open_image(data / record["image"]), 16) for record in records])
    questions, answers = ([record[name] for record in records] for name in ("question", "answer"))
    rest = [[""]] * 24, ["image"] * 24
    assert logged(out)[-1]["held_out_loss"] == pytest.approx(lion(pixels, questions, answers, *rest).item(), rel=1e-5)
    said = lion.generate(pixels, questions, *rest, GENERATION["locate"])
    scores = [str(text) == answer.strip() for text, answer in zip(said, answers, strict=True) if len(answer) < 16]
    assert len(scores) == 18
    assert logged(out)[-1]["held_out_score"] == sum(scores) / 18
    orange = (232, 89, 12)
    assert orange in [colour for _, colour in Image.open(out / "loss.png").getcolors() or []]
    assert orange not in [colour for _, colour in Image.open(whole / "loss.png").getcolors() or []]
    assert "held_out_loss" not in logged(whole)[-1]  # six of its training records are drawn, but not measured
    assert train.main(command(2, stage0, data, tmp_path / "no", "--held-out", files[0])) == 2
    assert f"24 records in a row cannot be used: {files[0]}, record 24: it is image-level" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "true", "expected"),
    [
        ("Two cats.", "2 cats", [True]),
        ("dog", "the dog", [True]),
        ("dog", "cat", [False]),
        ("", "yes", [False]),
        ("a dog runs home", "a dog runs home fast", []),
        ("[0.000,0.000,0.500,0.500]", "Answer: [0.000,0.000,1.000,0.500]", [True]),
        ("[0.000,0.000,0.500,0.490]", "[0.000,0.000,1.000,0.500]", [False]),
        ("no box", "[0.000,0.000,1.000,0.500]", [False]),
    ],
)
def test_right_answers(answer: str, true: str, expected: list[bool]) -> None:
    assert right(answer, true) == expected


def test_the_bar_holds_the_last_measurement(tmp_path: Path) -> None:
    facts = {"stage": 1, "step": 1, "loss": 0.5, "lr": 1e-5, "samples_per_second": 7.0}
    bar = tqdm(file=io.StringIO(), total=2)
    log_step(tmp_path / "metrics.jsonl", bar, facts | {"held_out_loss": 0.25, "held_out_score": 0.75})
    log_step(tmp_path / "metrics.jsonl", bar, facts)
    assert str(bar).startswith("stage 1, held out 0.250, score 0.750: 100%")


# --- resume


@pytest.fixture(scope="session")
def whole(stage0: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train.main(command(3, stage0, data, out)) == 0
    return out


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_resumed(stage0: Path, data: Path, whole: Path, tmp_path: Path, processes: int) -> None:
    argv, log = command(3, stage0, data, tmp_path / "run"), tmp_path / "log"
    if processes == 2:  # of two processes the sums are in another order than of one
        assert finish(launch(command(3, stage0, data, tmp_path / "whole"), log, 2)) == [0, 0], log.read_text()
        whole = tmp_path / "whole"
    started = launch(argv, log, processes)
    wait_for_step(tmp_path / "run", random.randint(3, 6))
    for process in started:
        process.kill()
    assert -signal.SIGKILL in finish(started), log.read_text()
    assert not (tmp_path / "run" / "config.json").exists()
    assert finish(launch([*argv, "--resume"], log, processes)) == [0] * processes, log.read_text()
    assert re.search(r"resuming from .*step-0000000[2468]", log.read_text())
    same(tmp_path / "run", whole)
    lines, expected = logged(tmp_path / "run"), logged(whole)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected]


def test_killed_while_writing_a_checkpoint(stage0: Path, data: Path, whole: Path, tmp_path: Path) -> None:
    argv, log, out = command(3, stage0, data, tmp_path / "run"), tmp_path / "log", tmp_path / "run"
    assert finish(launch(argv, log, die_at=3)) == [-signal.SIGKILL]
    names = [".step-00000006.pt.new", "step-00000002.pt", "step-00000004.pt"]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == names
    assert train.main([*argv, "--resume"]) == 0
    same(out, whole)


def test_a_damaged_checkpoint_is_passed_over(
    stage0: Path, data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, out = command(3, stage0, data, tmp_path / "run"), tmp_path / "run"
    assert train.main(argv) == 0
    (out / "config.json").unlink()
    newest, before = (out / "checkpoints" / f"step-0000000{n}.pt" for n in (8, 6))
    newest.write_bytes(newest.read_bytes()[:-100])
    (out / "checkpoints" / ".step-00000009.pt.new").touch()
    capsys.readouterr()
    assert train.main([*argv, "--resume"]) == 0
    said = capsys.readouterr().err
    assert f"{newest}: " in said
    assert "damaged and renamed" in said
    assert f"resuming from {before}" in said
    same(out, whole)
    kept = sorted(path.name for path in (out / "checkpoints").glob("[!.]*"))
    assert kept == ["damaged-step-00000008.pt", "step-00000006.pt", "step-00000008.pt"]
    assert torch.load(newest, weights_only=True)["trained"]  # written again


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"state": {"step": "x"}}, "this checkpoint is damaged and renamed"),
        ({"state": {"step": 50}}, "it says step 50 of 8: this checkpoint is damaged and renamed"),
        ({"state": {"step": -5}}, "it says step -5 of 8: this checkpoint is damaged and renamed"),
        ({"state": {"mood": 1}}, "this checkpoint is damaged and renamed"),
        ({"settings": [1]}, "this checkpoint is damaged and renamed"),
        ({"optimizer": {}}, "step-00000008.pt: the field 'param_groups' is missing"),
        ({"trained": {}}, "step-00000008.pt: qformer.image_norm.bias is missing here"),
    ],
)
def test_a_checkpoint_of_another_form(
    stage0: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], words: str
) -> None:
    argv, newest = command(1, stage0, data, tmp_path), tmp_path / "checkpoints" / "step-00000008.pt"
    assert train.main(argv) == 0
    (tmp_path / "config.json").unlink()
    torch.save(torch.load(newest, weights_only=True) | change, newest)
    assert train.main([*argv, "--resume"]) == (0 if "renamed" in words else 2)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("text", [b"hello\n", b"[1]\n", b"\xff\n", b"{}\n"])
def test_metrics_of_another_form(
    stage0: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: bytes
) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(text)
    assert train.main(command(1, stage0, data, tmp_path)) == 2
    assert f"{tmp_path / 'metrics.jsonl'}: " in capsys.readouterr().err


def test_another_recipe_does_not_go_on(
    stage0: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, out = command(1, stage0, data, tmp_path / "run"), tmp_path / "run"
    assert train.main(argv) == 0
    assert train.main([*argv, "--resume", "--steps", "9"]) == 0
    assert f"{out} is finished already; give it to --init" in capsys.readouterr().err
    (out / "config.json").unlink()
    assert train.main([*argv, "--resume", "--micro-batch", "1"]) == 2
    assert "was trained with micro_batch 4, not 1" in capsys.readouterr().err
    assert train.main([*argv, "--resume", "--seed", "1"]) == 2
    assert "was trained with seed 0, not 1" in capsys.readouterr().err
    assert train.main(argv) == 2
    assert "--resume continues it" in capsys.readouterr().err


def test_another_beginning_does_not_go_on(
    stage0: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, moved = tmp_path / "run", tmp_path / "moved"
    assert train.main(command(3, stage0, data, out)) == 0
    again = command(3, shutil.copytree(stage0, moved), data, out, "--resume")
    assert train.main(again) == 0
    assert f"{out} is finished already; give it to --init" in capsys.readouterr().err
    (out / "config.json").unlink()
    assert train.main(again) == 0  # the same under another name

    (out / "config.json").unlink()
    frozen = load_file(moved / "frozen.safetensors")
    (moved / "frozen.safetensors").unlink()
    save_file(frozen | {"vit.positions": frozen["vit.positions"] + 1}, moved / "frozen.safetensors")
    assert train.main(again) == 2
    assert "was trained with weight files [" in capsys.readouterr().err


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_signals_save(stage0: Path, data: Path, whole: Path, tmp_path: Path, name: signal.Signals) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    argv = command(3, stage0, data, out, "--save-every", 1000)
    started = launch([*argv, "--workers", "1"], log)
    wait_for_step(out, 2)
    os.kill(started[0].pid or 0, name)
    assert finish(started) == [128 + name], log.read_text()
    assert f"--resume continues from {out / 'checkpoints'}" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert train.main([*argv, "--resume"]) == 0
    same(out, whole)


def test_only_the_last_checkpoints_stay(whole: Path) -> None:
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["step-00000006.pt", "step-00000008.pt"]


def test_disk_full(
    stage0: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = torch.save

    def full(data: dict[str, Any], path: Path) -> None:
        if "00004" in str(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        honest(data, path)

    monkeypatch.setattr(torch, "save", full)
    out = tmp_path / "run"
    assert train.main(command(1, stage0, data, out, "--keep", 9)) == 0
    assert "no checkpoint at step 4, the ones before it stay: " in capsys.readouterr().err
    assert [p.stem[-1] for p in sorted((out / "checkpoints").iterdir())] == ["2", "6", "8"]


# --- frozen parts in bfloat16 and int8


def test_untagged_records_on_a_card(whole: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card gets the frozen matrices in bfloat16, RAM's too, which tags during training. The rest is float32."""
    model = begin(STAGES[4], [whole], 0, torch.bfloat16)[0].model
    for name, parameter in model.named_parameters():
        half = part_of(name) is None and parameter.ndim > 1 and name != "t5.shared.weight"
        assert (parameter.dtype == torch.bfloat16) == half, name
    monkeypatch.setattr(train, "begin", lambda stage, init, seed, _: begin(stage, init, seed, torch.bfloat16))
    assert train.main(command(4, whole, data, tmp_path / "out", "--bf16", "--steps", 2)) == 0


def test_stages_with_frozen_parts_in_int8(whole: Path, data: Path, tmp_path: Path) -> None:
    """Every stage runs, resumes and exports. The first losses are nearly those of the folder that was rounded."""
    start, plain = tmp_path / "int8", tmp_path / "bfloat16"
    model = Lion.from_pretrained(whole, dtype=torch.bfloat16).model
    for folder in (plain, start):
        shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        save_file(model.state_dict(), folder / "model.safetensors")
        to_int8(model)  # all linear layers, as weights.py convert does
    stored, begun = model.state_dict(), begin(STAGES[4], [start], seed=0)[0].model.state_dict()
    for name, tensor in stored.items():  # what trains begins at its rounded values
        if tensor.dtype == torch.int8 and part_of(name):
            assert torch.equal(begun[name], tensor * stored[name.removesuffix("weight") + "scale"].float()[:, None])
    inits = {1: [start], 2: [start], 3: [tmp_path / "1", tmp_path / "2"], 4: [tmp_path / "3"]}
    for number, init in inits.items():
        out, flags = tmp_path / str(number), ["--steps", 4, *["--bf16", "--recompute"] * (number % 2)]
        assert train.main(command(number, init, data, out, *flags)) == 0
        ends = trained(out)
        assert {tensor.dtype for tensor in ends.values()} == {torch.bfloat16}
        for lost in (out / "config.json", out / "checkpoints" / "step-00000004.pt"):
            lost.unlink()
        assert train.main(command(number, init, data, out, *flags, "--resume")) == 0
        assert all(torch.equal(tensor, ends[name]) for name, tensor in trained(out).items())
        for name, module in Lion.from_pretrained(out).model.named_modules():
            if isinstance(module, torch.nn.Linear | Int8Linear):
                assert isinstance(module, Int8Linear) == (part_of(f"{name}.weight") is None), name
        assert weights.main(["inspect", str(out)]) == 0
        assert weights.main(["export", str(out), "--out", str(tmp_path / f"{number}.pth")]) == 0
        assert len(torch.load(tmp_path / f"{number}.pth", weights_only=True)["model"]) == len(ends) + (number != 2)
        if number < 3:
            assert train.main(command(number, plain, data, plain / str(number), *flags)) == 0
            lines = logged(out)[0], logged(plain / str(number))[0]
            for fact, bound in (("loss", 0.005), ("norm", 0.03)):  # the gradient's, which came through FlanT5
                assert lines[0][fact] == pytest.approx(lines[1][fact], rel=bound)
    assert (tmp_path / "4" / "frozen.safetensors").stat().st_nlink == 3  # shared with stages 2 and 3
    with pytest.raises(ValueError, match=r"2 and .*1 differ in t5\.lm_head\.weight: they must share"):
        begin(STAGES[3], [tmp_path / "1", plain / "2"], seed=0)


# --- many processes


def test_two_processes_are_one_with_twice_the_rounds(stage0: Path, data: Path, tmp_path: Path) -> None:
    """Dropout included, since it belongs to the micro-batch; an epoch of 48 is 12 batches of 4."""
    alone, together, log = tmp_path / "alone", tmp_path / "together", tmp_path / "log"
    more = ["--steps", 12, "--micro-batch", 1, "--mean", "tokens", "--lr", 0.001]
    assert train.main(command(3, stage0, data, alone, *more)) == 0
    assert finish(launch(command(3, stage0, data, together, *more), log, 2)) == [0, 0], log.read_text()
    assert [line["loss"] for line in logged(alone)] == pytest.approx([x["loss"] for x in logged(together)], rel=1e-5)
    assert [line["tokens"] for line in logged(alone)] == [line["tokens"] for line in logged(together)]
    one, two, start = trained(alone), trained(together), begin(SINGLE, [stage0], seed=0)[0].model.state_dict()
    assert max((tensor - start[name]).abs().max() for name, tensor in one.items()) > 5e-3  # a thousand times as far
    for name, tensor in one.items():
        assert (tensor - two[name]).abs().max() < 1e-5, name


def test_two_torchrun_agents_are_two_processes(stage0: Path, data: Path, tmp_path: Path) -> None:
    """Two nodes that meet on loopback, one process each."""
    more = ["--micro-batch", 1, "--mean", "tokens", "--lr", 0.001]
    assert train.main(command(3, stage0, data, tmp_path / "alone", *more)) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-id", "lion", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    torchrun += ["--local-addr", "127.0.0.1", str(ROOT / "train.py")]
    argv = command(3, stage0, data, tmp_path / "agents", *more)
    agents = [subprocess.Popen([*torchrun, *argv], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [agent.communicate(timeout=120)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    one, two = logged(tmp_path / "alone"), logged(tmp_path / "agents")
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], rel=1e-5)
    for name, tensor in trained(tmp_path / "alone").items():
        assert (tensor - trained(tmp_path / "agents")[name]).abs().max() < 1e-5, name


def test_processes_wait_for_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may train stage 0 or write XXL, for longer than PyTorch's ten minutes."""
    given = dict[str, Any]()
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **rest: given.update(rest, backend=backend))
    for name, value, function in (("RANK", "0", "get_rank"), ("WORLD_SIZE", "2", "get_world_size")):
        monkeypatch.setenv(name, value)
        monkeypatch.setattr(dist, function, lambda value=value: int(value))
    assert distributed("cpu") == (0, 2, torch.device("cpu"))
    assert (given["backend"], given["device_id"]) == ("gloo", None)
    assert given["timeout"] > timedelta(hours=24)


@pytest.mark.parametrize("mean", ["tokens", "samples"])
def test_the_batch_does_not_depend_on_how_it_is_cut(stage0: Path, data: Path, tmp_path: Path, mean: str) -> None:
    """Losses and gradients, without dropout, which does depend on it."""
    config = json.loads((stage0 / "config.json").read_text())
    for part in ("qformer", "aggregator"):
        config[part]["dropout"] = 0.0
    still = tmp_path / "start"
    still.mkdir()
    for path in stage0.iterdir():
        (still / path.name).write_bytes(path.read_bytes())
    (still / "config.json").write_text(json.dumps(config))
    for size in (4, 1):
        assert train.main(command(3, still, data, tmp_path / str(size), "--micro-batch", size, "--mean", mean)) == 0
    one, two = (logged(tmp_path / str(size)) for size in (4, 1))
    for fact, bound in (("loss", 1e-4), ("norm", 1e-3)):
        assert [line[fact] for line in one] == pytest.approx([line[fact] for line in two], rel=bound)


def test_drawing_changes_nothing(stage0: Path, data: Path, whole: Path, tmp_path: Path) -> None:
    assert train.main(command(3, stage0, data, tmp_path / "run", "--draw-every", 1)) == 0
    same(tmp_path / "run", whole)


def test_a_batch_that_cannot_be_shared(
    stage0: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(command(1, stage0, data, tmp_path / "run", "--micro-batch", 3)) == 2
    assert "1 processes cannot make a batch of 4 in micro-batches of 3" in capsys.readouterr().err


# --- what goes wrong


def test_losses_that_are_no_numbers(
    stage0: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = mixture.collate

    def poisoned(lion: Lion, samples: Samples) -> Batch:
        batch = honest(lion, samples)
        bad = any(name.endswith("record 5") for name in samples.names)
        return replace(batch, pixels=batch.pixels * math.nan) if bad else batch

    monkeypatch.setattr(train, "collate", poisoned)
    out = tmp_path / "run"
    assert train.main(command(1, stage0, data, out, "--micro-batch", 1, "--save-every", 1, "--keep", 99)) == 0
    said = capsys.readouterr().err
    assert said.count("is skipped, its loss is nan") == 2  # 32 samples of 24 records: twice, or nearly
    assert said.count(f"{data / 'image.json'}, record 5") == 2
    lines = logged(out)
    assert lines[-1]["skipped"] == 2
    for i, line in enumerate(lines):
        if math.isnan(line["loss"]):
            before, after = (
                torch.load(out / "checkpoints" / f"step-{n:08}.pt", weights_only=True)["trained"] for n in (i, i + 1)
            )
            assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())

    forward = LionModel.forward
    monkeypatch.setattr(LionModel, "forward", lambda *args: forward(*args) * math.inf)
    assert train.main(command(1, stage0, data, tmp_path / "never", "--steps", 40)) == 2
    assert "10 steps in a row were not finite" in capsys.readouterr().err
    assert len(logged(tmp_path / "never")) == 9
    calls = itertools.count(1)
    fine = lambda: not torch.is_grad_enabled() or next(calls) % 6 == 0
    monkeypatch.setattr(LionModel, "forward", lambda *args: forward(*args) * (1 if fine() else math.inf))
    monkeypatch.setattr(train, "collate", honest)
    assert train.main(command(1, stage0, data, tmp_path / "often", "--steps", 12)) == 0
    assert logged(tmp_path / "often")[-1]["skipped"] == 10  # but not in a row


@pytest.mark.parametrize("flags", [["--steps", 6], ["--steps", 1], ["--steps", 60, "--warmup", 6]])
def test_a_diverged_run_has_no_result(
    stage0: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[object]
) -> None:
    """Loss and weights are measured after the last step. A checkpoint from before stays, whatever --keep says."""
    out = tmp_path / "run"
    argv = command(1, stage0, data, out, *flags, "--lr", 1e30, "--save-every", 1, "--keep", 1)
    assert train.main(argv) == 2
    said = capsys.readouterr().err
    assert f"{out}: no result, a loss or weight is not finite" in said or "10 steps in a row were not finite" in said
    assert not (out / "config.json").exists()
    assert not (out / "trained.safetensors").exists()
    if "--warmup" in flags:  # the first step's rate is 1e-8
        first = torch.load(out / "checkpoints" / "step-00000001.pt", weights_only=True)
        assert max(tensor.abs().max() for tensor in first["trained"].values()) < 10
    elif flags == ["--steps", 6]:
        assert train.main([*argv, "--resume"]) == 2  # the checkpoint knows


def test_a_weight_that_no_loss_reads(
    stage0: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = AdamW.step

    def poisoned(self: AdamW) -> None:
        step(self)
        named = [pair for group in self.param_groups for pair in zip(group["names"], group["params"], strict=True)]
        unread = next(parameter for name, parameter in named if name.startswith(UNREAD))
        unread.data.fill_(math.inf)

    monkeypatch.setattr(AdamW, "step", poisoned)
    assert train.main(command(1, stage0, data, tmp_path / "run")) == 2
    assert math.isfinite(logged(tmp_path / "run")[-1]["loss"])
    assert "no result, a loss or weight is not finite" in capsys.readouterr().err


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_an_answer_has_a_finite_score(stage0: Path, value: float) -> None:
    lion = begin(SINGLE, [stage0], seed=0)[0]
    lion.model.t5.lm_head.weight.data.mul_(value)
    pixels, rest = torch.randn(1, 3, 16, 16), (["what?"], [["red"]], ["image"])
    with pytest.raises(ValueError, match="no finite score: these weights have diverged"):
        lion.rank(pixels, *rest, [["yes", "no"]])
    with pytest.raises(ValueError, match="no finite score: these weights have diverged"):
        lion.respond([Image.new("RGB", (9, 9))], rest[0], rest[2], GENERATION["answer"], rest[1])


@pytest.mark.parametrize(
    "name", ["loss.png", "samples.png", "frozen.safetensors", "trained.safetensors", "vocab.txt", "config.json"]
)
def test_disk_full_at_the_end(
    stage0: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    def full(path: Path) -> None:
        if path.name == f".{name}.new":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "sync", full)
    out = tmp_path / "run"
    assert train.main(command(1, stage0, data, out)) == 2
    assert f"{out / name}: it cannot be written, is the disk full? (No space left" in capsys.readouterr().err
    assert not (out / "config.json").exists()
    assert not list(out.glob(".*"))
    monkeypatch.undo()
    assert train.main(command(1, stage0, data, out, "--resume")) == 0


def test_bad_records_are_named_counted_and_at_last_too_many(
    stage0: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = json.loads((data / "image.json").read_text())
    records[3] = {"image": "0.png"}
    file = tmp_path / "some.json"
    file.write_text(json.dumps(records))
    argv = command(1, stage0, data, tmp_path / "some")
    argv[argv.index("--data") + 1] = str(file)
    assert train.main([*argv, "--steps", "6"]) == 0
    assert f"replaced: {file}, record 4: it has no question" in capsys.readouterr().err
    assert logged(tmp_path / "some")[-1]["bad"] == 1
    for record in records[::2]:
        record["category"] = "neither"
    file.write_text(json.dumps(records))
    argv[argv.index("--out") + 1] = str(tmp_path / "many")
    assert train.main([*argv, "--steps", "60"]) == 2
    assert re.search(r"\d\d of the first \d+ records cannot be used", capsys.readouterr().err)
    alone = tmp_path / "one.jsonl"
    alone.write_text("{\n")
    argv[argv.index("--out") + 1], argv[argv.index("--data") + 1] = str(tmp_path / "one"), str(alone)
    assert train.main([*argv, "--batch", "16"]) == 2
    assert f"1 records in a row cannot be used: {alone}, record 1" in capsys.readouterr().err
    argv[argv.index("--data") + 1] = str(file)
    for text, words in (("", f"{file}: it "), ("[", "not whole JSON")):
        file.write_text(text)
        argv[argv.index("--out") + 1] = str(tmp_path / "none")
        assert train.main(argv) == 2
        assert words in capsys.readouterr().err


def test_a_user_is_told_what_is_missing(
    stage0: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv, words in (
        (["--data", "a.json"], "say which with --stage"),
        (["--stage", "1"], "--init takes one folder"),
        (["--stage", "1", "--init", "a", "b"], "--init takes one folder"),
        (["--stage", "1", "--init", str(tmp_path / "none")], "has no config.json: it is not a folder of"),
        (["--stage", "4", "--init", str(stage0)], f"begin with {stage0} (stage 0): give a whole LION"),
        (["--stage", "3", "--init", str(stage0)], f"begin with {stage0} (stage 0): give a whole LION"),
        (["--stage", "3", "--single-stage", "--init", "a", "b"], "--init takes one folder"),
        (["--stage", "4", "--tags", "soft"], "--tags changes nothing with --stage 4: leave it out"),
        (["--stage", "4", "--no-aggregator"], "--no-aggregator changes nothing with --stage 4"),
        (["--stage", "2", "--no-router"], "--no-router changes nothing with --stage 2"),
        (["--stage", "2", "--no-adapters"], "--no-adapters changes nothing with --stage 2"),
        (["--stage", "2", "--single-stage"], "--single-stage changes nothing with --stage 2"),
        (["--stage", "1", "--no-aggregator"], "--no-aggregator changes nothing with --stage 1"),
        (["--stage", "3", "--from-scratch"], "--from-scratch changes nothing with --stage 3"),
        (["--no-adapters", "--no-router"], "--no-router changes nothing with --no-adapters"),
        (["--held-out", "no.json"], "no.json: No such file"),
        (["--micro-batch", "0"], "--micro-batch must be from 1 to 100000, not 0"),
        (["--save-every", "0"], "--save-every must be from 1 to 1000000000, not 0"),
        (["--draw-every", "0"], "--draw-every must be from 1 to 1000000000, not 0"),
        (["--keep", "-1"], "--keep must be from 1 to 1000000000, not -1"),
        (["--steps", "0"], "--steps must be from 1 to 1000000000, not 0"),
        (["--steps", str(10**20)], "--steps must be from 1 to 1000000000, not 1"),
        (["--batch", "0"], "--batch must be from 1 to 100000, not 0"),
        (["--workers", "-1"], "--workers must be from 0 to 256, not -1"),
        (["--workers", str(10**11)], "--workers must be from 0 to 256, not 1"),
        (["--seed", "-1"], "--seed must be from 0 to 9223372036854775807, not -1"),
        (["--seed", str(10**30)], "--seed must be from 0 to 9223372036854775807, not 1"),
        (["--device", "nowhere"], "the device 'nowhere' cannot be used"),
        (["--device", "meta"], "the device 'meta' cannot be used"),
        (["--warmup", "-5"], "--warmup must be from 0 to 1000000000, not -5"),
        (["--lr", "nan"], "--lr must be from 1e-30 to 1e+30, not nan"),
        (["--lr", "1e400"], "--lr must be from 1e-30 to 1e+30, not inf"),
        (["--clip", "-1"], "--clip must be from 1e-30 to 1e+30, not -1.0"),
        (["--ratios", "1", "nan"], "--ratios must be from 1e-30 to 1e+30, not nan"),
        (["--ratios", "1e400"], "--ratios must be from 1e-30 to 1e+30, not inf"),
        (["--ratios", "1e308", "1e308"], "--ratios must be from 1e-30 to 1e+30, not 1e+308"),
        (["--out", ""], "an argument is empty"),
        (["--stage", "1", "--init="], "an argument is empty"),
    ):
        code = train.main(["--out", str(tmp_path / "run"), "--steps", "1", "--batch", "1", "--device", "cpu", *argv])
        said = capsys.readouterr().err
        assert (code, words in said) == (2, True), said
