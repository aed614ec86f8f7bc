"""The port: nothing of a checkpoint is lost, nothing invented, and a file that is wrong stops with one sentence."""

import itertools
import json
import pickle
import random
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, KEYS, OFFICIAL, convert, relative
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

import weights
from lion_mini import Lion, LionConfig
from lion_mini.config import IGNORE, PRESETS
from lion_mini.files import read_folder, write_shards
from lion_mini.model.lion import skeleton

FILES = {
    size: {
        "eva_vit_g_39_blocks": "EVA",
        f"flan_t5_{size}": "T5",
        "ram_swin_large_14m": "RAM",
        f"lion_flant5_{size}_trainable": "LION",
    }
    for size in ("xl", "xxl")
}
TABLES = ["EVA", "T5", "RAM", "LION"]


def manifest(file: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an official file; a scalar's shape is empty."""
    lines = (KEYS / f"{file}.txt").read_text().splitlines()
    rows = [line.split() for line in lines if not line.startswith("#")]
    return {name: tuple(map(int, shape[0].split("x"))) if shape else () for name, *shape in rows}


def on_meta(config: LionConfig) -> dict[str, Tensor]:
    return skeleton(config).state_dict()


# --- the real sizes, without the files


@pytest.mark.parametrize("size", ["xl", "xxl"])
def test_every_official_tensor_has_a_place_and_every_place_a_tensor(size: str) -> None:
    model = on_meta(PRESETS[size])
    filled: dict[str, str] = {}
    for file, table in FILES[size].items():
        for name, shape in manifest(file).items():
            ours = weights.translate(name, getattr(weights, table))
            assert ours, f"{file}: {name} is in no table"
            if ours.startswith("- "):
                continue
            assert ours in model, f"{file}: {name} leads to {ours}, which is no tensor of the model"
            assert ours not in filled, f"{file}: {name} and {filled[ours]} lead to {ours}"
            assert tuple(model[ours].shape) == shape, f"{file}: {name}"
            filled[ours] = name
    assert set(filled) == set(model)


def test_parameter_counts_are_the_papers() -> None:
    """LION-4B and LION-12B without the tagger, and the part that trains."""
    for size, total, trained in (("xl", 4.117e9, 281.6e6), ("xxl", 12.442e9, 320.4e6)):
        model = {name: tensor.numel() for name, tensor in on_meta(PRESETS[size]).items() if not name.startswith("ram.")}
        assert sum(model.values()) == pytest.approx(total, rel=1e-3)
        ours = [name for name in model if weights.translate(name, weights.inverted(weights.LION))]
        assert sum(model[name] for name in ours) == pytest.approx(trained, rel=1e-3)


def test_no_name_fits_two_rows() -> None:
    """Otherwise the order of a table's rows would matter."""
    for size in FILES:
        for file, table in FILES[size].items():
            for name in manifest(file):
                fits = [row for row in getattr(weights, table) if weights.pattern(row).fullmatch(name)]
                assert len(fits) == 1, (name, fits)


# --- every row matters


def outputs(lion: Lion, numbers: dict[str, Tensor], part: str) -> list[float]:
    """How far one part of the model is from the golden numbers, both batches."""
    model, found = lion.model, []
    for i in (0, 1):
        g = {name.removeprefix(f"s{i}."): value for name, value in numbers.items() if name.startswith(f"s{i}.")}
        taps = [g[f"vit_block{block}"] for block in lion.config.taps]
        if part == "EVA":
            found.append(relative(model.vit(g["image"])[0], g["vit_out"]))
            continue
        assert model.qformer is not None
        assert model.aggregator is not None
        ids = g["bert_input_ids"]
        hidden = model.qformer.attend(g["vit_out"], ids, ids != 0)
        tokens = torch.cat((model.qformer(g["vit_out"], ids, ids != 0), model.aggregator(taps)), dim=1)
        words, mask = model.t5.shared(g["t5_input_ids"]), g["t5_attention_mask"].bool()
        place = g["t5_input_ids"] == lion.text.pieces.special["<extra_id_0>"]
        words = torch.where(place[..., None], model.soft_prompt, words) if model.soft_prompt is not None else words
        mask = torch.nn.functional.pad(mask, (tokens.shape[1], 0), value=True)
        task = torch.full((len(ids),), 1 - i)
        states = model.t5.encode(torch.cat((tokens, words), dim=1), mask, task)
        labels = g["labels"].masked_fill(g["labels"] == 0, IGNORE)
        logits = model.t5.predict(labels, model.t5.start(states, mask, task, labels.shape[1]))
        real = labels != IGNORE
        found += [relative(hidden, g["qformer"]), relative(logits[real], g["logits"][real])]
        found.append((cross_entropy(logits[real], labels[real]) - g["loss"][0]).abs().item())
    return found


@pytest.mark.parametrize("table", TABLES)
def test_swapping_two_rows_is_seen(table: str, golden_model: Lion, numbers: dict[str, Tensor]) -> None:
    """Each pair of rows, their targets swapped: a shape of the real model differs, or a golden number does."""
    official = weights.inverted(getattr(weights, table))
    shapes = [{k: v.shape for k, v in on_meta(PRESETS[size]).items()} for size in ("xl", "xxl")]
    state = golden_model.model.state_dict()

    def names(row: str, of: dict) -> list[str]:
        return [name for name in of if weights.pattern(row).fullmatch(name)]

    def swapped(name: str, a: str, b: str) -> str | None:
        """Where the tensor called `name` would land with the targets of a and b swapped."""
        return weights.translate(name, {a: b, b: a})

    def forward() -> list[float]:
        if table == "RAM":
            assert golden_model.model.ram is not None
            return [
                relative(golden_model.model.ram.swin(numbers["ram.image"]), numbers["ram.swin"]),
                relative(golden_model.model.ram(numbers["ram.image"]), numbers["ram.logits"]),
            ]
        return outputs(golden_model, numbers, table)

    with torch.inference_mode():
        assert all(value < 1e-4 for value in forward())
        tried = 0
        for a, b in itertools.combinations(official, 2):
            if a.count("{}") != b.count("{}") or a.count("*") != b.count("*"):
                continue  # numbers or endings left over: such a row cannot even be read
            places = [(name, swapped(name, a, b)) for row in (a, b) for name in names(row, state)]
            if any(to not in state or state[name].shape != state[to].shape for name, to in places):
                real = [(n, swapped(n, a, b)) for row in (a, b) for n in names(row, shapes[0])]
                assert any(to not in of or of[n] != of[to] for n, to in real for of in shapes), (a, b)
                continue
            before = {name: state[name].clone() for name, _ in places}
            for name, to in places:
                assert to is not None
                state[to].copy_(before[name])
            assert any(not value < 1e-4 for value in forward()), f"{official[a]} and {official[b]} can be swapped"
            for name, value in before.items():
                state[name].copy_(value)
            tried += 1
        assert all(value < 1e-4 for value in forward())
    assert tried > 1


# --- there and back


def test_convert_and_export_give_back_the_official_file(golden_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "LION.pth"
    assert weights.main(["export", str(golden_folder), "--out", str(out)]) == 0
    found = torch.load(out, weights_only=True)["model"]
    expected = torch.load(OFFICIAL / "LION-FlanT5-XL.pth", weights_only=True)["model"]
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name].float(), tensor.float()), name
    assert not list(tmp_path.glob(".*"))


