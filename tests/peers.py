"""The parts that transformers has too, with our parameters in them: the tests' oracle and the benchmark's peer.

Every function takes our part and returns transformers' module in eval mode. It holds the same tensors, not copies,
under transformers' names. `strict=True` leaves nothing out on either side.
"""

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import weights
from lion_mini.config import QFormerConfig, RamConfig, T5Config, VitConfig
from lion_mini.model.qformer import QFormer
from lion_mini.model.swin import Swin
from lion_mini.model.t5 import T5
from lion_mini.model.vit import Vit


def available() -> bool:
    return importlib.util.find_spec("transformers") is not None


def renamed(module: nn.Module, prefix: str, table: weights.Table, theirs: dict[str, str]) -> dict[str, Tensor]:
    """Our parameters under their official names, in which `theirs` replaces parts."""
    found = {}
    for name, parameter in module.state_dict().items():
        official = weights.translate(prefix + name, weights.inverted(table))
        if official is not None:
            for old, new in theirs.items():
                official = official.replace(old, new)
            found[official] = parameter
    return found


def loaded(kind: Any, sizes: Any, state: dict[str, Tensor]) -> Any:
    """Made where the tensors are: buffers are not among them."""
    with next(iter(state.values())).device:
        theirs = kind(sizes)
    theirs.load_state_dict(state, strict=True, assign=True)
    return theirs.eval()


def tokenizers(folder: Path) -> tuple[Any, Any]:
    """The Rust tokenizers of T5 and BERT, with LION's word [DEC], from a folder of official files."""
    from tokenizers import Tokenizer
    from transformers import BertTokenizer

    bert = BertTokenizer.from_pretrained(folder / "bert-base-uncased")
    bert.add_special_tokens({"bos_token": "[DEC]"})
    return Tokenizer.from_file(str(folder / "flan-t5" / "tokenizer.json")), bert.backend_tokenizer


def vit(ours: Vit, config: VitConfig) -> Any:
    import transformers

    state = renamed(
        ours, "vit.", weights.EVA,
        {"blocks.": "encoder.layers.", "attn.proj": "self_attn.projection", "attn.qkv": "self_attn.qkv",
         "norm1": "layer_norm1", "norm2": "layer_norm2", "cls_token": "embeddings.class_embedding",
         "pos_embed": "embeddings.position_embedding", "patch_embed.proj": "embeddings.patch_embedding"},
    )  # fmt: skip
    for i in range(config.depth):
        q, v = (state.pop(f"encoder.layers.{i}.attn.{letter}_bias") for letter in "qv")
        state[f"encoder.layers.{i}.self_attn.qkv.bias"] = torch.cat((q, torch.zeros_like(q), v))
    ones = torch.ones_like(ours.cls[0, 0])
    state |= {"post_layernorm.weight": ones, "post_layernorm.bias": 0 * ones}
    sizes = transformers.InstructBlipVisionConfig(
        hidden_size=config.width, intermediate_size=config.mlp_width, num_hidden_layers=config.depth,
        num_attention_heads=config.heads, image_size=config.image_size, patch_size=config.patch_size,
        layer_norm_eps=config.norm_eps, hidden_act="gelu", qkv_bias=True,
    )  # fmt: skip
    return loaded(transformers.InstructBlipVisionModel, sizes, state)


def qformer(ours: QFormer, config: QFormerConfig) -> Any:
    """Without the norm before and the projection behind, which InstructBLIP keeps elsewhere."""
    import transformers

    state = renamed(
        ours, "qformer.", weights.LION,
        {"Qformer.bert.": "", ".self.": ".attention.", "embeddings.LayerNorm": "embeddings.layernorm"},
    )  # fmt: skip
    for extra in ("query_tokens", "t5_proj.weight", "t5_proj.bias", "ln_vision.weight", "ln_vision.bias"):
        state.pop(extra)
    sizes = transformers.InstructBlipQFormerConfig(
        vocab_size=config.vocab_size, hidden_size=config.width, num_hidden_layers=config.depth,
        num_attention_heads=config.heads, intermediate_size=config.mlp_width,
        max_position_embeddings=config.max_positions, encoder_hidden_size=ours.image_norm.normalized_shape[0],
        cross_attention_frequency=config.cross_every, layer_norm_eps=config.norm_eps,
    )  # fmt: skip
    return loaded(transformers.InstructBlipQFormerModel, sizes, state)


def look(theirs: Any, image: Tensor) -> Tensor:  # (b, 3, s, s) -> (b, n, d)
    """Their ViT without its final norm, which LION does not have."""
    return theirs.encoder(inputs_embeds=theirs.embeddings(image)).last_hidden_state


def read(theirs: Any, ours: QFormer, states: Tensor, ids: Tensor) -> Tensor:  # (b, n, ·), (b, t) -> (b, q, out)
    """Their Q-Former between our norm and our projection. No row is padded."""
    (b, t), q = ids.shape, ours.config.queries
    out = theirs(
        input_ids=ids,
        attention_mask=torch.ones(b, q + t, dtype=torch.long, device=ids.device),
        query_embeds=ours.queries.expand(b, -1, -1),
        encoder_hidden_states=ours.image_norm(states),
    )
    return ours.proj(out.last_hidden_state[:, :q])


def t5(ours: T5, config: T5Config) -> Any:
    """Of a T5 without adapters."""
    import transformers

    sizes = transformers.T5Config(
        vocab_size=config.vocab_size, d_model=config.width, d_kv=config.head_width, d_ff=config.mlp_width,
        num_layers=config.encoder_depth, num_decoder_layers=config.decoder_depth, num_heads=config.heads,
        relative_attention_num_buckets=config.buckets, relative_attention_max_distance=config.max_distance,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    sizes.dense_act_fn = "gelu"  # the exact one, as the release sets it
    sizes.tie_word_embeddings = sizes.scale_decoder_outputs = False  # version 5 ignores them as arguments
    sizes.decoder_start_token_id = 0
    state = renamed(ours, "t5.", weights.T5, {})
    state |= {f"{stack}.embed_tokens.weight": state["shared.weight"] for stack in ("encoder", "decoder")}
    return loaded(transformers.T5ForConditionalGeneration, sizes, state)


SWIN_NAMES = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection", "patch_embed.norm": "embeddings.norm",
    "attn.bias_table": "attention.relative_position_bias.relative_position_bias_table",
    "attn.o.": "attention.o_proj.", "norm1": "layernorm_before", "norm2": "layernorm_after",
    "merge": "downsample", "stages": "encoder.layers",
}  # fmt: skip


def swin(ours: Swin, config: RamConfig) -> Any:
    """transformers keeps q, k and v apart."""
    import transformers

    state: dict[str, Tensor] = {}
    for name, tensor in ours.state_dict().items():
        for old, new in SWIN_NAMES.items():
            name = name.replace(old, new)
        name = re.sub(r"^norm", "layernorm", name)
        if "qkv" in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace("attn.qkv", f"attention.{letter}_proj")] = part
        else:
            state[name] = tensor
    sizes = transformers.SwinConfig(
        image_size=config.image_size, patch_size=config.patch_size, embed_dim=config.width,
        depths=list(config.depths), num_heads=list(config.heads), window_size=config.window,
    )  # fmt: skip
    return loaded(transformers.SwinModel, sizes, state)
