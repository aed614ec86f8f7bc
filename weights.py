"""Official checkpoints in, official checkpoints out: where every tensor of the release goes, and why some do not.

    python weights.py convert --vit eva_vit_g.pth --t5 flan-t5-xl/ --bert bert-base-uncased/ \\
        --ram ram_swin_large_14m.pth --ram-tags ram_tag_list.txt --ram-thresholds ram_tag_list_threshold.txt \\
        --lion LION-FlanT5-XL.pth --out weights/xl --dtype bfloat16
    python weights.py inspect LION-FlanT5-XL.pth          # every tensor: where it goes, or why it is not used
    python weights.py export weights/xl --out LION.pth    # the trained tensors under the release's names

The tables below are the port: official name -> our name, `{}` a number, `*` any rest. A tensor that no table knows, a
parameter that no tensor fills, a shape that differs, a second tensor for one place: each stops the conversion and is
named. Without `--lion` the result is the start of stage 1: the Q-Former from `--blip2` or from BERT's own weights in
the `--bert` folder, the other parts that LION trains fresh. Without `--ram` tags must be given at run time.

Tensors travel one at a time, so memory stays far below a model's size; the folder appears when it is whole.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lion_mini.config import PRESETS, LionConfig, T5Config
from lion_mini.files import Tensors, atomic_write, read_json, write_shards
from lion_mini.model.lion import LionModel
from lion_mini.pipeline import Lion
from lion_mini.quantize import quantise, to_int8
from lion_mini.text.vocabularies import Vocabularies
from lion_mini.training.start import fresh

Table = Mapping[str, str]

EVA = {  # eva_vit_g.pth, as models/eva_vit.py reads it
    "cls_token": "vit.cls",
    "pos_embed": "vit.positions",
    "patch_embed.proj.*": "vit.patch_embed.*",
    "blocks.{}.norm1.*": "vit.blocks.{}.norm1.*",
    "blocks.{}.attn.q_bias": "vit.blocks.{}.attn.q_bias",
    "blocks.{}.attn.v_bias": "vit.blocks.{}.attn.v_bias",
    "blocks.{}.attn.qkv.weight": "vit.blocks.{}.attn.qkv.weight",
    "blocks.{}.attn.proj.*": "vit.blocks.{}.attn.o.*",
    "blocks.{}.norm2.*": "vit.blocks.{}.norm2.*",
    "blocks.{}.mlp.fc1.*": "vit.blocks.{}.mlp.fc1.*",
    "blocks.{}.mlp.fc2.*": "vit.blocks.{}.mlp.fc2.*",
}
EVA_UNUSED = {
    "blocks.39.*": "a 40th block; LION stops at the 39th, as BLIP-2 does",
    "norm.*": "the final norm of the 40 blocks",
    "fc_norm.*": "the final norm of the 40 blocks",
    "head.*": "the head of EVA's own training",
}

T5 = {  # google/flan-t5-xl, flan-t5-xxl
    "shared.weight": "t5.shared.weight",
    "lm_head.weight": "t5.lm_head.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "t5.encoder_bias.weight",
    "encoder.block.{}.layer.0.SelfAttention.q.weight": "t5.encoder.{}.attn.q.weight",
    "encoder.block.{}.layer.0.SelfAttention.k.weight": "t5.encoder.{}.attn.k.weight",
    "encoder.block.{}.layer.0.SelfAttention.v.weight": "t5.encoder.{}.attn.v.weight",
    "encoder.block.{}.layer.0.SelfAttention.o.weight": "t5.encoder.{}.attn.o.weight",
    "encoder.block.{}.layer.0.layer_norm.weight": "t5.encoder.{}.attn.norm.weight",
    "encoder.block.{}.layer.1.DenseReluDense.wi_0.weight": "t5.encoder.{}.ff.wi_0.weight",
    "encoder.block.{}.layer.1.DenseReluDense.wi_1.weight": "t5.encoder.{}.ff.wi_1.weight",
    "encoder.block.{}.layer.1.DenseReluDense.wo.weight": "t5.encoder.{}.ff.wo.weight",
    "encoder.block.{}.layer.1.layer_norm.weight": "t5.encoder.{}.ff.norm.weight",
    "encoder.final_layer_norm.weight": "t5.encoder_norm.weight",
    "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "t5.decoder_bias.weight",
    "decoder.block.{}.layer.0.SelfAttention.q.weight": "t5.decoder.{}.attn.q.weight",
    "decoder.block.{}.layer.0.SelfAttention.k.weight": "t5.decoder.{}.attn.k.weight",
    "decoder.block.{}.layer.0.SelfAttention.v.weight": "t5.decoder.{}.attn.v.weight",
    "decoder.block.{}.layer.0.SelfAttention.o.weight": "t5.decoder.{}.attn.o.weight",
    "decoder.block.{}.layer.0.layer_norm.weight": "t5.decoder.{}.attn.norm.weight",
    "decoder.block.{}.layer.1.EncDecAttention.q.weight": "t5.decoder.{}.cross_attn.q.weight",
    "decoder.block.{}.layer.1.EncDecAttention.k.weight": "t5.decoder.{}.cross_attn.k.weight",
    "decoder.block.{}.layer.1.EncDecAttention.v.weight": "t5.decoder.{}.cross_attn.v.weight",
    "decoder.block.{}.layer.1.EncDecAttention.o.weight": "t5.decoder.{}.cross_attn.o.weight",
    "decoder.block.{}.layer.1.layer_norm.weight": "t5.decoder.{}.cross_attn.norm.weight",
    "decoder.block.{}.layer.2.DenseReluDense.wi_0.weight": "t5.decoder.{}.ff.wi_0.weight",
    "decoder.block.{}.layer.2.DenseReluDense.wi_1.weight": "t5.decoder.{}.ff.wi_1.weight",
    "decoder.block.{}.layer.2.DenseReluDense.wo.weight": "t5.decoder.{}.ff.wo.weight",
    "decoder.block.{}.layer.2.layer_norm.weight": "t5.decoder.{}.ff.norm.weight",
    "decoder.final_layer_norm.weight": "t5.decoder_norm.weight",
}
T5_UNUSED = {
    "encoder.embed_tokens.weight": "another name of shared.weight",
    "decoder.embed_tokens.weight": "another name of shared.weight",
}

RAM = {  # ram_swin_large_14m.pth
    "label_embed": "ram.label_embed",
    "image_proj.*": "ram.image_proj.*",
    "wordvec_proj.*": "ram.wordvec_proj.*",
    "fc.*": "ram.fc.*",
    "visual_encoder.patch_embed.proj.*": "ram.swin.patch_embed.proj.*",
    "visual_encoder.patch_embed.norm.*": "ram.swin.patch_embed.norm.*",
    "visual_encoder.layers.{}.blocks.{}.norm1.*": "ram.swin.stages.{}.blocks.{}.norm1.*",
    "visual_encoder.layers.{}.blocks.{}.attn.qkv.*": "ram.swin.stages.{}.blocks.{}.attn.qkv.*",
    "visual_encoder.layers.{}.blocks.{}.attn.relative_position_bias_table": (
        "ram.swin.stages.{}.blocks.{}.attn.bias_table"
    ),
    "visual_encoder.layers.{}.blocks.{}.attn.proj.*": "ram.swin.stages.{}.blocks.{}.attn.o.*",
    "visual_encoder.layers.{}.blocks.{}.norm2.*": "ram.swin.stages.{}.blocks.{}.norm2.*",
    "visual_encoder.layers.{}.blocks.{}.mlp.fc1.*": "ram.swin.stages.{}.blocks.{}.mlp.fc1.*",
    "visual_encoder.layers.{}.blocks.{}.mlp.fc2.*": "ram.swin.stages.{}.blocks.{}.mlp.fc2.*",
    "visual_encoder.layers.{}.downsample.norm.*": "ram.swin.stages.{}.merge.norm.*",
    "visual_encoder.layers.{}.downsample.reduction.weight": "ram.swin.stages.{}.merge.reduction.weight",
    "visual_encoder.norm.*": "ram.swin.norm.*",
    "tagging_head.encoder.layer.{}.crossattention.self.query.*": "ram.head.{}.cross_attn.q.*",
    "tagging_head.encoder.layer.{}.crossattention.self.key.*": "ram.head.{}.cross_attn.k.*",
    "tagging_head.encoder.layer.{}.crossattention.self.value.*": "ram.head.{}.cross_attn.v.*",
    "tagging_head.encoder.layer.{}.crossattention.output.dense.*": "ram.head.{}.cross_attn.o.*",
    "tagging_head.encoder.layer.{}.crossattention.output.LayerNorm.*": "ram.head.{}.cross_attn.norm.*",
    "tagging_head.encoder.layer.{}.intermediate.dense.*": "ram.head.{}.ff.wi.*",
    "tagging_head.encoder.layer.{}.output.dense.*": "ram.head.{}.ff.wo.*",
    "tagging_head.encoder.layer.{}.output.LayerNorm.*": "ram.head.{}.ff.norm.*",
}
RAM_UNUSED = {
    "tag_encoder.*": "writes captions from tags; LION only tags",
    "text_decoder.*": "writes captions from tags; LION only tags",
    "visual_encoder.layers.{}.blocks.{}.attn.relative_position_index": "an index that follows from the window size",
    "visual_encoder.layers.{}.blocks.{}.attn_mask": "a mask that follows from window and image size",
}

LION = {  # LION-FlanT5-XL.pth, LION-FlanT5-XXL.pth: models/lion_t5.py, Qformer.py, lion_adapters.py
    "query_tokens": "qformer.queries",
    "soft_prompt_hint": "soft_prompt",
    "ln_vision.*": "qformer.image_norm.*",
    "Qformer.bert.embeddings.word_embeddings.weight": "qformer.words.weight",
    "Qformer.bert.embeddings.position_embeddings.weight": "qformer.positions.weight",
    "Qformer.bert.embeddings.LayerNorm.*": "qformer.norm.*",
    "Qformer.bert.encoder.layer.{}.attention.self.query.*": "qformer.layers.{}.attn.q.*",
    "Qformer.bert.encoder.layer.{}.attention.self.key.*": "qformer.layers.{}.attn.k.*",
    "Qformer.bert.encoder.layer.{}.attention.self.value.*": "qformer.layers.{}.attn.v.*",
    "Qformer.bert.encoder.layer.{}.attention.output.dense.*": "qformer.layers.{}.attn.o.*",
    "Qformer.bert.encoder.layer.{}.attention.output.LayerNorm.*": "qformer.layers.{}.attn.norm.*",
    "Qformer.bert.encoder.layer.{}.crossattention.self.query.*": "qformer.layers.{}.cross_attn.q.*",
    "Qformer.bert.encoder.layer.{}.crossattention.self.key.*": "qformer.layers.{}.cross_attn.k.*",
    "Qformer.bert.encoder.layer.{}.crossattention.self.value.*": "qformer.layers.{}.cross_attn.v.*",
    "Qformer.bert.encoder.layer.{}.crossattention.output.dense.*": "qformer.layers.{}.cross_attn.o.*",
    "Qformer.bert.encoder.layer.{}.crossattention.output.LayerNorm.*": "qformer.layers.{}.cross_attn.norm.*",
    "Qformer.bert.encoder.layer.{}.intermediate.dense.*": "qformer.layers.{}.ff.wi.*",
    "Qformer.bert.encoder.layer.{}.output.dense.*": "qformer.layers.{}.ff.wo.*",
    "Qformer.bert.encoder.layer.{}.output.LayerNorm.*": "qformer.layers.{}.ff.norm.*",
    "Qformer.bert.encoder.layer.{}.intermediate_query.dense.*": "qformer.layers.{}.ff_query.wi.*",
    "Qformer.bert.encoder.layer.{}.output_query.dense.*": "qformer.layers.{}.ff_query.wo.*",
    "Qformer.bert.encoder.layer.{}.output_query.LayerNorm.*": "qformer.layers.{}.ff_query.norm.*",
    "t5_proj.*": "qformer.proj.*",
    "fusion_adapter.blocks.{}.attention.self.query.*": "aggregator.blocks.{}.attn.q.*",
    "fusion_adapter.blocks.{}.attention.self.key.*": "aggregator.blocks.{}.attn.k.*",
    "fusion_adapter.blocks.{}.attention.self.value.*": "aggregator.blocks.{}.attn.v.*",
    "fusion_adapter.blocks.{}.attention.output.dense.*": "aggregator.blocks.{}.attn.o.*",
    "fusion_adapter.blocks.{}.attention.output.LayerNorm.*": "aggregator.blocks.{}.attn.norm.*",
    "fusion_adapter.blocks.{}.crossattention.self.query.*": "aggregator.blocks.{}.cross_attn.q.*",
    "fusion_adapter.blocks.{}.crossattention.self.key.*": "aggregator.blocks.{}.cross_attn.k.*",
    "fusion_adapter.blocks.{}.crossattention.self.value.*": "aggregator.blocks.{}.cross_attn.v.*",
    "fusion_adapter.blocks.{}.crossattention.output.dense.*": "aggregator.blocks.{}.cross_attn.o.*",
    "fusion_adapter.blocks.{}.crossattention.output.LayerNorm.*": "aggregator.blocks.{}.cross_attn.norm.*",
    "fusion_adapter.blocks.{}.intermediate.dense.*": "aggregator.blocks.{}.ff.wi.*",
    "fusion_adapter.blocks.{}.output.dense.*": "aggregator.blocks.{}.ff.wo.*",
    "fusion_adapter.blocks.{}.output.LayerNorm.*": "aggregator.blocks.{}.ff.norm.*",
    "ln_adapter.*": "aggregator.norm.*",
    "adapter_proj.0.*": "aggregator.proj.fc1.*",
    "adapter_proj.2.*": "aggregator.proj.fc2.*",
    "t5_model.encoder.block.{}.layer.1.adapter.adapters.{}.down_proj.*": "t5.encoder.{}.ff.adapters.adapters.{}.down.*",
    "t5_model.encoder.block.{}.layer.1.adapter.adapters.{}.up_proj.*": "t5.encoder.{}.ff.adapters.adapters.{}.up.*",
    "t5_model.encoder.block.{}.layer.1.adapter.adapters.{}.scale": "t5.encoder.{}.ff.adapters.adapters.{}.scale",
    "t5_model.encoder.block.{}.layer.1.adapter.router_ratio1": "t5.encoder.{}.ff.adapters.gates.0",
    "t5_model.encoder.block.{}.layer.1.adapter.router_ratio2": "t5.encoder.{}.ff.adapters.gates.1",
    "t5_model.decoder.block.{}.layer.2.adapter.adapters.{}.down_proj.*": "t5.decoder.{}.ff.adapters.adapters.{}.down.*",
    "t5_model.decoder.block.{}.layer.2.adapter.adapters.{}.up_proj.*": "t5.decoder.{}.ff.adapters.adapters.{}.up.*",
    "t5_model.decoder.block.{}.layer.2.adapter.adapters.{}.scale": "t5.decoder.{}.ff.adapters.adapters.{}.scale",
    "t5_model.decoder.block.{}.layer.2.adapter.router_ratio1": "t5.decoder.{}.ff.adapters.gates.0",
    "t5_model.decoder.block.{}.layer.2.adapter.router_ratio2": "t5.decoder.{}.ff.adapters.gates.1",
}
WORDS = "qformer.words.weight"  # BERT knows fewer: LION adds one
POSITION_IDS = "Qformer.bert.embeddings.position_ids"
FROZEN = {  # a LION or BLIP-2 file may hold the frozen parts too
    **{f"visual_encoder.{name}": "frozen: read from --vit" for name in (*EVA, *EVA_UNUSED)},
    **{f"t5_model.{name}": "frozen: read from --t5" for name in (*T5, *T5_UNUSED)},
    **{f"ram_model.{name}": "frozen: read from --ram" for name in (*RAM, *RAM_UNUSED)},
}
LION_UNUSED = {POSITION_IDS: "a buffer that counts 0, 1, 2, ...", **FROZEN}

BLIP2 = {theirs: ours for theirs, ours in LION.items() if ours.startswith("qformer.")}  # LION took its Q-Former over
BLIP2_UNUSED = {
    **LION_UNUSED,
    "Qformer.cls.*": "the word head of BLIP-2's first stage",
    "Qformer.bert.pooler.*": "no part of the Q-Former",
    "temp": "of BLIP-2's first stage",
    "vision_proj.*": "of BLIP-2's first stage",
    "text_proj.*": "of BLIP-2's first stage",
    "itm_head.*": "of BLIP-2's first stage",
}

BERT = {  # bert-base-uncased: the Q-Former's start
    theirs.removeprefix("Qformer."): ours
    for theirs, ours in BLIP2.items()
    if theirs.startswith("Qformer.") and "_query" not in theirs and "crossattention" not in theirs
}
BERT_QUERIES = {  # its feed-forward layers serve twice: BLIP-2 starts the queries' from them too
    theirs: ours.replace(".ff.", ".ff_query.") for theirs, ours in BERT.items() if ".ff." in ours
}
BERT_UNUSED = {
    "bert.embeddings.token_type_embeddings.weight": "the Q-Former knows no token types",
    "bert.embeddings.position_ids": LION_UNUSED[POSITION_IDS],
    "bert.pooler.*": "no part of the Q-Former",
    "cls.*": "the heads of BERT's own training",
}

OLDER = {  # the same tensors under names that older files give them
    "vision_multi.": "tagging_head.",
    ".LayerNorm.gamma": ".LayerNorm.weight",
    ".LayerNorm.beta": ".LayerNorm.bias",
}


def translate(name: str, table: Table) -> str | None:
    """Our name of an official tensor, or, with a table of unused ones, the reason; None if no row knows it."""
    for theirs, ours in table.items():
        if found := pattern(theirs).fullmatch(name):
            return ours.replace("*", "{}").format(*found.groups())
    return None


@cache
def pattern(row: str) -> re.Pattern:
    return re.compile(re.escape(row).replace(r"\{\}", r"(\d+)").replace(r"\*", "(.+)"))


def inverted(table: Table) -> Table:
    assert len(set(table.values())) == len(table), "two rows of a table lead to one name"
    return {ours: theirs for theirs, ours in table.items()}


# --- the official files


class Source(Tensors):
    """An official checkpoint with its tables."""

    def __init__(self, path: Path, table: Table, unused: Table):
        super().__init__(path, OLDER)
        self.table, self.unused = table, unused

    def targets(self, model: Mapping[str, Tensor]) -> dict[str, str]:
        """Our name -> official name, for every tensor that the model uses; the rest must be declared unused."""
        found: dict[str, str] = {}
        for name in self.where:
            ours = translate(name, self.table)
            if ours is None or ours not in model:
                if translate(name, self.unused) is None:
                    raise ValueError(f"{self.path}: unknown tensor {name}, which no table of weights.py names")
            elif ours in found:
                raise ValueError(f"{self.path}: {name} and {found[ours]} both are {ours}")
            else:
                found[ours] = name
        return found

    def fits(self, name: str, ours: str, wanted: torch.Size) -> bool:
        found = self.shapes[name]
        fewer = self.table is BERT and ours == WORDS and found[1:] == wanted[1:] and found[0] < wanted[0]
        return found == wanted or fewer


# --- convert


def t5_sizes(folder: Path) -> dict[str, int]:
    """What the T5 folder's config.json says of the sizes that T5Config holds."""
    names = {
        "width": "d_model", "head_width": "d_kv", "heads": "num_heads", "mlp_width": "d_ff",
        "encoder_depth": "num_layers", "decoder_depth": "num_decoder_layers", "vocab_size": "vocab_size",
    }  # fmt: skip
    data = read_json(folder / "config.json")
    return {ours: data[theirs] for ours, theirs in names.items() if theirs in data}