def test_converted_folder_holds_everything(golden_folder: Path) -> None:
    index = json.loads((golden_folder / "model.safetensors.index.json").read_text())
    tensors = load_file(golden_folder / "model-00001-of-00001.safetensors")
    config = Lion.from_pretrained(golden_folder).config
    assert config.stage == 3  # a whole LION
    assert set(index["weight_map"]) == set(tensors) == set(on_meta(config))
    for name in ("config.json", "vocab.txt", "tokenizer.json", "ram_tag_list.txt", "ram_tag_list_threshold.txt"):
        assert (golden_folder / name).is_file()
    eva = torch.load(OFFICIAL / "eva_vit_g.pth", weights_only=True)
    assert torch.equal(tensors["vit.blocks.3.attn.o.weight"], eva["blocks.3.attn.proj.weight"].float())


def test_bfloat16(tmp_path: Path, golden_folder: Path) -> None:
    assert convert(tmp_path / "half", dtype="bfloat16") == 0
    folders = (tmp_path / "half", None), (golden_folder, torch.float32)
    states = [Lion.from_pretrained(folder, dtype=dtype).model.state_dict() for folder, dtype in folders]
    for (name, half), whole in zip(states[0].items(), states[1].values(), strict=True):
        assert half.dtype == torch.bfloat16
        assert torch.equal(half, whole.bfloat16()), name
    assert Lion.from_pretrained(tmp_path / "half").model.t5.shared.weight.dtype == torch.float32


