"""LION, the whole model (section 3, Figure 3): two levels of visual knowledge in front of one language model.

    pixels --> ViT --last block-----> Q-Former(question) ---> image-level tokens ---.
                `--taps 38, 28, 18--> vision aggregator ----> region-level tokens --+-> FlanT5 + adapters --> answer
    tags + question --> T5's embeddings, the soft prompt put in --> prompt ---------'       ^
    task ---------------------------------------------------------------------> router -----'

The two *levels* of knowledge are fine-grained spatial knowledge (region-level tokens) and high-level semantic evidence
(image tags, which RAM finds and the prompt holds). The two *kinds of task*, image level and region level, are the
router's rows.

Tensors in, tensors out: lion_mini/pipeline.py turns pictures and words into a `Batch`. `LionConfig` says what a model
is made of. Each feed-forward layer has one adapter in stage 1 (Q-Former, no aggregator) and in stage 2 (aggregator, no
Q-Former); stage 3 has everything.

Same outputs as the release's models/lion_t5.py.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..config import IGNORE, LionConfig
from .aggregator import Aggregator
from .qformer import QFormer
from .ram import Ram
from .t5 import T5
from .vit import Vit


@dataclass(frozen=True)
class Batch:
    """b questions about p pictures. A mask is True at tokens, None if no row is padded. Each text has its own t."""

    pixels: Tensor  # (p, 3, s, s), each picture once
    picture: Tensor  # (b,) the picture that each question is about
    question: Tensor  # (b, t) BERT's ids of the question alone, for the Q-Former
    question_mask: Tensor | None
    prompt: Tensor  # (b, t) T5's ids: tags and question
    prompt_mask: Tensor | None
    soft: Tensor  # (b, t) True where the soft prompt goes
    task: Tensor  # (b,) row of the router
    labels: Tensor | None = None  # (b, t) T5's ids of the answer, IGNORE where padded

    def answer_tokens(self) -> int:
        assert self.labels is not None
        return int((self.labels != IGNORE).sum())

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        """The same on another device, pixels in another dtype."""
        moved = {k: v.to(device) for k, v in vars(self).items() if v is not None}
        return replace(self, **moved | {"pixels": moved["pixels"].to(dtype)})


class LionModel(nn.Module):
    """LION-4B with `PRESETS["xl"]`, LION-12B with `PRESETS["xxl"]`."""

    def __init__(self, config: LionConfig):
        super().__init__()
        self.config = config
        width = config.t5.width
        image, region = config.visual_input in ("image", "all"), config.visual_input in ("region", "all")
        self.vit = Vit(config.vit)
        self.qformer = QFormer(config.qformer, config.vit.width, width) if image else None
        self.aggregator = Aggregator(config.aggregator, config.vit.width, len(config.taps), width) if region else None
        self.t5 = T5(config.t5, config.adapter_width, config.adapters)
        self.soft_prompt = nn.Parameter(nn.init.normal_(torch.empty(width))) if config.tags == "soft" else None
        self.ram = Ram(config.ram) if config.ram else None

    def see(self, batch: Batch) -> Tensor:  # -> (b, q + n, d)
        """The visual tokens: the Q-Former's, which depend on the question, then the aggregator's."""
        features, taps = self.vit(batch.pixels, self.config.taps if self.aggregator is not None else ())
        tokens = []
        if self.qformer is not None:
            tokens.append(self.qformer(features[batch.picture], batch.question, batch.question_mask))
        if self.aggregator is not None:
            tokens.append(self.aggregator(taps)[batch.picture])
        return torch.cat(tokens, dim=1)

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor | None]:  # -> (b, q + n + t, d), its mask
        """T5's encoder states over visual tokens and prompt."""
        visual = self.see(batch)
        words = self.t5.shared(batch.prompt)
        if self.soft_prompt is not None:
            words = torch.where(batch.soft[..., None], self.soft_prompt, words)
        mask = None
        if batch.prompt_mask is not None:
            mask = F.pad(batch.prompt_mask, (visual.shape[1], 0), value=True)
        return self.t5.encode(torch.cat((visual, words), dim=1), mask, batch.task), mask

    def logits(self, batch: Batch) -> Tensor:  # -> (b, t, v)
        """The logits of every answer token given the ones before it."""
        assert batch.labels is not None
        states, mask = self.encode(batch)
        return self.t5.predict(batch.labels, self.t5.start(states, mask, batch.task, batch.labels.shape[1]))

    def forward(self, batch: Batch, mean: Literal["tokens", "samples"] = "tokens") -> Tensor:  # -> ()
        """The language-modelling loss: the mean over all answer tokens, or the mean of the samples' own means."""
        assert batch.labels is not None
        logits = self.logits(batch).float()
        loss = F.cross_entropy(logits.transpose(1, 2), batch.labels, ignore_index=IGNORE, reduction="none")
        real = batch.labels != IGNORE  # (b, t)
        return loss.sum() / real.sum() if mean == "tokens" else (loss.sum(1) / real.sum(1)).mean()

    def train(self, mode: bool = True) -> "LionModel":
        """Like nn.Module.train(), but modules without a trained parameter stay in eval mode: no dropout there."""
        super().train(mode)
        for module in self.modules():
            module.training = mode and any(parameter.requires_grad for parameter in module.parameters())
        return self

    def recompute(self, mode: bool = True) -> None:
        """Gradient checkpointing for every part through which gradients pass."""
        for part in (self.qformer, self.aggregator, self.t5):
            if part is not None:
                part.recompute = mode


class NoInit(TorchFunctionMode):
    """Skips `normal_`, which imports PyTorch's compiler on the meta device: a second at every start."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **(kwargs or {}))


def skeleton(config: LionConfig) -> LionModel:
    """A model of names and shapes, on the meta device, to be filled by `load_state_dict(assign=True)`."""
    with torch.device("meta"), NoInit():
        return LionModel(config)
