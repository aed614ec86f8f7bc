"""Every size of LION, as frozen dataclasses; the defaults are LION-4B (FlanT5-XL).

`LionConfig` nests one config per component, and `config.json` in a converted folder holds it. The stages and ablations
of the paper are values here, never other code: `visual_input`, `adapters` and `tags`. A new task is a name in `tasks`.
"""

import json
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any

from .files import need
from .text.prompts import EVAL_TEMPLATES, check_template

PAD, EOS, IGNORE = 0, 1, -100  # T5's token ids, PAD starts decoding; a label that no loss counts


@dataclass(frozen=True)
class VitConfig:  # EVA-CLIP ViT-g/14; the public file holds a 40th block that LION does not run
    image_size: int = 224
    patch_size: int = 14
    width: int = 1408
    depth: int = 39
    heads: int = 16
    mlp_width: int = 6144  # int(1408 * 4.3637)
    norm_eps: float = 1e-6

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2 + 1  # the patches and CLS


@dataclass(frozen=True)
class QFormerConfig:  # BERT-base with cross-attention in every second layer and 32 learned queries
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    queries: int = 32
    vocab_size: int = 30523  # bert-base-uncased and [DEC]
    max_positions: int = 512
    cross_every: int = 2
    norm_eps: float = 1e-12
    dropout: float = 0.1
    init_std: float = 0.02


@dataclass(frozen=True)
class AggregatorConfig:  # The vision aggregator: one block per tap after the first, as wide as the ViT
    heads: int = 16
    mlp_width: int = 3072  # the release leaves BertConfig's default, although the width is 1408
    norm_eps: float = 1e-12
    projector_ratio: int = 4
    dropout: float = 0.1
    init_std: float = 0.02


@dataclass(frozen=True)
class T5Config:  # FlanT5-XL; heads * head_width need not equal width
    width: int = 2048
    head_width: int = 64
    heads: int = 32
    mlp_width: int = 5120
    encoder_depth: int = 24
    decoder_depth: int = 24
    vocab_size: int = 32128
    buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class TagHeadConfig:  # RAM's recognition decoder: cross-attention from tags to image, no self-attention
    width: int = 768
    depth: int = 2
    heads: int = 4
    mlp_width: int = 3072
    norm_eps: float = 1e-12


@dataclass(frozen=True)
class RamConfig:  # Recognize Anything: Swin-L/384 and a tagging head over 4585 tags
    image_size: int = 384
    patch_size: int = 4
    width: int = 192
    depths: tuple[int, ...] = (2, 2, 18, 2)
    heads: tuple[int, ...] = (6, 12, 24, 48)
    window: int = 12
    tag_width: int = 512
    tags: int = 4585
    init_std: float = 0.02
    head: TagHeadConfig = TagHeadConfig()


