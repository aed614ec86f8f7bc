"""The tagger against the release's numbers (golden), against transformers' Swin, and by hand."""

import json
import re
from dataclasses import replace

import pytest
import torch
from conftest import GOLDEN, KEYS, oracle, randomise, relative
from safetensors.torch import load_file
from torch import Tensor

from lion_mini.config import LionConfig, RamConfig, TagHeadConfig
from lion_mini.ram import Ram, select
from lion_mini.swin import Block, Swin

RAM = {
    "label_embed": "label_embed",
    "visual_encoder.patch_embed.proj.weight": "swin.patch_embed.proj.weight",
    "visual_encoder.patch_embed.proj.bias": "swin.patch_embed.proj.bias",
    "visual_encoder.patch_embed.norm.weight": "swin.patch_embed.norm.weight",
    "visual_encoder.patch_embed.norm.bias": "swin.patch_embed.norm.bias",
    "visual_encoder.layers.{}.blocks.{}.norm1.weight": "swin.stages.{}.blocks.{}.norm1.weight",
    "visual_encoder.layers.{}.blocks.{}.norm1.bias": "swin.stages.{}.blocks.{}.norm1.bias",
    "visual_encoder.layers.{}.blocks.{}.attn.relative_position_bias_table": "swin.stages.{}.blocks.{}.attn.bias_table",
    "visual_encoder.layers.{}.blocks.{}.attn.qkv.weight": "swin.stages.{}.blocks.{}.attn.qkv.weight",
    "visual_encoder.layers.{}.blocks.{}.attn.qkv.bias": "swin.stages.{}.blocks.{}.attn.qkv.bias",
    "visual_encoder.layers.{}.blocks.{}.attn.proj.weight": "swin.stages.{}.blocks.{}.attn.o.weight",
    "visual_encoder.layers.{}.blocks.{}.attn.proj.bias": "swin.stages.{}.blocks.{}.attn.o.bias",
    "visual_encoder.layers.{}.blocks.{}.norm2.weight": "swin.stages.{}.blocks.{}.norm2.weight",
    "visual_encoder.layers.{}.blocks.{}.norm2.bias": "swin.stages.{}.blocks.{}.norm2.bias",
    "visual_encoder.layers.{}.blocks.{}.mlp.fc1.weight": "swin.stages.{}.blocks.{}.mlp.fc1.weight",
    "visual_encoder.layers.{}.blocks.{}.mlp.fc1.bias": "swin.stages.{}.blocks.{}.mlp.fc1.bias",
    "visual_encoder.layers.{}.blocks.{}.mlp.fc2.weight": "swin.stages.{}.blocks.{}.mlp.fc2.weight",
    "visual_encoder.layers.{}.blocks.{}.mlp.fc2.bias": "swin.stages.{}.blocks.{}.mlp.fc2.bias",
    "visual_encoder.layers.{}.downsample.norm.weight": "swin.stages.{}.merge.norm.weight",
    "visual_encoder.layers.{}.downsample.norm.bias": "swin.stages.{}.merge.norm.bias",
    "visual_encoder.layers.{}.downsample.reduction.weight": "swin.stages.{}.merge.reduction.weight",
    "visual_encoder.norm.weight": "swin.norm.weight",
    "visual_encoder.norm.bias": "swin.norm.bias",
    "image_proj.weight": "image_proj.weight",
    "image_proj.bias": "image_proj.bias",
    "wordvec_proj.weight": "wordvec_proj.weight",
    "wordvec_proj.bias": "wordvec_proj.bias",
    "fc.weight": "fc.weight",
    "fc.bias": "fc.bias",
}
HEAD = {
    "crossattention.self.query.weight": "cross_attn.q.weight",
    "crossattention.self.query.bias": "cross_attn.q.bias",
    "crossattention.self.key.weight": "cross_attn.k.weight",
    "crossattention.self.key.bias": "cross_attn.k.bias",
    "crossattention.self.value.weight": "cross_attn.v.weight",
    "crossattention.self.value.bias": "cross_attn.v.bias",
    "crossattention.output.dense.weight": "cross_attn.o.weight",
    "crossattention.output.dense.bias": "cross_attn.o.bias",
    "crossattention.output.LayerNorm.weight": "cross_attn.norm.weight",
    "crossattention.output.LayerNorm.bias": "cross_attn.norm.bias",
    "intermediate.dense.weight": "ff.wi.weight",
    "intermediate.dense.bias": "ff.wi.bias",
    "output.dense.weight": "ff.wo.weight",
    "output.dense.bias": "ff.wo.bias",
    "output.LayerNorm.weight": "ff.norm.weight",
    "output.LayerNorm.bias": "ff.norm.bias",
}
for prefix in ("tagging_head", "vision_multi"):  # the code's name and the public file's
    RAM |= {f"{prefix}.encoder.layer.{{}}.{theirs}": f"head.{{}}.{ours}" for theirs, ours in HEAD.items()}
