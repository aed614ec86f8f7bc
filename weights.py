"""Official checkpoints in, official checkpoints out: where every tensor of the release goes, and which are not used.

    python weights.py convert --vit eva_vit_g.pth --t5 flan-t5-xl/ --bert bert-base-uncased/ \\
        --ram ram_swin_large_14m.pth --ram-tags ram_tag_list.txt --ram-thresholds ram_tag_list_threshold.txt \\
        --lion LION-FlanT5-XL.pth --out weights/xl --dtype bfloat16
    python weights.py inspect LION-FlanT5-XL.pth          # every tensor: where it goes, or why it is not used
    python weights.py export weights/xl --out LION.pth    # the trained tensors under the release's names

The tables are the port: official name -> our name, or `-` and why it is not used. `{}` is a number, `*` any rest, and
`(a|b)` stands for two rows. `convert` stops at a tensor without a row, a parameter without a tensor, and a shape that
differs.

Without `--lion` the result is the start of stage 1. The Q-Former comes from `--blip2`, or from BERT's weights in the
`--bert` folder; all else that LION trains is initialised. Without `--ram` tags must be given at run time.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from lion_mini.config import PRESETS, LionConfig
from lion_mini.files import Tensors, atomic_write, read_json, read_text, reading, run, write_shards
from lion_mini.model.lion import skeleton
from lion_mini.pipeline import Lion
from lion_mini.quantize import quantise, to_int8
from lion_mini.text.vocabularies import Vocabularies
from lion_mini.training.start import fresh

Table = dict[str, str]
Place = tuple[str, str | None, str, bool]


def rows(table: Table) -> Table:
    """Write out the alternatives: `(query|key)` on the left goes with `(q|k)` on the right."""
    written = {}
    for row in table.items():
        theirs, ours = (product(*(part.split("|") for part in re.split(r"[()]", name))) for name in row)
        written.update({"".join(left): "".join(right) for left, right in zip(theirs, ours, strict=True)})
    return written


EVA = rows({  # eva_vit_g.pth: models/eva_vit.py
    "blocks.39.*": "- a 40th block; LION stops at the 39th, as BLIP-2 does",
    "cls_token": "vit.cls",
    "pos_embed": "vit.positions",
    "patch_embed.proj.*": "vit.patch_embed.*",
    "blocks.{}.attn.(q_bias|v_bias|qkv.weight)": "vit.blocks.{}.attn.(q_bias|v_bias|qkv.weight)",
    "blocks.{}.(norm1|attn.proj|norm2|mlp.fc1|mlp.fc2).*": "vit.blocks.{}.(norm1|attn.o|norm2|mlp.fc1|mlp.fc2).*",
    "norm.*": "- the final norm of the 40 blocks",
    "fc_norm.*": "- the final norm of the 40 blocks",
    "head.*": "- the head of EVA's own training",
})  # fmt: skip

T5 = rows({  # google/flan-t5-xl, flan-t5-xxl
    "(shared|lm_head).weight": "t5.(shared|lm_head).weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "t5.encoder_bias.weight",
    "encoder.block.{}.layer.0.SelfAttention.(q|k|v|o).weight": "t5.encoder.{}.attn.(q|k|v|o).weight",
    "encoder.block.{}.layer.0.layer_norm.weight": "t5.encoder.{}.attn.norm.weight",
    "encoder.block.{}.layer.1.DenseReluDense.(wi_0|wi_1|wo).weight": "t5.encoder.{}.ff.(wi_0|wi_1|wo).weight",
    "encoder.block.{}.layer.1.layer_norm.weight": "t5.encoder.{}.ff.norm.weight",
    "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "t5.decoder_bias.weight",
    "decoder.block.{}.layer.0.SelfAttention.(q|k|v|o).weight": "t5.decoder.{}.attn.(q|k|v|o).weight",
    "decoder.block.{}.layer.1.EncDecAttention.(q|k|v|o).weight": "t5.decoder.{}.cross_attn.(q|k|v|o).weight",
    "decoder.block.{}.layer.(0|1).layer_norm.weight": "t5.decoder.{}.(attn|cross_attn).norm.weight",
    "decoder.block.{}.layer.2.DenseReluDense.(wi_0|wi_1|wo).weight": "t5.decoder.{}.ff.(wi_0|wi_1|wo).weight",
    "decoder.block.{}.layer.2.layer_norm.weight": "t5.decoder.{}.ff.norm.weight",
    "(encoder|decoder).final_layer_norm.weight": "t5.(encoder|decoder)_norm.weight",
    "encoder.embed_tokens.weight": "- another name of shared.weight",
    "decoder.embed_tokens.weight": "- another name of shared.weight",
})  # fmt: skip

RAM = rows({  # ram_swin_large_14m.pth
    "label_embed": "ram.label_embed",
    "(image_proj|wordvec_proj|fc).*": "ram.(image_proj|wordvec_proj|fc).*",
    "visual_encoder.(patch_embed.proj|patch_embed.norm|norm).*": "ram.swin.(patch_embed.proj|patch_embed.norm|norm).*",
    "visual_encoder.layers.{}.blocks.{}.(norm1|norm2).*": "ram.swin.stages.{}.blocks.{}.(norm1|norm2).*",
    "visual_encoder.layers.{}.blocks.{}.attn.(qkv|proj).*": "ram.swin.stages.{}.blocks.{}.attn.(qkv|o).*",
    "visual_encoder.layers.{}.blocks.{}.attn.relative_position_bias_table":
        "ram.swin.stages.{}.blocks.{}.attn.bias_table",
    "visual_encoder.layers.{}.blocks.{}.mlp.(fc1|fc2).*": "ram.swin.stages.{}.blocks.{}.mlp.(fc1|fc2).*",
    "visual_encoder.layers.{}.downsample.(norm|reduction).*": "ram.swin.stages.{}.merge.(norm|reduction).*",
    "tagging_head.encoder.layer.{}.crossattention.self.(query|key|value).*": "ram.head.{}.cross_attn.(q|k|v).*",
    "tagging_head.encoder.layer.{}.crossattention.output.(dense|LayerNorm).*": "ram.head.{}.cross_attn.(o|norm).*",
    "tagging_head.encoder.layer.{}.intermediate.dense.*": "ram.head.{}.ff.wi.*",
    "tagging_head.encoder.layer.{}.output.(dense|LayerNorm).*": "ram.head.{}.ff.(wo|norm).*",
    "tag_encoder.*": "- writes captions from tags; LION only tags",
    "text_decoder.*": "- writes captions from tags; LION only tags",
    "visual_encoder.layers.{}.blocks.{}.attn.relative_position_index": "- an index that follows from the window size",
    "visual_encoder.layers.{}.blocks.{}.attn_mask": "- a mask that follows from window and image size",
})  # fmt: skip

LION = rows({  # LION-FlanT5-XL.pth, LION-FlanT5-XXL.pth: models/lion_t5.py, Qformer.py, lion_adapters.py
    "query_tokens": "qformer.queries",
    "soft_prompt_hint": "soft_prompt",
    "ln_vision.*": "qformer.image_norm.*",
    "Qformer.bert.embeddings.(word|position)_embeddings.weight": "qformer.(words|positions).weight",
    "Qformer.bert.embeddings.LayerNorm.*": "qformer.norm.*",
    "(Qformer.bert.encoder.layer|fusion_adapter.blocks).{}.(attention|crossattention).self.(query|key|value).*":
        "(qformer.layers|aggregator.blocks).{}.(attn|cross_attn).(q|k|v).*",
    "(Qformer.bert.encoder.layer|fusion_adapter.blocks).{}.(attention|crossattention).output.(dense|LayerNorm).*":
        "(qformer.layers|aggregator.blocks).{}.(attn|cross_attn).(o|norm).*",
    "(Qformer.bert.encoder.layer|fusion_adapter.blocks).{}.(intermediate.dense|output.dense|output.LayerNorm).*":
        "(qformer.layers|aggregator.blocks).{}.ff.(wi|wo|norm).*",
    "Qformer.bert.encoder.layer.{}.intermediate_query.dense.*": "qformer.layers.{}.ff_query.wi.*",
    "Qformer.bert.encoder.layer.{}.output_query.(dense|LayerNorm).*": "qformer.layers.{}.ff_query.(wo|norm).*",
    "t5_proj.*": "qformer.proj.*",
    "ln_adapter.*": "aggregator.norm.*",
    "adapter_proj.(0|2).*": "aggregator.proj.(fc1|fc2).*",
    "t5_model.(encoder.block.{}.layer.1|decoder.block.{}.layer.2).adapter.adapters.{}.(down_proj.*|up_proj.*|scale)":
        "t5.(encoder.{}|decoder.{}).ff.adapters.adapters.{}.(down.*|up.*|scale)",
    "t5_model.(encoder.block.{}.layer.1|decoder.block.{}.layer.2).adapter.(router_ratio1|router_ratio2)":
        "t5.(encoder.{}|decoder.{}).ff.adapters.(gates.0|gates.1)",
    "Qformer.bert.embeddings.position_ids": "- a buffer that counts 0, 1, 2, ...",
})  # fmt: skip
LION |= {  # the frozen parts may be in a LION or BLIP-2 file too
    **{f"visual_encoder.{name}": "- frozen: read from --vit" for name in EVA},
    **{f"t5_model.{name}": "- frozen: read from --t5" for name in T5},
    **{f"ram_model.{name}": "- frozen: read from --ram" for name in RAM},
}
BLIP2 = {theirs: ours for theirs, ours in LION.items() if ours.startswith(("qformer.", "- "))} | {
    "Qformer.cls.*": "- the word head of BLIP-2's first stage",
    "Qformer.bert.pooler.*": "- no part of the Q-Former",
    **dict.fromkeys(("temp", "vision_proj.*", "text_proj.*", "itm_head.*"), "- of BLIP-2's first stage"),
}
BERT = {  # bert-base-uncased: the start of the Q-Former
    theirs.removeprefix("Qformer."): ours
    for theirs, ours in LION.items()
    if theirs.startswith("Qformer.") and "_query" not in theirs and "crossattention" not in theirs
} | {
    "bert.embeddings.token_type_embeddings.weight": "- the Q-Former knows no token types",
    "bert.pooler.*": "- no part of the Q-Former",
    "cls.*": "- the heads of BERT's own training",
}
BERT_QUERIES = {  # its feed-forward layers are the start of the queries' too, as in BLIP-2
    theirs: ours.replace(".ff.", ".ff_query.") if ".ff." in ours else "- read already" for theirs, ours in BERT.items()
}

# BLIP-2 stands before LION, whose table has all its rows: the first of equals counts.
KINDS = {"EVA ViT-g": EVA, "FlanT5": T5, "RAM": RAM, "BLIP-2": BLIP2, "LION": LION, "BERT": BERT}
WORDS = "qformer.words.weight"  # BERT has one word fewer: LION adds [DEC]
# What stage 1 initialises may be missing. BLIP-2's T5 files were trained without reading text.
OPTIONAL = {"BERT": "", "BLIP-2": r"qformer\.(words|positions|layers\.\d+\.ff)\."}
OLDER = {  # parts of names in older files
    "vision_multi.": "tagging_head.", ".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias",
}  # fmt: skip
T5_SIZES = {  # T5Config's name -> the name in FlanT5's config.json
    "width": "d_model", "head_width": "d_kv", "heads": "num_heads", "mlp_width": "d_ff",
    "encoder_depth": "num_layers", "decoder_depth": "num_decoder_layers", "vocab_size": "vocab_size",
}  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}  # of all but linear layers


@cache
def pattern(row: str) -> re.Pattern:
    return re.compile(re.escape(row).replace(r"\{\}", r"(\d+)").replace(r"\*", "(.+)"))


def translate(name: str, table: Table) -> str | None:
    """What the table says about a name; None if no row fits."""
    for theirs, ours in table.items():
        if match := pattern(theirs).fullmatch(name):
            return ours.replace("*", "{}").format(*match.groups())
    return None


def inverted(table: Table) -> Table:
    return {ours: theirs for theirs, ours in table.items() if not ours.startswith("- ")}


OFFICIAL = inverted(EVA) | inverted(T5) | inverted(RAM) | inverted(LION)


def places(source: Tensors, table: Table, plan: Mapping[str, Tensor]) -> Iterator[Place]:
    """For every tensor its name, our name if the model uses it, a line that says so, and whether that is wrong."""
    for name, shape in source.shapes.items():
        ours = translate(name, table) or ""
        if ours not in plan:
            why = f"not used: {ours[2:]}" if ours.startswith("- ") else "UNKNOWN"
            yield name, None, f"{name} {tuple(shape)} {why}", why == "UNKNOWN"
            continue
        wanted = plan[ours].shape
        fewer_words = table is BERT and ours == WORDS and shape[1:] == wanted[1:] and shape[0] < wanted[0]
        wrong = shape != wanted and not fewer_words
        fault = f"  SHAPE DIFFERS: the model has {tuple(wanted)}" if wrong else ""
        yield name, ours, f"{name} {tuple(shape)} -> {ours}{fault}", wrong


def choose_config(path: Path | None, t5: Mapping[str, int]) -> LionConfig:
    """The sizes in the file, or the preset whose T5 fits best."""
    if path is None:
        return min(PRESETS.values(), key=lambda preset: sum(getattr(preset.t5, k) != v for k, v in t5.items()))
    with reading(path):
        return LionConfig.from_json(read_text(path))


# --- convert


def convert(args: argparse.Namespace) -> None:
    # 1. The inputs, and the names and shapes of the model.
    texts, files = inputs(args)
    path = args.t5 / "config.json"
    data = read_json(path) if path.is_file() else {}
    sizes = {ours: data[theirs] for ours, theirs in T5_SIZES.items() if theirs in data}
    config = choose_config(args.config, sizes)
    for name, size in sizes.items():
        if (expected := getattr(config.t5, name)) != size:
            raise ValueError(f"{path}: the T5's {name} is {size}, the model's {expected}: --config gives other sizes")
    config = config if args.ram else replace(config, ram=None)
    Vocabularies.from_files(texts, config)  # raises if one does not fit
    model = skeleton(config)
    plan = model.state_dict()

    # 2. Every parameter is in a file, or is initialised.
    filled: dict[str, tuple[Tensors, str]] = {}
    for path, table in files:
        source = Tensors(path, OLDER)
        for name, ours, line, wrong in places(source, table, plan):
            if wrong:
                raise ValueError(f"{path} does not fit: {line}; do the files belong to one size (XL or XXL)?")
            if ours is not None:
                filled[ours] = source, name
    torch.manual_seed(0)  # the same files make the same start
    new = {} if args.lion else {name: tensor for name, tensor in fresh(config, model) if name not in filled}
    if missing := [name for name in plan if name not in filled and name not in new]:
        name = translate(missing[0], OFFICIAL) or missing[0]
        raise ValueError(f"no file holds {name}, and {len(missing) - 1} more are missing")
    if new:
        parts = ", ".join(sorted({name.split(".")[0] for name in new}))
        print(f"no --lion: {len(new)} tensors of {parts} are freshly initialised, for stage 1")

    # 3. Write shard by shard. In int8 the scale of a weight comes after it.
    int8, dtype = args.dtype == "int8", DTYPES[args.dtype]
    model.to(dtype)
    if int8:
        to_int8(model)
    layout, scales = model.state_dict(), dict[str, Tensor]()

    def read(ours: str) -> Tensor:
        if ours in scales:
            return scales.pop(ours)
        tensor = new[ours] if ours in new else read_checked(*filled[ours])
        if ours == WORDS and len(tensor) < len(plan[ours]):
            tensor = torch.cat((tensor, 0.02 * torch.randn(len(plan[ours]) - len(tensor), tensor.shape[1])))
        if layout[ours].dtype == torch.int8:
            tensor, scales[f"{ours.removesuffix('weight')}scale"] = quantise(tensor, dtype)
        return tensor

    with atomic_write(args.out) as folder:
        folder.mkdir()
        for name, path in zip(Vocabularies.FILES, texts, strict=False):
            (folder / name).write_bytes(path.read_bytes())
        (folder / "config.json").write_text(config.to_json(), encoding="utf-8")
        write_shards(folder, layout, read, limit=2**29 if int8 else 2**30)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: {len(plan)} tensors, {size / 1e9:.2f} GB in {args.dtype}")


def inputs(args: argparse.Namespace) -> tuple[list[Path], list[tuple[Path, Table]]]:
    """The text files, and the checkpoints with their tables: a later one replaces tensors of an earlier one."""
    if args.dtype not in DTYPES:
        why = "T5 overflows in float16; " if args.dtype == "float16" else ""
        raise ValueError(f"--dtype {args.dtype}: {why}there are {', '.join(DTYPES)}")
    tagger = args.ram, args.ram_tags, args.ram_thresholds
    if any(tagger) and not all(tagger):
        raise ValueError("--ram needs --ram-tags and --ram-thresholds, the two text files beside it: give all or none")
    if args.lion and args.blip2:
        raise ValueError(f"--blip2 {args.blip2} starts a Q-Former, which --lion has trained: give one of the two")
    if args.out.exists():
        raise ValueError(f"--out {args.out} exists already: remove it or choose another")
    texts = [args.bert / "vocab.txt", args.t5 / "tokenizer.json", *(tagger[1:] if args.ram else ())]
    for path in [*texts, args.config or args.t5 / "config.json"]:
        if not path.is_file():
            raise ValueError(f"{path}: no such file; README.md, Porting, lists what to download")
    files = [(args.vit, EVA), (args.t5, T5)]
    if any((args.bert / name).is_file() for name in ("model.safetensors", "pytorch_model.bin")) and not args.lion:
        files += [(args.bert, BERT), (args.bert, BERT_QUERIES)]
    optional = (args.ram, RAM), (args.blip2, BLIP2), (args.lion, LION)
    return texts, files + [(path, table) for path, table in optional if path]


def read_checked(source: Tensors, name: str) -> Tensor:
    tensor = source.read(name)
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{source.path}: {name} holds NaN or infinite values")
    if name == "label_embed" and not tensor.any():
        raise ValueError(f"{source.path}: label_embed is all zero, so RAM would give every image the same tags")
    return tensor


# --- inspect, export


def inspect(args: argparse.Namespace) -> int:
    """Print every tensor's place; returns 1 if a tensor is unknown or missing."""
    config = args.path / "config.json"
    if config.is_file() and "vit" in read_json(config):
        return inspect_converted(args.path)
    source = Tensors(args.path, OLDER)
    known = {kind: sum(translate(name, table) is not None for name in source.shapes) for kind, table in KINDS.items()}
    kind = max(known, key=lambda kind: known[kind])
    if not known[kind]:
        raise ValueError(f"{args.path}: none of its {len(source.shapes)} tensors has a name of an official file")
    print(f"{args.path}: {kind}, {len(source.shapes)} tensors")
    width = source.shapes.get("shared.weight", ())[-1:] or source.shapes.get("t5_proj.weight", ())[:1]
    plan = skeleton(choose_config(args.config, dict(zip(["width"], width, strict=False)))).state_dict()
    problems, filled = 0, set[str | None]([None])
    for _, ours, line, wrong in places(source, KINDS[kind], plan):
        print(line)
        problems += wrong
        filled.add(ours)
    for ours in plan:
        theirs = translate(ours, inverted(KINDS[kind]))
        if theirs is not None and ours not in filled:
            optional = kind in OPTIONAL and re.match(OPTIONAL[kind], ours) is not None
            print(f"{theirs} {'not there' if optional else 'MISSING'}, for {ours}")
            problems += not optional
    print(f"{len(filled) - 1} used, {len(source.shapes) - len(filled) + 1} not, {problems} problems")
    return int(problems > 0)