def test_other_layouts_of_the_same_files(tmp_path: Path, golden_folder: Path) -> None:
    """A bare dictionary, the old torch format, one T5 file or sharded .bin, aliases present, frozen parts included."""
    expected = Lion.from_pretrained(golden_folder).model.state_dict()
    t5 = load_file(OFFICIAL / "flan-t5" / "model-00001-of-00002.safetensors")
    t5 |= load_file(OFFICIAL / "flan-t5" / "model-00002-of-00002.safetensors")
    lion = torch.load(OFFICIAL / "LION-FlanT5-XL.pth", weights_only=True)["model"]
    eva = torch.load(OFFICIAL / "eva_vit_g.pth", weights_only=True)
    for name in ("one", "bins"):
        (tmp_path / name).mkdir()
        for text in ("config.json", "tokenizer.json"):
            shutil.copy(OFFICIAL / "flan-t5" / text, tmp_path / name)
    t5["encoder.embed_tokens.weight"] = t5["shared.weight"].clone()
    save_file(t5, tmp_path / "one" / "model.safetensors")
    for i in (0, 1):
        shard = {name: t5[name] for name in sorted(t5)[i::2]}
        torch.save(shard, tmp_path / "bins" / f"pytorch_model-0000{i + 1}-of-00002.bin")
    frozen = {f"visual_encoder.{k}": v for k, v in eva.items()} | {f"t5_model.{k}": v for k, v in t5.items()}
    torch.save(lion | frozen, tmp_path / "lion.pth")
    torch.save({"model": eva}, tmp_path / "eva.pth", _use_new_zipfile_serialization=False)
    for name in ("one", "bins"):
        out = tmp_path / f"out-{name}"
        assert convert(out, t5=tmp_path / name, lion=tmp_path / "lion.pth", vit=tmp_path / "eva.pth") == 0
        found = Lion.from_pretrained(out).model.state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


# --- a start without LION's file


def bert_folder(tmp_path: Path, config: LionConfig, older: bool = False) -> tuple[Path, dict[str, Tensor]]:
    """bert-base-uncased at the golden size: one word fewer than LION has, norms under their old names if asked."""
    width, generator = config.qformer.width, torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in on_meta(config).items():
        theirs = weights.translate(name, weights.inverted(weights.BERT))
        if theirs is not None:
            tensors[theirs] = torch.randn(tensor.shape, generator=generator)
    tensors["bert.embeddings.word_embeddings.weight"] = torch.randn(config.qformer.vocab_size - 1, width)
    tensors["bert.embeddings.token_type_embeddings.weight"] = torch.randn(2, width)
    tensors["cls.predictions.bias"] = torch.randn(config.qformer.vocab_size - 1)
    folder = tmp_path / "bert"
    folder.mkdir()
    shutil.copy(OFFICIAL / "bert-base-uncased" / "vocab.txt", folder)
    renamed = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta") if older else k: v
        for k, v in tensors.items()
    }
    save_file(renamed, folder / "model.safetensors")
    return folder, tensors