def chosen_config(config: Path | None, t5: Path, ram: bool) -> LionConfig:
    """The sizes to build: those of `--config`, or the preset whose T5 is the one in the folder."""
    if config is not None:
        chosen = LionConfig.from_json(config.read_text(encoding="utf-8"))
    else:
        sizes = t5_sizes(t5)
        fitting = [c for c in PRESETS.values() if c.t5 == replace(T5Config(), **sizes)]
        if not fitting:
            raise ValueError(
                f"{t5}/config.json: a T5 of width {sizes.get('width')} is neither XL nor XXL: give --config"
            )
        chosen = fitting[0]
    wrong = {
        k: v for k, v in (t5_sizes(t5) if (t5 / "config.json").is_file() else {}).items() if getattr(chosen.t5, k) != v
    }
    for name, value in wrong.items():
        raise ValueError(f"{t5}/config.json: the T5's {name} is {value}, the model's {getattr(chosen.t5, name)}")
    return chosen if ram else replace(chosen, ram=None)


def planned(config: LionConfig) -> LionModel:
    """A model of names and shapes alone."""
    with torch.device("meta"):
        return LionModel(config)


def check_values(tensor: Tensor, name: str, path: Path) -> None:
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{path}: {name} holds NaN or infinite values")
    if name == "label_embed" and not tensor.any():
        raise ValueError(f"{path}: label_embed is all zero, so RAM would give every image the same tags")


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}  # of all but linear layers


