"""Explanations: the numbers are the model's own, and what is drawn can be read."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, randomise
from einops import rearrange
from PIL import Image
from torch import Tensor

import infer
from lion_mini import GENERATION, Lion, toy
from lion_mini.explain import SOURCES, draw_explanation, explain, recorded
from lion_mini.images import lion_transform, open_image
from lion_mini.model.lion import LionModel
from lion_mini.text.prompts import DECODING, TASK_OF, render

PHOTO = GOLDEN / "photo.png"
ASKED = "What is this?"


@pytest.fixture
def photo() -> Image.Image:
    return open_image(PHOTO)


def softmax(q: Tensor, k: Tensor, heads: int, scale: float) -> Tensor:  # (1, t, d), (1, n, d) -> (t, n)
    """Attention weights spelled out, mean over heads."""
    q, k = (rearrange(x, "1 t (h e) -> h t e", h=heads) for x in (q, k))
    return torch.einsum("h t e, h n e -> h t n", q * scale, k).softmax(-1).mean(0)


@pytest.mark.parametrize("task", ["image", "region"])
def test_the_numbers_are_recomputed_from_the_weights(golden_model: Lion, photo: Image.Image, task: str) -> None:
    """By hand from what goes into every layer: shares, maps, likeliest tokens and gates."""
    model: Any = golden_model.model
    calls = dict[Any, list[tuple]]()
    keep = lambda module, args: calls.setdefault(module, []).append(args)
    looks = [layer.cross_attn for layer in model.qformer.layers if layer.cross_attn is not None]
    fetches = [block.cross_attn for block in model.aggregator.blocks]
    for module in (*looks, *fetches):
        module.register_forward_pre_hook(keep)
    found = explain(golden_model, photo, ASKED, task, GENERATION["caption"])

    # 1. Q-Former and aggregator: q and k of their inputs.
    by_hand = []
    for attn in (*looks, *fetches):
        [(x, context)] = calls[attn]
        width = x.shape[-1] // attn.heads
        by_hand.append(softmax(attn.q(x), attn.k(context), attn.heads, width**-0.5))
    look, fetch = torch.stack(by_hand[: len(looks)]).mean(0), by_hand[len(looks) :]
    side = golden_model.config.vit.image_size // golden_model.config.vit.patch_size
    torch.testing.assert_close(found.queries.flatten(1), look[:, 1:], atol=1e-5, rtol=0)

    # 2. The decoder, layer by layer, on the answer as labels.
    tags = [tag for tag, _ in found.answer.tags]
    pixels = lion_transform(photo, golden_model.config.vit.image_size)[None]
    batch = golden_model.batch(pixels, [ASKED], [tags], [task], None)
    states, _ = model.encode(batch)
    ids = torch.tensor([[0, *found.answer.ids[:-1]]])
    cache = model.t5.start(states, None, batch.task, ids.shape[1])
    x, reads = model.t5.shared(ids), []
    for i, layer in enumerate(model.t5.decoder):
        x = layer.attn(x, cache.bias[..., : x.shape[1], : x.shape[1]], cache, i)
        attn = layer.cross_attn
        reads.append(softmax(attn.q(attn.norm(x)), attn.k(states), attn.heads, 1.0))
        k, v = attn.keys_values(states)
        x = layer.ff(attn.cross(x, k, v, None), batch.task)
    read = torch.stack(reads).mean(0)
    q, n, count = (
        golden_model.config.qformer.queries,
        side**2 + 1,
        lambda text: len(golden_model.text.pieces.encode(text)),
    )
    before = found.answer.prompt.index("[") + 1
    opening = count(found.answer.prompt[:before]) - 1  # without </s>
    listed = count(found.answer.prompt[: found.answer.prompt.index("]")]) - 1 - opening
    parts = read.split([q, n, opening, listed, read.shape[1] - q - n - opening - listed], dim=1)
    sums = [part.sum(1) for part in parts]
    shares = torch.stack((sums[0], sums[1], sums[3], sums[2] + sums[4]), dim=1)
    torch.testing.assert_close(found.shares, shares, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.shares.sum(1), torch.ones(len(shares)), atol=1e-5, rtol=0)
    used = parts[1] / parts[1].sum(1, keepdim=True)
    taps = torch.stack([used, *(used @ weights for weights in fetch)], dim=1)
    torch.testing.assert_close(found.taps.flatten(2), taps[..., 1:], atol=1e-5, rtol=0)

    # 3. Alternatives and gates.
    chances = model.t5.lm_head(model.t5.decoder_norm(x))[0].softmax(-1)
    for row, id, best in zip(chances, found.answer.ids, found.likely, strict=True):
        name: Any = golden_model.text.pieces.tokens.get(id, f"<{id}>")  # random weights write ids without a token
        assert best[0][0] == name  # greedy
        assert best[0][1] == pytest.approx(row[id].item(), abs=1e-5)
        assert [p for _, p in best] == pytest.approx(row.topk(4).values.tolist(), abs=1e-5)
    row = golden_model.config.tasks.index(task)
    gates = [layer.ff.adapters.gates for layer in (*model.t5.encoder, *model.t5.decoder)]
    assert found.gates.tolist() == [[pytest.approx(gate[row].mean().item()) for gate in pair] for pair in gates]


def test_weights_times_values_are_the_layers_output(golden_model: Lion, photo: Image.Image) -> None:
    model: Any = golden_model.model
    block = model.aggregator.blocks[0].cross_attn
    inputs: list[tuple] = []
    block.register_forward_hook(lambda module, args, out: inputs.append((*args, out)))
    whole: list[Tensor] = []
    block.record = whole.append
    golden_model.caption(photo)
    [(x, tap, out)], [weights] = inputs, whole
    values = rearrange(block.v(tap), "b n (h e) -> b h n e", h=block.heads)
    mixed = rearrange(weights @ values, "b h t e -> b t (h e)")
    torch.testing.assert_close(block.norm(x + block.o(mixed)), out, atol=1e-5, rtol=0)


def test_the_answer_is_the_usual_one_and_nothing_stays(golden_model: Lion, photo: Image.Image) -> None:
    [usual] = golden_model.respond([photo], [ASKED], ["image"], GENERATION["answer"])
    found = explain(golden_model, photo, ASKED, "image", GENERATION["answer"])
    assert (found.answer.text, found.answer.tags) == (usual.text, usual.tags)
    with pytest.raises(ValueError, match="soft prompt"):
        explain(golden_model, photo, "a <extra_id_0>", "image", GENERATION["answer"])
    assert not golden_model.model.t5.lm_head._forward_hooks
    assert all(getattr(module, "record", None) is None for module in golden_model.model.modules())
    model: Any = golden_model.model
    with pytest.raises(ZeroDivisionError), recorded([block := model.aggregator.blocks[0].cross_attn]):
        1 / 0  # noqa: B018
    assert block.record is None


@pytest.mark.parametrize("settings", ["official", "locate"])
@pytest.mark.parametrize("size", [(1, 1), (9, 400), (3000, 20), (640, 480)])
def test_the_sheet(golden_model: Lion, size: tuple[int, int], settings: str) -> None:
    """One width for every picture, and beams or a box in the answer change nothing."""
    picture = Image.effect_noise(size, 80).convert("RGB")
    found = explain(golden_model, picture, ASKED, "region", GENERATION[settings])
    assert found.shares.shape == (len(found.tokens), len(SOURCES))
    sheet = draw_explanation(picture, found)
    assert sheet.width == 1200
    assert 400 < sheet.height < 1000 + 20 * len(found.tokens)
    assert len(sheet.getcolors(2**20) or ()) > 10
    assert json.loads(json.dumps(found.to_json()))["sources"] == [*SOURCES]


@pytest.mark.parametrize("changes", [{"visual_input": "image"}, {"visual_input": "region", "tags": "none"}])
def test_parts_that_a_model_lacks(photo: Image.Image, changes: dict[str, Any]) -> None:
    """They have no share and no maps."""
    tiny = Lion.from_pretrained("tiny")
    randomise(model := LionModel(replace(tiny.config, **changes)).eval())
    found = explain(Lion(model, tiny.text), photo, "What is it?", "image", GENERATION["answer"], [["red", "grass"]])
    queries, region, tagged = bool(model.qformer), bool(model.aggregator), model.config.tags != "none"
    assert [bool(share) for share in found.shares.sum(0)] == [queries, region, tagged, True]
    torch.testing.assert_close(found.shares.sum(-1), torch.ones(len(found.tokens)))
    assert (len(found.queries), found.taps.shape[1]) == (3 * queries, 3 * region)


def test_from_the_command_line(golden_folder: Path, tmp_path: Path) -> None:
    flags = ["--weights", str(golden_folder), "--explain", "--out", str(tmp_path), "--dtype", "float32"]
    assert infer.main([str(PHOTO), "--ask", ASKED, *flags]) == 0
    [line] = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert [len(row) for row in line["explanation"]["shares"]] == [4] * len(line["explanation"]["tokens"])
    assert Image.open(tmp_path / "photo-explained.png").width == 1200
    assert infer.main(["--seed", "3", "--explain", "--out", str(tmp_path / "demo")]) == 0
    assert len([*(tmp_path / "demo").glob("scene-*-explained*.png")]) == 5


def test_tags_count_most_where_only_they_tell() -> None:
    """The tiny LION's share on tags: the ground against a box. model/README.md has it for 300 scenes."""
    lion, shares = Lion.from_pretrained("tiny"), {"vqa": 0.0, "rec": 0.0}
    for seed in range(10):
        scene = toy.scene(seed, "test")
        for kind, words in (
            ("vqa", "What is the ground?"),
            ("rec", f"the {scene.things[0].size} {scene.things[0].name}"),
        ):
            question = render(lion.instruction(kind), question=words, expression=words)
            found = explain(lion, scene.image, question, TASK_OF[kind], GENERATION[DECODING[kind]])
            shares[kind] += found.shares[:-1, 2].mean().item() / 10
    assert shares["vqa"] > 1.5 * shares["rec"]