RAM_UNUSED = {  # a star at the end stands for everything beneath
    "visual_encoder.layers.{}.blocks.{}.attn.relative_position_index": "a table of offsets; computed here",
    "visual_encoder.layers.{}.blocks.{}.attn_mask": "the mask of the shifted windows; computed here",
    "tag_encoder.*": "RAM's captioning branch; LION uses only its tagging head",
    "text_decoder.*": "RAM's captioning branch; LION uses only its tagging head",
}

SMALL = RamConfig(
    image_size=48, width=12, depths=(2, 3), heads=(2, 4), window=3, tag_width=20, tags=7,
    head=TagHeadConfig(width=16, depth=2, heads=4, mlp_width=28),
)  # fmt: skip


def pattern(name: str) -> str:
    """The official name with its layer numbers as {}."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "{}", name)


def our_name(official: str) -> str | None:
    """Where a tensor of the official file goes, or None if it is declared unused; KeyError if it is neither."""
    general = pattern(official)
    if general in RAM_UNUSED or f"{general.split('.')[0]}.*" in RAM_UNUSED:
        return None
    return RAM[general].format(*re.findall(r"(?<=\.)\d+(?=\.)", official))


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="module")
def golden_ram() -> Ram:
    config = LionConfig.from_json((GOLDEN / "sizes.json").read_text()).ram
    assert config is not None
    with torch.device("meta"):
        ram = Ram(config)
    official = torch.load(GOLDEN / "official/ram_swin_large_14m.pth", weights_only=True)["model"]
    state = {ours: tensor.float() for name, tensor in official.items() if (ours := our_name(name))}
    lines = (GOLDEN / "official/ram_tag_list_threshold.txt").read_text().split()
    state["thresholds"] = torch.tensor([float(line) for line in lines])
    ram.load_state_dict(state, strict=True, assign=True)
    return ram


@pytest.fixture
def small() -> Ram:
    ram = Ram(SMALL)
    randomise(ram)
    return ram


@pytest.fixture
def image() -> Tensor:
    return torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def test_golden_tokens_and_logits(golden: dict[str, Tensor], golden_ram: Ram) -> None:
    with torch.no_grad():
        assert relative(golden_ram.swin(golden["ram.image"]), golden["ram.swin"]) < 1e-4
        assert relative(golden_ram(golden["ram.image"]), golden["ram.logits"]) < 1e-4


def test_golden_tags(golden: dict[str, Tensor], golden_ram: Ram) -> None:
    """With every tag's own threshold the tags are the release's: joined by bars from RAM, by commas from LION."""
    words = (GOLDEN / "official/ram_tag_list.txt").read_text().splitlines()
    expected = json.loads((GOLDEN / "golden.json").read_text())["ram"]
    found = [[words[tag] for tag, _ in tags] for tags in golden_ram.tag_ids(golden["ram.image"])]
    assert [" | ".join(tags) for tags in found] == expected["tags_raw"]
    assert [", ".join(tags) for tags in found] == expected["tags"]


def test_every_official_tensor_is_accounted_for() -> None:
    """The real file's names and shapes fill the real model exactly; the meta device needs no memory for it."""
    with torch.device("meta"):
        state = Ram(RamConfig()).state_dict()
    lines = [line.split() for line in (KEYS / "ram_swin_large_14m.txt").read_text().splitlines() if line[0] != "#"]
    found = {ours: tuple(map(int, shape.split("x"))) for name, shape in lines if (ours := our_name(name))}
    assert found == {name: tuple(tensor.shape) for name, tensor in state.items() if name != "thresholds"}


def as_transformers(swin: Swin) -> dict[str, Tensor]:
    """Our parameters under the names of transformers' SwinModel, which keeps q, k and v apart."""
    state = {}
    for name, tensor in swin.state_dict().items():
        for ours, theirs in (
            ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
            ("patch_embed.norm", "embeddings.norm"),
            ("attn.bias_table", "attention.relative_position_bias.relative_position_bias_table"),
            ("attn.o.", "attention.o_proj."),
            ("norm1", "layernorm_before"),
            ("norm2", "layernorm_after"),
            ("merge", "downsample"),
            ("stages", "encoder.layers"),
        ):
            name = name.replace(ours, theirs)
        name = re.sub(r"^norm", "layernorm", name)
        if "qkv" in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace("attn.qkv", f"attention.{letter}_proj")] = part
        else:
            state[name] = tensor
    return state


@pytest.mark.parametrize(
    "config",
    [
        SMALL,  # grids of 12 and 6 tokens a side, both shifted
        replace(SMALL, image_size=24),  # 6 and 3: the second is a single window
        replace(SMALL, window=6),  # 12 and 6, shifted by 3
        replace(SMALL, image_size=64, patch_size=8, window=2, depths=(1, 3, 2), heads=(1, 3, 6)),  # 8, 4, 2
    ],
)
def test_transformers_agrees(config: RamConfig) -> None:
    transformers = oracle("transformers")
    swin = Swin(config)
    randomise(swin)
    theirs = transformers.SwinModel(
        transformers.SwinConfig(
            image_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.width,
            depths=list(config.depths),
            num_heads=list(config.heads),
            window_size=config.window,
        )
    ).eval()
    theirs.load_state_dict(as_transformers(swin), strict=True)
    pixels = torch.randn(2, 3, config.image_size, config.image_size)
    with torch.no_grad():
        found, expected = swin(pixels), theirs(pixels)
    assert relative(found[:, 0], expected.pooler_output) < 1e-4
    assert relative(found[:, 1:], expected.last_hidden_state) < 1e-4