def inspect_converted(folder: Path) -> int:
    model = Lion.from_pretrained(folder, dtype=None).model
    plan, unknown = skeleton(model.config).state_dict(), 0
    for name, tensor in model.state_dict().items():
        theirs = translate(name if name in plan else f"{name.removesuffix('scale')}weight", OFFICIAL)
        place = f"from {theirs}" if theirs else "UNKNOWN: the release has no such tensor"
        print(f"{name} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} {place}")
        unknown += theirs is None
    count = sum(tensor.numel() for tensor in plan.values())
    print(f"{folder}: a whole LION, {len(model.state_dict())} tensors, {count / 1e6:.1f} M parameters")
    return int(unknown > 0)


def export(args: argparse.Namespace) -> None:
    """Write the release's file of trained tensors, with the buffer that its code expects."""
    if args.out.exists():
        raise ValueError(f"--out {args.out} exists already: remove it or choose another")
    model, tensors = Lion.from_pretrained(args.folder, dtype=None).model, {}
    for ours, tensor in model.state_dict().items():
        if tensor.dtype == torch.int8:
            raise ValueError(f"{args.folder} is rounded to int8: export the folder or files that it was made of")
        if translate(ours, OFFICIAL) is None:
            raise ValueError(f"{args.folder}: the release has no tensor for {ours}, so it cannot be exported")
        if theirs := translate(ours, inverted(LION)):
            tensors[theirs] = tensor
    if model.qformer is not None:
        tensors["Qformer.bert.embeddings.position_ids"] = torch.arange(model.config.qformer.max_positions)[None]
    with atomic_write(args.out) as file:
        torch.save({"model": tensors}, file)
    print(f"{args.out}: {len(tensors)} tensors under the release's names")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="convert | inspect | export")
    command = commands.add_parser("convert", help="official files to a folder that Lion.from_pretrained opens")
    for flag, text in {
        "vit": "eva_vit_g.pth", "t5": "folder of FlanT5", "out": "the folder to make",
        "bert": "folder of bert-base-uncased; vocab.txt is enough with --lion or --blip2",
        "ram": "ram_swin_large_14m.pth", "ram-tags": "ram_tag_list.txt", "ram-thresholds": "ram_tag_list_threshold.txt",
        "lion": "LION-FlanT5-XL.pth or LION-FlanT5-XXL.pth",
        "blip2": "BLIP-2 or InstructBLIP FlanT5, for stage 1 where there is no --lion",
        "config": "a LionConfig as JSON, for other sizes than XL and XXL",
    }.items():  # fmt: skip
        command.add_argument(f"--{flag}", type=Path, required=flag in ("vit", "t5", "bert", "out"), help=text)
    command.add_argument("--dtype", default="float32", help="float32 (default), bfloat16 or int8")
    command = commands.add_parser("inspect", help="where each tensor of a file goes")
    command.add_argument("path", type=Path)
    command.add_argument("--config", type=Path, help="a LionConfig as JSON, for other sizes than XL and XXL")
    command = commands.add_parser("export", help="a converted or trained folder to the release's LION file")
    command.add_argument("folder", type=Path)
    command.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    return run({"convert": convert, "inspect": inspect, "export": export}[args.command], args)


if __name__ == "__main__":
    sys.exit(main())