@pytest.mark.parametrize("older", [False, True])
def test_stage_1_starts_from_bert(tmp_path: Path, older: bool, capsys: pytest.CaptureFixture) -> None:
    config = LionConfig.from_json((GOLDEN / "sizes.json").read_text())
    folder, bert = bert_folder(tmp_path, config, older)
    assert convert(tmp_path / "out", lion=None, bert=folder, ram=None, ram_tags=None, ram_thresholds=None) == 0
    assert "freshly initialised" in capsys.readouterr().out
    assert convert(tmp_path / "again", lion=None, bert=folder, ram=None, ram_tags=None, ram_thresholds=None) == 0
    assert (tmp_path / "again" / SHARD).read_bytes() == (tmp_path / "out" / SHARD).read_bytes()
    model = Lion.from_pretrained(tmp_path / "out").model
    assert model.ram is None
    assert model.config.stage == 0  # nothing in it is trained
    found = model.state_dict()
    words = bert["bert.embeddings.word_embeddings.weight"]
    assert torch.equal(found["qformer.words.weight"][: len(words)], words)
    assert found["qformer.words.weight"][len(words) :].abs().max() < 0.2
    wi = bert["bert.encoder.layer.1.intermediate.dense.weight"]
    assert torch.equal(found["qformer.layers.1.ff.wi.weight"], wi)
    assert torch.equal(found["qformer.layers.1.ff_query.wi.weight"], wi)
    assert torch.equal(found["qformer.norm.bias"], bert["bert.embeddings.LayerNorm.bias"])
    assert not found["t5.encoder.0.ff.adapters.adapters.1.up.weight"].any()
    assert weights.main(["inspect", str(folder), "--config", str(GOLDEN / "sizes.json")]) == 0  # a word fewer is right


def test_stage_1_starts_from_blip2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lion = torch.load(OFFICIAL / "LION-FlanT5-XL.pth", weights_only=True)["model"]
    blip2 = {k: v for k, v in lion.items() if k.startswith(("Qformer", "query_tokens", "ln_vision", "t5_proj"))}
    torch.save({"model": blip2 | {"Qformer.cls.predictions.bias": torch.zeros(3)}}, tmp_path / "blip2.pth")
    assert convert(tmp_path / "out", lion=None, blip2=tmp_path / "blip2.pth") == 0
    found = Lion.from_pretrained(tmp_path / "out").model.state_dict()
    for name, tensor in blip2.items():
        ours = weights.translate(name, weights.BLIP2) or ""
        assert ours.startswith("- ") or torch.equal(found[ours], tensor.float()), name
    inspected = ["inspect", str(tmp_path / "blip2.pth"), "--config", str(GOLDEN / "sizes.json")]
    capsys.readouterr()
    assert weights.main(inspected) == 0
    out = capsys.readouterr().out
    assert f"BLIP-2, {len(blip2) + 1} tensors" in out
    assert "Qformer.cls.predictions.bias (3,) not used: the word head" in out
    texts = "Qformer.bert.embeddings.word_embeddings.weight"
    torch.save({"model": {k: v for k, v in blip2.items() if k != texts}}, tmp_path / "blip2.pth")  # as trained with T5
    assert weights.main(inspected) == 0
    assert f"{texts} not there" in capsys.readouterr().out
    torch.save({"model": {k: v for k, v in blip2.items() if k != "query_tokens"}}, tmp_path / "blip2.pth")
    assert weights.main(inspected) == 1
    assert "query_tokens MISSING" in capsys.readouterr().out


# --- inspect