@pytest.mark.parametrize(("side", "window", "shift"), [(6, 3, 1), (8, 4, 2), (6, 3, 0), (4, 4, 0)])
def test_who_sees_whom(side: int, window: int, shift: int) -> None:
    """A token reaches exactly the tokens of its window; a shifted window ends where the image does."""
    block = Block(10, 2, window, shift)
    randomise(block)
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    home = (place - shift).div(window, rounding_mode="floor")  # nothing is rolled: row -1 is a cut-off window
    expected = (home[:, None] == home).all(-1)
    grid = torch.randn(side, side, 10)
    changed = grid + torch.eye(side * side).view(-1, side, side, 1) * torch.randn(10)  # one token in each copy
    with torch.no_grad():
        reached = (block(changed) - block(grid[None])).abs().amax(-1).flatten(1) > 1e-6
    assert torch.equal(reached, expected)


def test_window_larger_than_the_grid(image: Tensor) -> None:
    """Any window from the grid's side on is the same model, without a shift."""
    exact, larger = (Swin(replace(SMALL, image_size=24, window=window)) for window in (6, 99))
    randomise(exact)
    larger.load_state_dict(exact.state_dict(), strict=True)
    assert torch.equal(exact(image[..., :24, :24]), larger(image[..., :24, :24]))


def test_built_on_meta_and_filled(small: Ram, image: Tensor) -> None:
    with torch.device("meta"):
        empty = Ram(SMALL)
    empty.load_state_dict(small.state_dict(), strict=True, assign=True)
    tensors = [*empty.parameters(), *empty.buffers()]
    assert not any(tensor.is_meta for tensor in tensors)
    assert torch.equal(empty(image), small(image))
    assert set(small.state_dict()) == {name for name, _ in small.named_parameters()} | {"thresholds"}


def test_bfloat16(small: Ram, image: Tensor) -> None:
    with torch.no_grad():
        expected = small(image)
        found = small.bfloat16()(image.bfloat16())
    assert found.dtype == torch.bfloat16
    assert relative(found, expected) < 0.05
    assert all(0 <= score <= 1 for tags in small.tag_ids(image.bfloat16(), threshold=0) for _, score in tags)


def test_train_mode_changes_nothing(small: Ram, image: Tensor) -> None:
    """The release tags in train mode, with dropout; here the mode does not matter."""
    assert torch.equal(small.train()(image), small.eval()(image))


def test_tags_do_not_see_each_other(small: Ram, image: Tensor) -> None:
    expected = small(image)[:, :3]
    small.label_embed.data = small.label_embed[:3].clone()
    assert relative(small(image), expected) < 1e-5


def test_threshold_and_top_k(small: Ram, image: Tensor) -> None:
    scores = small(image).sigmoid()
    everything = small.tag_ids(image, threshold=0)
    assert [[tag for tag, _ in tags] for tags in everything] == [list(range(7))] * 3
    assert torch.allclose(torch.tensor([[score for _, score in tags] for tags in everything]), scores)
    assert small.tag_ids(image, threshold=1) == [[], [], []]

    small.thresholds.fill_(1)
    small.thresholds[4] = 0
    assert [[tag for tag, _ in tags] for tags in small.tag_ids(image)] == [[4]] * 3
    best = scores.argmax(dim=1).tolist()
    assert [[tag for tag, _ in tags] for tags in small.tag_ids(image, threshold=0, top_k=1)] == [[tag] for tag in best]
    for wrong in ({"threshold": 1.5}, {"threshold": -0.1}, {"top_k": 0}):
        with pytest.raises(ValueError, match=r"not (1\.5|-0\.1|0)"):
            small.tag_ids(image, **wrong)


def test_select_keeps_the_order_of_the_vocabulary() -> None:
    scores = torch.tensor([[0.5, 0.25, 0.75, 0.875], [0.125, 0.75, 0.75, 0.0]])
    assert select(scores, 0.25) == [[(0, 0.5), (2, 0.75), (3, 0.875)], [(1, 0.75), (2, 0.75)]]
    assert select(scores, 0.25, top_k=2) == [[(2, 0.75), (3, 0.875)], [(1, 0.75), (2, 0.75)]]
    assert select(scores, torch.tensor([0.0, 1.0, 0.75, 0.5]), top_k=5) == [[(0, 0.5), (3, 0.875)], [(0, 0.125)]]


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="stage 0 of Swin has 12 x 12 tokens"):
        Swin(replace(SMALL, window=5))
    with pytest.raises(ValueError, match="stage 0 of Swin has 9 x 9 tokens"):
        Swin(replace(SMALL, image_size=36))
    with pytest.raises(ValueError, match=r"48 x 48 pixels, got \(1, 3, 24, 24\)"):
        Swin(SMALL)(torch.zeros(1, 3, 24, 24))