def convert(args: argparse.Namespace) -> None:
    if args.dtype not in DTYPES:
        why = "T5 overflows in float16; " if args.dtype == "float16" else ""
        raise ValueError(f"--dtype {args.dtype}: {why}there are {', '.join(DTYPES)}")
    tagger = args.ram, args.ram_tags, args.ram_thresholds
    if any(tagger) and not all(tagger):
        raise ValueError("--ram needs --ram-tags and --ram-thresholds, the two text files beside it: give all or none")
    if args.lion and args.blip2:
        raise ValueError(f"--blip2 {args.blip2} starts a Q-Former, which --lion has trained: give one of the two")
    texts = [args.bert / "vocab.txt", args.t5 / "tokenizer.json"]
    texts += [args.ram_tags, args.ram_thresholds] if args.ram else []
    for path in [*texts, args.config or args.t5 / "config.json"]:
        if not path.is_file():
            raise ValueError(f"{path}: no such file; README.md, Porting, lists what to download")
    config = chosen_config(args.config, args.t5, ram=args.ram is not None)
    model = planned(config)
    plan = {name: tensor.shape for name, tensor in model.state_dict().items()}

    sources = [Source(args.vit, EVA, EVA_UNUSED), Source(args.t5, T5, T5_UNUSED)]
    if args.ram:
        sources.append(Source(args.ram, RAM, RAM_UNUSED))
    if args.lion:
        sources.append(Source(args.lion, LION, LION_UNUSED))
    else:
        if any((args.bert / name).is_file() for name in ("model.safetensors", "pytorch_model.bin")):
            sources += [Source(args.bert, BERT, BERT_UNUSED), Source(args.bert, BERT_QUERIES, {**BERT, **BERT_UNUSED})]
        if args.blip2:
            sources.append(Source(args.blip2, BLIP2, BLIP2_UNUSED))
    filled: dict[str, tuple[Source, str]] = {}
    for source in sources:
        filled |= {ours: (source, name) for ours, name in source.targets(model.state_dict()).items()}
    torch.manual_seed(0)  # the same files make the same start
    new = {} if args.lion else {name: tensor for name, tensor in fresh(config, model) if name not in filled}
    missing = [name for name in plan if name not in filled and name not in new]
    if missing:
        raise ValueError(f"no file holds {official_name(missing[0])}, and {len(missing) - 1} more are missing")
    for ours, (source, name) in filled.items():
        if not source.fits(name, ours, plan[ours]):
            raise ValueError(
                f"{source.path}: {name} has shape {tuple(source.shapes[name])}, this model needs {tuple(plan[ours])}: "
                "do the files belong to one size (XL or XXL)?"
            )
    if new:
        parts = ", ".join(sorted({name.split(".")[0] for name in new}))
        print(f"no --lion: {len(new)} tensors of {parts} are freshly initialised, for stage 1")

    stored = model.to(DTYPES[args.dtype])
    if args.dtype == "int8":
        to_int8(stored)
    layout = stored.state_dict()
    scales: dict[str, Tensor] = {}  # of weights already written: a scale may come much later, and is small

    def value(name: str) -> Tensor:
        """What is stored under this name: the tensor itself, or one half of a weight in eight bits."""
        part, _, kind = name.rpartition(".")
        if name in plan and layout[name].dtype != torch.int8:
            return read(name)
        if name in scales:
            return scales.pop(name)
        rounded, scales[f"{part}.scale"] = quantise(read(f"{part}.weight"), DTYPES[args.dtype])
        return rounded if kind == "weight" else scales.pop(name)  # a scale that is written before its weight

    def read(ours: str) -> Tensor:
        if ours in new:
            return new[ours]
        source, name = filled[ours]
        tensor = source.read(name)
        check_values(tensor, name, source.path)
        added = plan[ours][0] - len(tensor) if ours == WORDS else 0
        return torch.cat((tensor, 0.02 * torch.randn(added, tensor.shape[1]))) if added else tensor

    if args.out.exists():
        raise ValueError(f"--out {args.out} exists already: remove it or choose another")
    with atomic_write(args.out) as folder:
        folder.mkdir()
        for name, path in zip(Vocabularies.FILES[: len(texts)], texts, strict=True):
            shutil.copyfile(path, folder / name)
        Vocabularies.from_folder(folder, config)
        (folder / "config.json").write_text(config.to_json())
        write_shards(folder, layout, value)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: {len(plan)} tensors, {size / 1e9:.2f} GB in {args.dtype}")