def test_inspect(golden_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sizes = ["--config", str(GOLDEN / "sizes.json")]
    assert weights.main(["inspect", str(OFFICIAL / "LION-FlanT5-XL.pth"), *sizes]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("LION, 225 tensors")
    assert "query_tokens (1, 8, 24) -> qformer.queries" in lines
    assert any(line.startswith("Qformer.bert.embeddings.position_ids") and "not used" in line for line in lines)
    for path in ("eva_vit_g.pth", "flan-t5", "ram_swin_large_14m.pth"):
        assert weights.main(["inspect", str(OFFICIAL / path), *sizes]) == 0
    config = LionConfig.from_json((golden_folder / "config.json").read_text())
    folder = shutil.copytree(golden_folder, tmp_path / "folder")
    for stage, words in ((0, "no LION yet"), (1, "image level alone"), (2, "region level alone"), (3, "a whole LION")):
        (folder / "config.json").write_text(replace(config, stage=stage).to_json())
        assert weights.main(["inspect", str(folder)]) == 0
        assert f"folder: {words}, " in capsys.readouterr().out


def test_inspect_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lion = torch.load(OFFICIAL / "LION-FlanT5-XL.pth", weights_only=True)["model"]
    lion["surprise"] = lion.pop("query_tokens")
    torch.save(lion, tmp_path / "lion.pth")
    assert weights.main(["inspect", str(tmp_path / "lion.pth"), "--config", str(GOLDEN / "sizes.json")]) == 1
    out = capsys.readouterr().out
    assert "surprise (1, 8, 24) UNKNOWN" in out
    assert "query_tokens MISSING, for qformer.queries" in out


def test_a_third_task_has_no_official_name(golden_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = shutil.copytree(golden_folder, tmp_path / "three")
    config = LionConfig.from_json((folder / "config.json").read_text())
    config = replace(config, tasks=("region", "image", "video"), adapters=3)
    (folder / "config.json").write_text(config.to_json())
    save_file({name: torch.zeros(tensor.shape) for name, tensor in on_meta(config).items()}, folder / SHARD)
    assert weights.main(["inspect", str(folder)]) == 1
    assert "t5.encoder.0.ff.adapters.gates.2 (3, 24) float32 UNKNOWN" in capsys.readouterr().out
    assert weights.main(["export", str(folder), "--out", str(tmp_path / "lion.pth")]) == 2
    assert "the release has no t5.encoder.0.ff.adapters.gates.2" in capsys.readouterr().err
    assert not (tmp_path / "lion.pth").exists()


# --- wrong files: one sentence, exit code 2, nothing left behind


def changed(tmp_path: Path, file: str, change: Callable[[dict], None]) -> Path:
    data = torch.load(OFFICIAL / file, weights_only=True)
    change(data.get("model", data))
    torch.save(data, tmp_path / file)
    return tmp_path / file


class Evil:
    def __reduce__(self) -> tuple:
        return (print, ("this ran",))


def evil(tmp_path: Path) -> dict:
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"model": Evil()}))
    torch.save({"model": {"query_tokens": torch.zeros(1)}, "config": Evil()}, tmp_path / "evil2.pth")
    return {"lion": tmp_path / "evil2.pth"}


def missing_shard(tmp_path: Path) -> dict:
    shutil.copytree(OFFICIAL / "flan-t5", tmp_path / "t5")
    (tmp_path / "t5" / "model-00002-of-00002.safetensors").unlink()
    return {"t5": tmp_path / "t5"}


def other_t5(tmp_path: Path) -> dict:
    """A T5 that is wider than the one this LION was trained with."""
    sizes = json.loads((GOLDEN / "sizes.json").read_text())
    sizes["t5"]["width"] = 48
    (tmp_path / "sizes.json").write_text(json.dumps(sizes))
    (tmp_path / "t5").mkdir()
    shutil.copy(OFFICIAL / "flan-t5" / "tokenizer.json", tmp_path / "t5")
    wide = on_meta(LionConfig.from_json(json.dumps(sizes)))
    named = {weights.translate(name, weights.inverted(weights.T5)): tensor.shape for name, tensor in wide.items()}
    tensors = {name: torch.ones(shape) for name, shape in named.items() if name is not None}
    save_file(tensors, tmp_path / "t5" / "model.safetensors")
    return {"t5": tmp_path / "t5", "config": tmp_path / "sizes.json"}


def text_file(name: str, flag: str, text: str) -> Callable[[Path], dict]:
    def make(tmp_path: Path) -> dict:
        (tmp_path / name).write_text(text)
        return {flag: tmp_path / name}

    return make


def sizes_with(field: str, value: object) -> Callable[[Path], dict]:
    sizes = inner = json.loads((GOLDEN / "sizes.json").read_text())
    *path, last = field.split(".")
    for name in path:
        inner = inner[name]
    inner[last] = value
    return text_file("c.json", "config", json.dumps(sizes))


def lion_with(change: Callable[[dict], object]) -> Callable[[Path], dict]:
    return lambda tmp_path: {"lion": changed(tmp_path, "LION-FlanT5-XL.pth", change)}  # type: ignore[arg-type]