@dataclass(frozen=True)
class LionConfig:  # The whole model. `ram=None` is a LION without its tagger: tags must then be given
    vit: VitConfig = VitConfig()
    taps: tuple[int, ...] = (38, 28, 18)  # blocks that the aggregator reads, 0-based, last first
    qformer: QFormerConfig = QFormerConfig()
    aggregator: AggregatorConfig = AggregatorConfig()
    t5: T5Config = T5Config()
    adapter_width: int = 64
    ram: RamConfig | None = RamConfig()
    tasks: tuple[str, ...] = ("region", "image")  # the router's rows; adapter k starts as task k's own
    adapters: int = 2  # per feed-forward layer: 1 in stages 1 and 2, one per task and a router in stage 3
    visual_input: str = "all"  # which branches: image (Q-Former), region (aggregator), or all
    tags: str = "soft"  # image tags behind the soft prompt, tags alone, or no tags
    max_question_tokens: int = 128  # what the Q-Former reads
    max_prompt_tokens: int = 128  # what T5 reads, in training only
    max_answer_tokens: int = 128  # in training only
    instructions: dict[str, str] = field(default_factory=dict)  # asked in place of EVAL_TEMPLATES, by kind
    stage: int = 0  # the stage that trained the weights beside this config; 0: none
    made_by: str = ""  # the commands, seeds and hours that did

    def __post_init__(self) -> None:
        for name, choices in (("visual_input", ("image", "region", "all")), ("tags", ("soft", "plain", "none"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be {' or '.join(choices)}, not {getattr(self, name)!r:.60}")
        for kind, text in self.instructions.items():
            check_template(kind, need(text, str, f"instructions.{kind}"), EVAL_TEMPLATES)
        if self.adapters not in (0, 1, len({*self.tasks})):
            raise ValueError(f"adapters is 0, 1 or {len({*self.tasks})} (one per task), not {self.adapters}")
        if not all(0 <= tap < self.vit.depth for tap in self.taps):
            raise ValueError(f"taps {self.taps} are not all among the ViT's blocks 0 to {self.vit.depth - 1}")
        for name, width in (("vit", self.vit.width), ("qformer", self.qformer.width), ("aggregator", self.vit.width)):
            if width % (heads := getattr(self, name).heads):
                raise ValueError(f"{name}: width {width} is not a multiple of its {heads} heads")

    @property
    def visual_tokens(self) -> int:
        """How many tokens the image becomes in front of the text."""
        return (self.visual_input != "region") * self.qformer.queries + (self.visual_input != "image") * self.vit.tokens

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "LionConfig":
        """The config that `to_json` wrote. An unknown field or a value of another type raises with its path."""
        return _parse(cls(), json.loads(text), "config")


# Least and greatest values, by field or type. Each block takes time to build: 200 of them about a second.
LIMITS = {int: (1, 10**6), float: (0, 1), "depth": (1, 200), "taps": (0, 199), "adapters": (0, 200), "stage": (0, 99)}
LIMITS["image_size"] = 1, 2048  # a picture of 10**6 x 10**6 fits no memory


def _parse(default: Any, value: Any, path: str) -> Any:
    """`value` from JSON in place of `default`, which shows its type; of a config, fields may be left out."""
    if value is None and path == "config.ram":
        return None
    if is_dataclass(default) and not isinstance(default, type):
        if unknown := sorted(need(value, dict, path).keys() - vars(default).keys()):
            raise ValueError(f"{path}.{unknown[0]!r:.60} is unknown; there are {', '.join(vars(default))}")
        return replace(default, **{k: _parse(getattr(default, k), v, f"{path}.{k}") for k, v in value.items()})
    if isinstance(default, tuple):
        return tuple(_parse(default[0], item, path) for item in need(value, list, path) or [None])
    value = type(default)(need(value, type(default), path))
    if isinstance(value, (int, float)):
        field = "depth" if "depth" in path else path.split(".")[-1]
        low, high = LIMITS.get(field) or LIMITS[type(default)]
        if not low <= value <= high:
            raise ValueError(f"{path} must be from {low} to {high}, not {value!r:.60}")
    return value


PRESETS = {
    "xl": LionConfig(),
    "xxl": LionConfig(t5=T5Config(width=4096, heads=64, mlp_width=10240)),
    "tiny": LionConfig(
        vit=VitConfig(image_size=48, patch_size=8, width=128, depth=6, heads=4, mlp_width=512),
        taps=(5, 3, 2),
        qformer=QFormerConfig(width=128, depth=3, heads=4, mlp_width=256, queries=3, vocab_size=512, max_positions=64),
        aggregator=AggregatorConfig(heads=4, mlp_width=256),
        t5=T5Config(width=128, head_width=32, heads=4, mlp_width=256, encoder_depth=3, decoder_depth=3, vocab_size=512),
        ram=RamConfig(image_size=96, width=24, depths=(2, 2), heads=(2, 4), window=4, tag_width=48, tags=10,
                      head=TagHeadConfig(width=48, depth=1, heads=4, mlp_width=96)),
    ),
}  # fmt: skip