def official_name(ours: str) -> str:
    return next(name for table in (EVA, T5, RAM, LION) if (name := translate(ours, inverted(table))))


# --- inspect, export

KINDS = {
    "EVA ViT-g": (EVA, EVA_UNUSED),
    "FlanT5": (T5, T5_UNUSED),
    "RAM": (RAM, RAM_UNUSED),
    "BLIP-2": (BLIP2, BLIP2_UNUSED),  # before LION, which knows as many names of it, and more of its own file
    "LION": (LION, LION_UNUSED),
    "BERT": (BERT, BERT_UNUSED),
}
# A whole file may lack these, which stage 1 draws; BLIP-2's T5 files were trained without reading text.
DRAWN = {"BERT": "", "BLIP-2": r"qformer\.(words|positions|layers\.\d+\.ff)\."}


def inspect(args: argparse.Namespace) -> int:
    """Print every tensor's place; 1 if one is unknown or missing, else 0."""
    if (args.path / "config.json").is_file() and "vit" in read_json(args.path / "config.json"):
        return inspect_converted(args.path)
    sources = {kind: Source(args.path, *tables) for kind, tables in KINDS.items()}
    known = {k: sum(translate(n, s.table) is not None for n in s.where) for k, s in sources.items()}
    kind = max(known, key=lambda k: known[k])
    source = sources[kind]
    if not known[kind]:
        raise ValueError(f"{args.path}: none of its {len(source.where)} tensors has a name of an official file")
    print(f"{args.path}: {kind}, {len(source.where)} tensors")
    problems, places = 0, set()
    config = LionConfig.from_json(args.config.read_text()) if args.config else guessed_config(kind, source)
    model = planned(config).state_dict()
    for name, shape in source.shapes.items():
        ours, reason = translate(name, source.table), translate(name, source.unused)
        if ours is not None and ours in model:
            places.add(ours)
            fits = source.fits(name, ours, model[ours].shape)
            fault = "" if fits else f"  SHAPE DIFFERS: the model has {tuple(model[ours].shape)}"
            print(f"{name} {tuple(shape)} -> {ours}{fault}")
        elif reason is not None:
            fault = ""
            print(f"{name} {tuple(shape)} not used: {reason}")
        else:
            fault = "unknown"
            print(f"{name} {tuple(shape)} UNKNOWN")
        problems += bool(fault)
    for ours in model:
        theirs = translate(ours, inverted(source.table))
        if theirs is not None and ours not in places:
            drawn = kind in DRAWN and re.match(DRAWN[kind], ours) is not None
            print(f"{theirs} {'not there' if drawn else 'MISSING'}, for {ours}")
            problems += not drawn
    print(f"{len(places)} used, {len(source.where) - len(places)} not, {problems} problems")
    return int(problems > 0)


