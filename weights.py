"""Official checkpoints in, official checkpoints out: where every tensor of the release goes, and which are not used.

    python weights.py convert --vit eva_vit_g.pth --t5 flan-t5-xl/ --bert bert-base-uncased/ \\
        --ram ram_swin_large_14m.pth --ram-tags ram_tag_list.txt --ram-thresholds ram_tag_list_threshold.txt \\
        --lion LION-FlanT5-XL.pth --out weights/xl --dtype bfloat16
    python weights.py inspect LION-FlanT5-XL.pth          # every tensor: where it goes, or why it is not used
    python weights.py export weights/xl --out LION.pth    # the trained tensors under the release's names

The tables are the port: official name -> our name, or `-` and why it is not used. `{}` is a number, `*` any rest,
`(a|b)` two rows. `convert` stops at a tensor without a row, a parameter without a tensor, and another shape.

Without `--lion` the result begins stages 1 and 2: the Q-Former comes from `--blip2` or from BERT's weights in the
`--bert` folder, all else that LION trains is initialised. Without `--ram` tags must be given at run time.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while PyTorch is imported; `run` handles it again

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, reduce
from itertools import cycle, product
from pathlib import Path

import torch
from torch import Tensor

from lion_mini.config import PRESETS, LionConfig
from lion_mini.files import Tensors, atomic_write, read_json, read_text, reading, run, write_shards
from lion_mini.model.lion import skeleton
from lion_mini.pipeline import Lion
from lion_mini.quantize import quantise, to_int8
from lion_mini.text.prompts import RELEASE
from lion_mini.text.vocabularies import Vocabularies
from lion_mini.training.stages import part_of
from lion_mini.training.start import fresh

Table = dict[str, str]


def expand(table: Table) -> Table:
    """Write out the alternatives: `(query|key)` on the left goes with `(q|k)` on the right."""
    written = Table()
    for row in table.items():
        theirs, ours = (map("".join, product(*(part.split("|") for part in re.split(r"[()]", name)))) for name in row)
        written.update(zip(theirs, cycle(ours)))
    return written


EVA = expand({  # eva_vit_g.pth: models/eva_vit.py
    "blocks.39.*": "- a 40th block; LION stops at the 39th, as BLIP-2 does",
    "(cls_token|pos_embed|patch_embed.proj.*)": "vit.(cls|positions|patch_embed.*)",
    "blocks.{}.attn.(q_bias|v_bias|qkv.weight)": "vit.blocks.{}.attn.(q_bias|v_bias|qkv.weight)",
    "blocks.{}.(norm1|attn.proj|norm2|mlp.fc1|mlp.fc2).*": "vit.blocks.{}.(norm1|attn.o|norm2|mlp.fc1|mlp.fc2).*",
    "(norm|fc_norm|head).*": "- the end of EVA's own training, behind its 40 blocks",
})  # fmt: skip

T5 = expand({  # google/flan-t5-xl, flan-t5-xxl
    "(shared|lm_head).weight": "t5.(shared|lm_head).weight",
    "(encoder|decoder).embed_tokens.weight": "- another name of shared.weight",
    "(encoder|decoder).block.0.layer.0.SelfAttention.relative_attention_bias.weight":
        "t5.(encoder|decoder)_bias.weight",
    "(encoder|decoder).block.{}.layer.0.SelfAttention.(q|k|v|o).weight":
        "t5.(encoder|decoder).{}.attn.(q|k|v|o).weight",
    "decoder.block.{}.layer.1.EncDecAttention.(q|k|v|o).weight": "t5.decoder.{}.cross_attn.(q|k|v|o).weight",
    "(encoder.block.{}.layer.1|decoder.block.{}.layer.2).DenseReluDense.(wi_0|wi_1|wo).weight":
        "t5.(encoder.{}|decoder.{}).ff.(wi_0|wi_1|wo).weight",
    "encoder.block.{}.layer.(0|1).layer_norm.weight": "t5.encoder.{}.(attn|ff).norm.weight",
    "decoder.block.{}.layer.(0|1|2).layer_norm.weight": "t5.decoder.{}.(attn|cross_attn|ff).norm.weight",
    "(encoder|decoder).final_layer_norm.weight": "t5.(encoder|decoder)_norm.weight",
})  # fmt: skip

RAM = expand({  # ram_swin_large_14m.pth
    "(label_embed|image_proj.*|wordvec_proj.*|fc.*)": "ram.(label_embed|image_proj.*|wordvec_proj.*|fc.*)",
    "visual_encoder.(patch_embed.proj|patch_embed.norm|norm).*": "ram.swin.(patch_embed.proj|patch_embed.norm|norm).*",
    "visual_encoder.layers.{}.blocks.{}.(norm1|norm2|attn.qkv|attn.proj|mlp.fc1|mlp.fc2).*":
        "ram.swin.stages.{}.blocks.{}.(norm1|norm2|attn.qkv|attn.o|mlp.fc1|mlp.fc2).*",
    "visual_encoder.layers.{}.blocks.{}.attn.relative_position_bias_table":
        "ram.swin.stages.{}.blocks.{}.attn.bias_table",
    "visual_encoder.layers.{}.downsample.(norm|reduction).*": "ram.swin.stages.{}.merge.(norm|reduction).*",
    "tagging_head.encoder.layer.{}.crossattention.self.(query|key|value).*": "ram.head.{}.cross_attn.(q|k|v).*",
    "tagging_head.encoder.layer.{}.crossattention.output.(dense|LayerNorm).*": "ram.head.{}.cross_attn.(o|norm).*",
    "tagging_head.encoder.layer.{}.intermediate.dense.*": "ram.head.{}.ff.wi.*",
    "tagging_head.encoder.layer.{}.output.(dense|LayerNorm).*": "ram.head.{}.ff.(wo|norm).*",
    "(tag_encoder|text_decoder).*": "- writes captions from tags; LION only tags",
    "visual_encoder.layers.{}.blocks.{}.(attn.relative_position_index|attn_mask)": "- follows from the sizes",
})  # fmt: skip

LION = expand({  # LION-FlanT5-XL.pth, LION-FlanT5-XXL.pth: models/lion_t5.py, Qformer.py, lion_adapters.py
    "(query_tokens|soft_prompt_hint)": "(qformer.queries|soft_prompt)",
    "(ln_vision|t5_proj|ln_adapter).*": "(qformer.image_norm|qformer.proj|aggregator.norm).*",
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
    "adapter_proj.(0|2).*": "aggregator.proj.(fc1|fc2).*",
    "t5_model.(encoder.block.{}.layer.1|decoder.block.{}.layer.2).adapter.adapters.{}.(down_proj.*|up_proj.*|scale)":
        "t5.(encoder.{}|decoder.{}).ff.adapters.adapters.{}.(down.*|up.*|scale)",
    "t5_model.(encoder.block.{}.layer.1|decoder.block.{}.layer.2).adapter.(router_ratio1|router_ratio2)":
        "t5.(encoder.{}|decoder.{}).ff.adapters.(gates.0|gates.1)",
    "Qformer.bert.embeddings.position_ids": "- a buffer that counts 0, 1, 2, ...",
})  # fmt: skip
for flag, part, table in (("vit", "visual_encoder", EVA), ("t5", "t5_model", T5), ("ram", "ram_model", RAM)):
    LION |= {f"{part}.{name}": f"- frozen: read from --{flag}" for name in table}  # in LION's and BLIP-2's files too

BLIP2 = {theirs: ours for theirs, ours in LION.items() if ours.startswith(("qformer.", "- "))} | {
    "Qformer.cls.*": "- the word head of BLIP-2's first stage",
    "Qformer.bert.pooler.*": "- no part of the Q-Former",
    **dict.fromkeys(("temp", "vision_proj.*", "text_proj.*", "itm_head.*"), "- of BLIP-2's first stage"),
}
BERT = {  # bert-base-uncased: the start of the Q-Former
    theirs.removeprefix("Qformer."): ours
    for theirs, ours in BLIP2.items()
    if theirs.startswith("Qformer.") and "_query" not in theirs and "crossattention" not in theirs
} | {
    "bert.embeddings.token_type_embeddings.weight": "- the Q-Former knows no token types",
    "cls.*": "- the heads of BERT's own training",
}
# BLIP-2 stands before LION: the first of equals counts.
CHECKPOINTS = {"EVA ViT-g": EVA, "FlanT5": T5, "RAM": RAM, "BLIP-2": BLIP2, "LION": LION, "BERT": BERT}
WORDS = "qformer.words.weight"  # BERT has one word fewer: LION adds [DEC]
OLD_NAMES = {"vision_multi": "tagging_head", "LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
# The regular expression of a row.
pattern = cache(lambda row: re.compile(re.escape(row).replace(r"\{\}", r"(\d+)").replace(r"\*", "(.+)")))


def translate(name: str, table: Table) -> str | None:
    """What the table says about a name; None if no row fits."""
    for theirs, ours in table.items():
        if match := pattern(theirs).fullmatch(name):
            return ours.replace("*", "{}").format(*match.groups())
    return None


def inverted(table: Table) -> Table:
    return {ours: theirs for theirs, ours in table.items() if not ours.startswith("- ")}


OFFICIAL = inverted(EVA) | inverted(T5) | inverted(RAM) | inverted(LION)


def places(source: Tensors, table: Table, plan: Mapping[str, Tensor]) -> Iterator[tuple[str, str | None, str, bool]]:
    """For every tensor its name, our name if the model uses it, a line that says so, and whether that is wrong."""
    for name, shape in source.shapes.items():
        official = reduce(lambda text, parts: text.replace(*parts), OLD_NAMES.items(), name)
        ours, line = translate(official, table) or "", f"{official} {tuple(shape)}"
        if ours.startswith("- "):
            yield name, None, f"{line} not used: {ours[2:]}", False
        elif ours not in plan:
            yield name, None, f"{line} UNKNOWN", True
        elif shape == plan[ours].shape or (table is BERT and ours == WORDS and shape[1:] == plan[WORDS].shape[1:]):
            yield name, ours, f"{line} -> {ours}", False
        else:
            yield name, ours, f"{line} -> {ours}  SHAPE DIFFERS: the model has {tuple(plan[ours].shape)}", True


def choose_config(path: Path | None, shapes: Mapping[str, torch.Size]) -> LionConfig:
    """The sizes in the file; without one XL or XXL, by the width of T5."""
    if path is None:
        width = shapes.get("shared.weight", ())[-1:] or shapes.get("t5_proj.weight", ())[:1]
        return PRESETS["xxl" if PRESETS["xxl"].t5.width in width else "xl"]
    with reading(path):
        skeleton(config := LionConfig.from_json(read_text(path)))  # raises if its sizes do not fit together
        return config


def convert(args: argparse.Namespace) -> None:
    # 1. The inputs, and the names and shapes of the model.
    files = inputs(args)
    config = choose_config(args.config, Tensors(args.t5).shapes)
    asked = config.instructions or (RELEASE if args.lion else {})
    stage = (config.stage or 3) if args.lion else 0  # 3: a whole LION
    config = replace(config, ram=config.ram if args.ram else None, instructions=asked, stage=stage)
    texts = [args.bert / "vocab.txt", args.t5 / "tokenizer.json", args.ram_tags, args.ram_thresholds]
    if Vocabularies.from_files(texts, config).pieces.drops_spaces:  # raises if one does not fit
        print(f"{texts[1]} drops spaces at the ends of a text, as when saved again: FlanT5's published file keeps them")
    model = skeleton(config)
    plan = model.state_dict()

    # 2. Every parameter is in a file, or is initialised.
    filled: dict[str, tuple[Path, Callable[[str], Tensor], str]] = {}
    for path, table in files:
        for name, ours, line, wrong in places(source := Tensors(path), table, plan):
            if wrong:
                raise ValueError(f"{path} does not fit: {line}; --config gives other sizes than XL and XXL")
            if ours is not None:
                filled[ours] = path, source.read, name
        if table is BERT:  # the queries' feed-forward layers start as BERT's too, as in BLIP-2
            filled |= {ours.replace(".ff.", ".ff_query."): place for ours, place in filled.items() if "qformer" in ours}
    torch.manual_seed(0)  # the same files make the same start
    new = {} if args.lion else {name: tensor for name, tensor in fresh(config, model) if name not in filled}
    if new:
        filled |= {name: (args.out, new.__getitem__, name) for name in new}
        parts = ", ".join(sorted({name.split(".")[0] for name in new}))
        print(f"no --lion: {len(new)} tensors of {parts} are freshly initialised, for stages 1 and 2")
    if missing := [translate(name, OFFICIAL) or name for name in plan if name not in filled]:
        raise ValueError(f"no file holds {missing[0]}, and {len(missing) - 1} more are missing")

    # 3. Write shard by shard. In int8 the scale of a weight comes after it.
    dtype = torch.float32 if args.dtype == "float32" else torch.bfloat16
    model.to(dtype)
    if args.dtype == "int8":
        to_int8(model)
    layout, scales = model.state_dict(), dict[str, Tensor]()

    def read(ours: str) -> Tensor:
        if ours in scales:
            return scales.pop(ours)
        path, load, name = filled[ours]
        tensor = load(name)
        if not tensor.isfinite().all() or (name == "label_embed" and not tensor.any()):
            raise ValueError(f"{path}: {name} is all zero, or holds NaN or infinite values")
        if ours == WORDS:
            tensor = torch.cat((tensor, 0.02 * torch.randn(len(plan[ours]) - len(tensor), tensor.shape[1])))
        if layout[ours].dtype == torch.int8:
            tensor, scales[f"{ours.removesuffix('weight')}scale"] = quantise(tensor, dtype)
        return tensor

    with atomic_write(args.out) as folder:
        folder.mkdir()
        for name, path in zip(Vocabularies.FILES, filter(None, texts), strict=False):
            (folder / name).write_bytes(path.read_bytes())
        (folder / "config.json").write_text(config.to_json(), encoding="utf-8")
        write_shards(folder, layout, read, limit=2**28 if args.dtype == "int8" else 2**30)
    size = sum(file.stat().st_size for file in args.out.iterdir())
    print(f"{args.out}: {len(plan)} tensors, {size / 1e9:.2f} GB in {args.dtype}")


def inputs(args: argparse.Namespace) -> list[tuple[Path, Table]]:
    """The checkpoints with their tables: a later one replaces tensors of an earlier one."""
    if len({path is None for path in (args.ram, args.ram_tags, args.ram_thresholds)}) > 1:
        raise ValueError("--ram needs --ram-tags and --ram-thresholds, the two text files beside it: give all or none")
    if args.lion and args.blip2:
        raise ValueError(f"--blip2 {args.blip2} starts a Q-Former, which --lion has trained: give one of the two")
    if args.out.exists():
        raise ValueError(f"--out {args.out} exists already: remove it or choose another")
    bert = any((args.bert / name).is_file() for name in ("model.safetensors", "pytorch_model.bin")) and not args.lion
    files = (args.vit, EVA), (args.t5, T5), (args.bert if bert else None, BERT), (args.ram, RAM)
    return [(path, table) for path, table in (*files, (args.blip2, BLIP2), (args.lion, LION)) if path]


def inspect(args: argparse.Namespace) -> int:
    """Print every tensor's place; returns 1 if a tensor is unknown or missing."""
    config, problems = args.path / "config.json", 0
    if config.is_file() and "vit" in read_json(config):
        model = Lion.from_pretrained(args.path, dtype=None).model
        for name, tensor in model.state_dict().items():
            theirs = translate(name, OFFICIAL) or translate(re.sub("scale$", "weight", name), OFFICIAL)  # of int8
            place = f"from {theirs}" if theirs else "UNKNOWN: the release has no such tensor"
            print(f"{name} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} {place}")
            problems += theirs is None
        count = sum(parameter.numel() for parameter in skeleton(model.config).parameters())
        what = ("no LION yet", "image level alone", "region level alone", "a whole LION")[min(model.config.stage, 3)]
        print(f"{args.path}: {what}, {len(model.state_dict())} tensors, {count / 1e6:.1f} M parameters")
        return int(problems > 0)
    source = Tensors(args.path)
    known = lambda kind: sum(translate(name, CHECKPOINTS[kind]) is not None for name in source.shapes)
    kind = max(CHECKPOINTS, key=known)
    print(f"{args.path}: {kind}, {len(source.shapes)} tensors")
    plan = skeleton(choose_config(args.config, source.shapes)).state_dict()
    found = list(places(source, CHECKPOINTS[kind], plan))
    print(*(line for _, _, line, _ in found), sep="\n")
    filled, problems = {ours for _, ours, _, _ in found if ours}, sum(wrong for *_, wrong in found)
    for ours in plan:
        if ours not in filled and (theirs := translate(ours, inverted(CHECKPOINTS[kind]))):
            # BLIP-2's T5 files were trained without reading text.
            optional = kind == "BLIP-2" and bool(re.match(r"qformer\.(words|positions|layers\.\d+\.ff)\.", ours))
            print(f"{theirs} {'not there' if optional else 'MISSING'}, for {ours}")
            problems += not optional
    print(f"{len(filled)} used, {len(found) - len(filled)} not, {problems} problems")
    return int(problems > 0)


def export(args: argparse.Namespace) -> None:
    """Write the release's file of trained tensors, with the buffer that its code expects."""
    if args.out.exists():
        raise ValueError(f"--out {args.out} exists already: remove it or choose another")
    model, tensors = Lion.from_pretrained(args.folder, dtype=None).model, {}
    for ours, tensor in model.state_dict().items():
        theirs = translate(ours, inverted(LION))
        if part_of(ours) and (theirs is None or tensor.dtype == torch.int8):
            raise ValueError(f"{args.folder}: the release has no {ours} in {tensor.dtype}, so it cannot be exported")
        if theirs:
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
        "lion": "LION-FlanT5-XL.pth or -XXL.pth", "blip2": "BLIP-2 or InstructBLIP FlanT5, to start stage 1",
        "config": "a LionConfig as JSON, for other sizes than XL and XXL",
    }.items():  # fmt: skip
        command.add_argument(f"--{flag}", type=Path, required=flag in ("vit", "t5", "bert", "out"), help=text)
    command.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "int8"))
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