GATE = "t5_model.encoder.block.0.layer.1.adapter.router_ratio"
BAD = {
    "missing file": (lambda _: {"vit": "nowhere.pth"}, "nowhere.pth: no such file"),
    "missing folder": (lambda _: {"t5": "nowhere"}, "nowhere"),
    "missing shard": (missing_shard, "it names 'model-00002-of-00002.safetensors', which is no file of"),
    "code in a pickle": (evil, "could run code, and is refused"),
    "old pickle": (lambda p: evil(p) and {"lion": p / "evil.pth"}, "evil.pth"),
    "another T5": (other_t5, "soft_prompt_hint (24,) -> soft_prompt  SHAPE DIFFERS: the model has (48,)"),
    "T5 of another size": (lambda p: {"t5": other_t5(p)["t5"]}, "attn.k.weight  SHAPE DIFFERS: the model has (24, 24)"),
    "shape": (lion_with(lambda d: d.update(query_tokens=torch.zeros(1, 9, 24))), "qformer.queries  SHAPE DIFFERS: the"),
    "unknown": (lion_with(lambda d: d.update(surprise=torch.zeros(2))), "XL.pth does not fit: surprise (2,) UNKNOWN"),
    "third gate": (lion_with(lambda d: d.update({f"{GATE}3": torch.zeros(2, 24)})), f"{GATE}3 (2, 24) UNKNOWN"),
    "missing": (lion_with(lambda d: d.pop("ln_vision.bias")), "no file holds ln_vision.bias"),
    "NaN": (lion_with(lambda d: d["t5_proj.bias"].fill_(torch.nan)), "t5_proj.bias is all zero, or holds NaN"),
    "not a tensor": (lion_with(lambda d: d.update(query_tokens="x")), "query_tokens must be Tensor, found 'x'"),
    "label_embed": (
        lambda p: {"ram": changed(p, "ram_swin_large_14m.pth", lambda d: d["label_embed"].zero_())},
        "label_embed is all zero, or",
    ),
    "gguf": (text_file("lion.gguf", "lion", "GGUF"), "lion.gguf: a checkpoint is a .pth, .pt, .bin"),
    "no tags": (text_file("tags.txt", "ram_tags", ""), "tags.txt: it is empty"),
    "few tags": (text_file("tags.txt", "ram_tags", "a\nb\n"), "tags.txt has 2 lines, the model needs 24"),
    "few thresholds": (text_file("t.txt", "ram_thresholds", "0.5\n"), "t.txt has 1 lines, the model needs 24"),
    "thresholds in words": (text_file("t.txt", "ram_thresholds", "high\n" * 24), "t.txt: could not convert"),
    "threshold nan": (text_file("t.txt", "ram_thresholds", "nan\n" * 24), "t.txt: a threshold must be from 0 to 1"),
    "threshold 68": (text_file("t.txt", "ram_thresholds", "68\n" * 24), "t.txt: a threshold must be from 0 to 1"),
    "a page of tags": (text_file("tags.txt", "ram_tags", "<html>\n"), "tags.txt: it is a web page"),
    "whole numbers": (lion_with(lambda d: d.update(query_tokens=d["query_tokens"].int())), "must hold floats"),
    "a bare number": (lion_with(lambda d: d.update(query_tokens=torch.tensor(1.0))), "query_tokens () -> qformer"),
    "config": (text_file("c.json", "config", '{"vit": {"depht": 3}}'), "config.vit.'depht' is unknown"),
    "config nested": (text_file("c.json", "config", "[" * 10**5), "c.json: it is nested too deeply"),
    **{
        f"config {path} {value}": (sizes_with(path, value), f"c.json: {words}")
        for path, value, words in (
            ("vit.width", 0, "config.vit.width must be from 1 to 1000000, not 0"),
            ("t5.heads", -4, "config.t5.heads must be from 1 to 1000000, not -4"),
            ("t5.vocab_size", 10**400, "config.t5.vocab_size must be from 1 to 1000000, not 1000"),
            ("vit.depth", 10**6, "config.vit.depth must be from 1 to 200, not 1000000"),
            ("ram.depths", [10**6], "config.ram.depths must be from 1 to 200, not 1000000"),
            ("ram.depths", [], "config.ram.depths must be a whole number, found None"),
            ("ram.depths", [1], "zip() argument"),
            ("ram.patch_size", 10**6, "integer modulo by zero"),
            ("vit.width", 24.0, "config.vit.width must be a whole number, found 24.0"),
            ("vit.norm_eps", float("nan"), "config.vit.norm_eps must be from 0 to 1, not nan"),
            ("vit.norm_eps", float("inf"), "config.vit.norm_eps must be from 0 to 1, not inf"),
            ("vit.norm_eps", 10**400, "int too large to convert to float"),
            ("qformer.dropout", 1.5, "config.qformer.dropout must be from 0 to 1, not 1.5"),
            ("taps", [], "config.taps must be a whole number, found None"),
            ("tasks", [], "config.tasks must be text, found None"),
            ("stage", -1, "config.stage must be from 0 to 99, not -1"),
            ("ram.image_size", 10**6, "config.ram.image_size must be from 1 to 2048, not 1000000"),
            ("tasks", ["image", "image"], "adapters is 0, 1 or 1 (one per task), not 2"),
            ("instructions", {"vqa": 3}, "instructions.vqa must be text, found 3"),
            ("instructions", {"vqa": "Answer it."}, "vqa 'Answer it.' must have the same fields as 'Question: {que"),
            ("instructions", {"caption": " "}, "caption ' ' must have the same fields as 'A short image"),
            ("instructions", {"recc": "{expression}"}, "the task 'recc' is unknown; there are caption, vqa"),
        )
    },
    "no thresholds": (lambda _: {"ram_thresholds": None}, "--ram needs --ram-tags and --ram-thresholds"),
    "no tagger": (lambda _: {"ram": None}, "--ram needs --ram-tags and --ram-thresholds"),
    "two Q-Formers": (lambda _: {"blip2": OFFICIAL / "LION-FlanT5-XL.pth"}, "give one of the two"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make, words = BAD[name]
    changes = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert convert(tmp_path / "out", **changes) == 2
    out, error = capsys.readouterr()
    assert words in error
    assert "this ran" not in out
    said = [line for line in error.splitlines() if not line.startswith("convert:")]
    assert len(said) == 1, error
    assert sorted(tmp_path.iterdir()) == before


def test_what_a_killed_conversion_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".out.new").mkdir()
    (tmp_path / ".out.new" / SHARD).write_bytes(b"half")
    assert convert(tmp_path / "out") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("command", ["convert", "export"])
def test_a_full_disk(command: str, golden_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # no file may be larger
    try:
        export = ["export", str(golden_folder), "--out", str(tmp_path / "out")]
        assert (convert(tmp_path / "out") if command == "convert" else weights.main(export)) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("convert:")]
    assert len(said) == 1
    assert said[0].startswith(f"weights.py: {tmp_path / 'out'}: it cannot be written, is the disk full?")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    assert convert(tmp_path / "out") == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "out" / "precious").read_text() == "x"