def guessed_config(kind: str, source: Source) -> LionConfig:
    """XL, or XXL where the file has its width."""
    probe = "shared.weight" if kind == "FlanT5" else "t5_proj.weight"
    shape = source.shapes.get(probe, torch.Size())
    axis = -1 if kind == "FlanT5" else 0
    return PRESETS["xxl" if shape and shape[axis] == PRESETS["xxl"].t5.width else "xl"]


def inspect_converted(folder: Path) -> int:
    model = Lion.from_pretrained(folder, dtype=None).model
    plan = planned(model.config).state_dict()
    for name, tensor in model.state_dict().items():
        source = name if name in plan else f"{name.removesuffix('scale')}weight"
        print(f"{name} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} from {official_name(source)}")
    count = sum(tensor.numel() for tensor in plan.values())
    print(f"{folder}: a whole LION, {len(model.state_dict())} tensors, {count / 1e6:.1f} M parameters")
    return 0


def export(args: argparse.Namespace) -> None:
    """The release's file of trained tensors, with the buffer that its code expects among them."""
    model = Lion.from_pretrained(args.folder, dtype=None).model
    if any(tensor.dtype == torch.int8 for tensor in model.state_dict().values()):
        raise ValueError(f"{args.folder} is rounded to int8: export the folder or files that it was made of")
    names = inverted(LION)
    tensors = {n: tensor for ours, tensor in model.state_dict().items() if (n := translate(ours, names)) is not None}
    if model.qformer is not None:
        tensors[POSITION_IDS] = torch.arange(model.config.qformer.max_positions)[None]
    if args.out.exists():
        raise ValueError(f"--out {args.out} exists already: remove it or choose another")
    with atomic_write(args.out) as file:
        torch.save({"model": tensors}, file)
    print(f"{args.out}: {len(tensors)} tensors under the release's names")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="convert | inspect | export")
    command = commands.add_parser("convert", help="official files to a folder that Lion.from_pretrained opens")
    for flag, required, text in (
        ("vit", True, "eva_vit_g.pth"),
        ("t5", True, "folder of FlanT5"),
        ("bert", True, "folder of bert-base-uncased; vocab.txt is enough with --lion or --blip2"),
        ("ram", False, "ram_swin_large_14m.pth"),
        ("ram-tags", False, "ram_tag_list.txt"),
        ("ram-thresholds", False, "ram_tag_list_threshold.txt"),
        ("lion", False, "LION-FlanT5-XL.pth or LION-FlanT5-XXL.pth"),
        ("blip2", False, "BLIP-2 or InstructBLIP FlanT5, for stage 1 where there is no --lion"),
        ("config", False, "a LionConfig as JSON, for other sizes than XL and XXL"),
        ("out", True, "the folder to make"),
    ):
        command.add_argument(f"--{flag}", type=Path, required=required, help=text)
    command.add_argument("--dtype", default="float32", help="float32 (default), bfloat16 or int8")
    command.set_defaults(run=convert)
    command = commands.add_parser("inspect", help="where each tensor of a file goes")
    command.add_argument("path", type=Path)
    command.add_argument("--config", type=Path, help="a LionConfig as JSON, for other sizes than XL and XXL")
    command.set_defaults(run=inspect)
    command = commands.add_parser("export", help="a converted or trained folder to the release's LION file")
    command.add_argument("folder", type=Path)
    command.add_argument("--out", type=Path, required=True)
    command.set_defaults(run=export)
    args = parser.parse_args(argv)
    try:
        return args.run(args) or 0
    except (ValueError, OSError) as error:
        print(f"weights.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