SHARD = "model-00001-of-00001.safetensors"


def resaved(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / SHARD)
        change(tensors)
        save_file(tensors, folder / SHARD)

    return damage


DAMAGES: dict[str, Callable[[Path], object]] = {
    "has no config.json: it is not a folder of": lambda f: (f / "config.json").unlink(),
    "no folder with .safetensors files": lambda f: (f / SHARD).unlink(),
    "is not a whole checkpoint": lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-50]),
    "soft_prompt is missing": resaved(lambda t: t.pop("soft_prompt")),
    r"x is \(1,\) here and missing in the model": resaved(lambda t: t.update(x=torch.zeros(1))),
    r"soft_prompt is \(1,\) here and \(24,\) in the model": resaved(lambda t: t.update(soft_prompt=torch.zeros(1))),
    "config.json: config.t5.width must be from 1": lambda f: (f / "config.json").write_text('{"t5": {"width": 0}}'),
    "config.json: stage 0 of Swin has": lambda f: (f / "config.json").write_text(
        (f / "config.json").read_text().replace('"window": 4', '"window": 3')
    ),
    "must hold floats, not torch.bool": resaved(lambda t: t.update(soft_prompt=t["soft_prompt"] > 0)),
    "vocab.txt has 6 lines": lambda f: (f / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n"),
}


@pytest.mark.parametrize("words", DAMAGES)
def test_a_damaged_converted_folder(words: str, tmp_path: Path, golden_folder: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(golden_folder, folder)
    DAMAGES[words](folder)
    with pytest.raises(ValueError, match=words):
        Lion.from_pretrained(folder)


def test_half_precision_is_refused(golden_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        convert(tmp_path / "out", dtype="float16")
    assert "invalid choice: 'float16'" in capsys.readouterr().err
    for dtype in (torch.float16, torch.int8, torch.complex64):
        with pytest.raises(ValueError, match=f"T5 may overflow in {dtype}: give float32, bfloat16"):
            Lion.from_pretrained(golden_folder, dtype=dtype)
    for device in ("meta", "mars", "cuda:99", ""):
        with pytest.raises(ValueError, match=f"the device '{device}' cannot be used, cpu always can"):
            Lion.from_pretrained(golden_folder, device=device)


def test_mapped_tensors_are_those_of_the_file(tmp_path: Path) -> None:
    """Every dtype, also on odd addresses."""
    kinds = (torch.int8, torch.bfloat16, torch.float16, torch.float32)
    plan = {f"{i}.{kind}": torch.empty(3, i + 1, dtype=kind) for i in range(3) for kind in kinds}
    plan["scalar"] = torch.empty((), dtype=torch.float32)
    values = {name: (torch.randn(like.shape) * 9).to(like.dtype) for name, like in plan.items()}
    write_shards(tmp_path, plan, values.__getitem__, limit=60)
    assert [file.stat().st_size < 60 + 700 for file in tmp_path.glob("*.safetensors")] == [True] * 3
    found = read_folder(tmp_path, "cpu", None)
    assert set(found) == set(plan)
    for name, tensor in found.items():
        assert tensor.dtype == plan[name].dtype
        assert torch.equal(tensor, values[name])
    found["scalar"].fill_(7)  # training writes into what it has read, not into the file
    assert torch.equal(read_folder(tmp_path, "cpu", None)["scalar"], values["scalar"])


TRUNCATED = {
    "pth": ("lion", "LION-FlanT5-XL.pth"),
    "safetensors": ("t5", "flan-t5/model-00002-of-00002.safetensors"),
    "bin": ("bert", "bert/pytorch_model.bin"),
    "tokenizer.json": ("t5", "flan-t5/tokenizer.json"),
    "vocab.txt": ("bert", "bert-base-uncased/vocab.txt"),
    "tags": ("ram_tags", "ram_tag_list.txt"),
    "thresholds": ("ram_thresholds", "ram_tag_list_threshold.txt"),
}


@pytest.mark.parametrize("kind", TRUNCATED)
def test_a_truncated_file_is_one_sentence(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(OFFICIAL, tmp_path, dirs_exist_ok=True)
    flag, name = TRUNCATED[kind]
    path = tmp_path / name
    changes: dict[str, object] = {flag: path.parent if "/" in name else path}
    if kind == "bin":
        torch.save(bert_folder(tmp_path, LionConfig.from_json((GOLDEN / "sizes.json").read_text()))[1], path)
        (path.parent / "model.safetensors").unlink()
        changes["lion"] = None
    whole = path.read_bytes()
    for length in random.Random(0).sample(range(len(whole)), 10):
        path.write_bytes(whole[:length])
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        code = convert(tmp_path / "out", **changes)
        said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("convert:")]
        in_last_line = path.suffix == ".txt" and whole[:length].count(b"\n") == whole.count(b"\n")  # a valid list too
        assert (code, len(said)) == (2, 1) or (code == 0 and in_last_line), said
        assert code == 0 or (path.name in said[0] and "LION_DEBUG" not in said[0]), said


def test_sizes_that_no_shape_shows() -> None:
    """Of the published models: with others their weights would load, and answer wrongly."""
    for sizes in (PRESETS["xl"], PRESETS["xxl"]):
        heads = sizes.vit.heads, sizes.qformer.heads, sizes.aggregator.heads
        assert (*heads, sizes.taps, sizes.t5.max_distance) == (16, 12, 16, (38, 28, 18), 128)
        assert (sizes.vit.norm_eps, sizes.qformer.norm_eps, sizes.t5.norm_eps) == (1e-6, 1e-12, 1e-6)
        assert sizes.ram is not None
        assert sizes.ram.head.heads == 4
