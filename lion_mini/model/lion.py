"""LION, the whole model (paper section 3, figure 2): two levels of visual knowledge in front of one language model.

    image --> ViT ---last block---> Q-Former(question) ------> image-level tokens --.
               `-----three taps---> vision aggregator -------> region-level tokens -+-> FlanT5 + adapters --> answer
    image --> RAM --> tags --> "According to <soft prompt>, ... tags: [...]. " + question -'      ^
                                                                             task ---> router ---'

This is the only file that knows all the parts. What a model is made of stands in its `LionConfig`: a stage-1 model has
the image-level branch and one adapter, a stage-2 model the region-level branch and one adapter, a stage-3 model all.

Compatible with the release's models/lion_t5.py.                                        next: generate.py
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..box import Box
from ..config import EOS, IGNORE, PAD, LionConfig
from ..files import Undrawn, check_tensors, read_ahead, read_lines, read_shards, to_float
from ..images import lion_transform, ram_from_lion, ram_transform
from ..quantize import best_dtype, pack, to_int8, usable
from ..text.prompts import EVAL_TEMPLATES, PLACEHOLDER, render, tag_sentence
from ..text.tokenizers import UnigramTokenizer, WordPieceTokenizer
from .adapters import TASKS
from .aggregator import Aggregator
from .generate import GENERATION, Generation, generate, log_likelihoods
from .qformer import QFormer
from .ram import Ram, select
from .t5 import T5
from .vit import Vit

TINY = Path(__file__).parent.parent / "assets" / "tiny"  # the weights that ship with the package, trained on toy.py
DTYPES: dict[str, torch.dtype | Literal["auto"] | None] = {  # what --dtype of the scripts may say
    "auto": "auto", "stored": None, "float32": torch.float32, "bfloat16": torch.bfloat16,
}  # fmt: skip
Tags = Sequence[Sequence[str]] | Sequence[str]  # per sample a list, or a string in which they are already joined


@dataclass(frozen=True)
class Text:
    """The vocabularies of a model: what its three text-reading parts call things."""

    words: WordPieceTokenizer  # Q-Former
    pieces: UnigramTokenizer  # T5
    tags: list[str]  # RAM; empty without a tagger
    thresholds: list[float]  # one per tag: how sure RAM must be

    FILES = ("vocab.txt", "tokenizer.json", "ram_tag_list.txt", "ram_tag_list_threshold.txt")

    @classmethod
    def from_folder(cls, folder: Path, tagger: bool) -> "Text":
        vocab, tokenizer, tags, thresholds = (folder / name for name in cls.FILES)
        names = read_lines(tags) if tagger else []
        floors = [to_float(line, thresholds, i) for i, line in enumerate(read_lines(thresholds), 1)] if tagger else []
        return cls(WordPieceTokenizer.from_file(vocab), UnigramTokenizer.from_file(tokenizer), names, floors)

    def check(self, config: LionConfig) -> None:
        """The vocabularies fit the model's tables; else a ValueError with both numbers."""
        if len(self.words) != config.qformer.vocab_size:
            raise ValueError(f"vocab.txt has {len(self.words)} words, the Q-Former {config.qformer.vocab_size}")
        if len(self.pieces) > config.t5.vocab_size:
            raise ValueError(f"tokenizer.json has {len(self.pieces)} pieces, T5 only {config.t5.vocab_size}")
        if config.ram:
            for name, count in (("tag list", len(self.tags)), ("thresholds file", len(self.thresholds))):
                if count != config.ram.tags:
                    raise ValueError(f"the {name} has {count} lines, RAM {config.ram.tags} tags")


@dataclass(frozen=True)
class Answer:
    """What LION says about one picture, and what it was asked."""

    text: str
    prompt: str
    tags: list[tuple[str, float]]  # with RAM's scores; 1.0 for tags that were given
    score: float  # mean log-probability of the answer's tokens


class Lion(nn.Module):
    """LION-4B with `PRESETS["xl"]`, LION-12B with `PRESETS["xxl"]`; `Lion.from_pretrained` loads one with its text."""

    def __init__(self, config: LionConfig, text: Text | None = None):
        super().__init__()
        self.config = config
        self.vit = Vit(config.vit)
        width = config.t5.width
        image, region = config.visual_input != "region", config.visual_input != "image"
        self.qformer = QFormer(config.qformer, config.vit.width, width) if image else None
        self.aggregator = Aggregator(config.aggregator, config.vit.width, len(config.taps), width) if region else None
        self.t5 = T5(config.t5, config.adapter_width, config.adapters)
        self.soft_prompt = nn.Parameter(nn.init.normal_(torch.empty(width))) if config.tags == "soft" else None
        self.ram = Ram(config.ram) if config.ram else None
        self._text = text

    @classmethod
    def plan(cls, config: LionConfig, text: Text | None = None) -> "Lion":
        """A LION of which only names and shapes are there, to be filled or looked at."""
        with torch.device("meta"), Undrawn():
            return cls(config, text)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | Literal["auto"] | None = torch.float32,
        packed: bool = False,
    ) -> "Lion":
        """The model in a folder that `weights.py convert` or training wrote, in eval mode; "tiny" is the built-in one.

        `dtype=None` keeps the stored one, "auto" is bfloat16 where the device computes in it and float32 elsewhere.
        float16 is refused: T5's feed-forward layers overflow in it. A `packed` model answers faster on a CPU but can
        no longer be saved, moved or trained.
        """
        if dtype == torch.float16:
            raise ValueError("T5 overflows in float16: use bfloat16, or float32")
        device = usable(device)
        if dtype == "auto":
            dtype = best_dtype(device)
        folder = TINY if str(folder) == "tiny" else Path(folder)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} has no config.json: it is not a folder that weights.py convert wrote")
        read_ahead(folder)
        try:
            config = LionConfig.from_json((folder / "config.json").read_text(encoding="utf-8"))
            text = Text.from_folder(folder, tagger=config.ram is not None)
            text.check(config)
        except ValueError as error:
            raise ValueError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from None
        model = cls.plan(config, text)
        tensors = read_shards(folder, device, dtype)
        if any(tensor.dtype == torch.int8 for tensor in tensors.values()):
            to_int8(model)
        expected = model.state_dict()
        check_tensors(folder, {k: v.shape for k, v in tensors.items()}, {k: v.shape for k, v in expected.items()})
        model.load_state_dict(tensors, strict=True, assign=True)
        if packed:
            del tensors
            pack(model)
        return model.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Lion":
        """As ever, but what is frozen stays in eval mode: only a part that learns may drop anything out."""
        super().train(mode)
        for module in self.modules():
            module.training = mode and any(parameter.requires_grad for parameter in module.parameters())
        return self

    def recompute(self, mode: bool = True) -> None:
        """Gradient checkpointing, `layers.run`, for every part through which gradients pass."""
        for part in (self.qformer, self.aggregator, self.t5):
            if part is not None:
                part.recompute = mode

    @property
    def text(self) -> Text:
        if self._text is None:
            raise ValueError("this Lion was built without its tokenizers: use Lion.from_pretrained, or pass text=")
        return self._text

    @property
    def device(self) -> torch.device:
        return self.t5.shared.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in, whatever its linear layers are stored in."""
        return self.t5.shared.weight.dtype

    # --- from pictures and text to the encoder's states

    def encode_image(self, pixels: Tensor, questions: Sequence[str]) -> Tensor:  # (b, 3, s, s) -> (b, q + n, d)
        """The visual tokens in the order in which T5 reads them: Q-Former's first, then the aggregator's."""
        size = self.config.vit.image_size
        if pixels.shape[1:] != (3, size, size) or len(pixels) != len(questions):
            found = f"found {tuple(pixels.shape)} for {len(questions)} questions"
            raise ValueError(f"pixels must be (b, 3, {size}, {size}), one per question: {found}")
        check_questions(questions)
        taps = self.config.taps if self.aggregator is not None else ()
        pixels = pixels.to(self.device, self.dtype, non_blocking=True)
        pictures, which = pixels.unique(dim=0, return_inverse=True)  # questions about one share what is seen in it
        image, tapped = self.vit(pictures, taps)
        image, tapped = image[which], [tap[which] for tap in tapped]
        tokens = []
        if self.qformer is not None:
            limit = min(self.config.max_question_tokens, self.config.qformer.max_positions)
            ids = [self.text.words.encode(question, limit) for question in questions]
            tokens.append(self.qformer(image, *self.pad(ids, self.text.words.pad_id)))
        if self.aggregator is not None:
            tokens.append(self.aggregator(tapped))
        return torch.cat(tokens, dim=1)

    def pad(self, ids: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor | None]:  # -> (b, t), (b, t)
        """Rows of one length, and where their tokens are: None, which is everywhere, if nothing had to be padded."""
        length = max(map(len, ids))
        padded = torch.tensor([[*row, *[value] * (length - len(row))] for row in ids], device=self.device)
        if all(len(row) == length for row in ids):
            return padded, None
        ends = torch.tensor([len(row) for row in ids], device=self.device)
        return padded, torch.arange(length, device=self.device) < ends[:, None]

    def prompts(self, questions: Sequence[str], tags: Tags | None) -> list[str]:
        """The text that T5 reads: the tag sentence, unless the model works without tags, and the question."""
        check_questions(questions)
        if self.config.tags == "none":
            return list(questions)
        assert tags is not None
        check_tags(tags, len(questions))
        soft = self.config.tags == "soft"
        return [tag_sentence(one, soft) + question for one, question in zip(tags, questions, strict=True)]

    def encode(
        self, pixels: Tensor, prompts: Sequence[Sequence[int]], questions: Sequence[str], tasks: Sequence[str]
    ) -> tuple[Tensor, Tensor | None, Tensor]:  # -> (b, n, d), (b, n), (b,)
        """T5's encoder states over visual tokens and tokenised prompts, where they count, and the router's rows."""
        unknown = sorted(set(tasks) - set(TASKS))
        if unknown or len(tasks) != len(questions):
            raise ValueError(f"tasks must be 'image' or 'region', one per question: found {list(tasks)}")
        visual = self.encode_image(pixels, questions)
        ids, mask = self.pad(prompts, PAD)
        words = self.t5.shared(ids)
        if self.soft_prompt is not None:
            words = torch.where((ids == self.text.pieces.special[PLACEHOLDER])[..., None], self.soft_prompt, words)
        if mask is not None:
            mask = F.pad(mask, (visual.shape[1], 0), value=True)
        task = torch.tensor([TASKS.index(task) for task in tasks], device=self.device)
        return self.t5.encode(torch.cat((visual, words), dim=1), mask, task), mask, task

    def see(
        self, pixels: Tensor, questions: Sequence[str], tags: Tags | None, tasks: Sequence[str]
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """`encode` for answering: tags from RAM where none are given, prompts as long as they are."""
        if tags is None and self.config.tags != "none":
            tags = self.tag_pixels(pixels)
        prompts = [self.text.pieces.encode(prompt) for prompt in self.prompts(questions, tags)]
        return self.encode(pixels, prompts, questions, tasks)

    # --- training

    def training_prompt(self, question: str, tags: Sequence[str] | str) -> list[int]:
        """The prompt's ids in at most `max_prompt_tokens`: tags are dropped from the end, nothing else ever is."""
        tags = tags.split(", ") if isinstance(tags, str) else list(tags)
        while True:
            ids = self.text.pieces.encode(self.prompts([question], [tags])[0])
            if len(ids) <= self.config.max_prompt_tokens or not tags or self.config.tags == "none":
                return ids
            tags = tags[:-1]

    def forward(
        self,
        pixels: Tensor,
        questions: Sequence[str],
        answers: Sequence[str],
        tags: Tags | None,
        tasks: Sequence[str],
    ) -> Tensor:  # (b, 3, s, s) -> ()
        """The language-modelling loss: the mean cross-entropy over all answer tokens, `</s>` included."""
        logits, labels = self.logits(pixels, questions, answers, tags, tasks)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE)

    def logits(
        self,
        pixels: Tensor,
        questions: Sequence[str],
        answers: Sequence[str],
        tags: Tags | None,
        tasks: Sequence[str],
    ) -> tuple[Tensor, Tensor]:  # -> (b, t, v), (b, t)
        """The logits of every answer token given the ones before it, and the labels, IGNORE where padded."""
        if len(answers) != len(questions) or isinstance(answers, str):
            raise ValueError(f"answers must be one text per question: found {len(answers)} for {len(questions)}")
        if tags is None and self.config.tags != "none":
            tags = self.tag_pixels(pixels)
        if tags is not None:
            check_tags(tags, len(questions))
        prompts = [self.training_prompt(q, t) for q, t in zip(questions, tags or [""] * len(questions), strict=True)]
        states, mask, task = self.encode(pixels, prompts, questions, tasks)
        labels = self.pad([self.answer_ids(answer) for answer in answers], IGNORE)[0]
        return self.t5.predict(labels, self.t5.start(states, mask, task, labels.shape[1])), labels

    def answer_ids(self, answer: str) -> list[int]:
        return [*self.text.pieces.encode(answer)[:-1][: self.config.max_answer_tokens - 1], EOS]

    # --- answering

    @torch.inference_mode()
    def generate_ids(
        self,
        pixels: Tensor,
        questions: Sequence[str],
        tags: Tags | None,
        tasks: Sequence[str],
        settings: Generation = GENERATION["answer"],
    ) -> Tensor:  # (b, 3, s, s) -> (b * returns, t)
        return generate(self.t5, *self.see(pixels, questions, tags, tasks), settings)

    def generate(
        self,
        pixels: Tensor,
        questions: Sequence[str],
        tags: Tags | None,
        tasks: Sequence[str],
        settings: Generation = GENERATION["answer"],
    ) -> list[str] | list[list[str]]:
        """One string per sample, or a list of `settings.returns` strings per sample where that is more than one."""
        ids = self.generate_ids(pixels, questions, tags, tasks, settings).tolist()
        texts = [self.text.pieces.decode(row) for row in ids]
        if settings.returns == 1:
            return texts
        return [texts[i : i + settings.returns] for i in range(0, len(texts), settings.returns)]

    @torch.inference_mode()
    def rank(
        self,
        pixels: Tensor,
        questions: Sequence[str],
        tags: Tags | None,
        tasks: Sequence[str],
        candidates: Sequence[Sequence[str]],
        segment: int = 32,
    ) -> list[list[float]]:
        """The log-likelihood of each sample's candidates, `</s>` included: the greatest is the answer."""
        if len(candidates) != len(questions) or not all(candidates) or any(isinstance(c, str) for c in candidates):
            raise ValueError("candidates must be one list of texts per question, none of them empty")
        ids = [[self.text.pieces.encode(text) for text in texts] for texts in candidates]
        return log_likelihoods(self.t5, *self.see(pixels, questions, tags, tasks), ids, segment)

    # --- tags

    @torch.inference_mode()
    def tag(
        self,
        images: Sequence[Image.Image],
        threshold: float | None = None,
        top_k: int | None = None,
        return_scores: bool = False,
    ) -> list[list[str]] | list[list[tuple[str, float]]]:
        """RAM's tags of each picture in the tag list's order; `threshold` takes the place of each tag's own."""
        scored = self.scored_tags(images, threshold, top_k)
        return scored if return_scores else [[tag for tag, _ in tags] for tags in scored]

    def scored_tags(
        self, images: Sequence[Image.Image], threshold: float | None = None, top_k: int | None = None
    ) -> list[list[tuple[str, float]]]:
        size = self.tagger().config.image_size
        return self._tag(torch.stack([ram_transform(image, size) for image in images]), threshold, top_k)

    def tag_pixels(self, pixels: Tensor) -> list[list[str]]:
        """Tags of images that are already LION's input: resized to RAM's, so not quite what `tag` sees."""
        pictures, which = pixels.unique(dim=0, return_inverse=True)
        tagged = self._tag(ram_from_lion(pictures, self.tagger().config.image_size))
        return [[tag for tag, _ in tagged[i]] for i in which.tolist()]

    def tagger(self) -> Ram:
        if self.ram is None:
            raise ValueError("this LION has no tagger: give the tags, or convert the weights again with --ram")
        return self.ram

    @torch.no_grad()
    def _tag(
        self, pixels: Tensor, threshold: float | None = None, top_k: int | None = None
    ) -> list[list[tuple[str, float]]]:
        ram = self.tagger()
        scores = ram(pixels.to(self.device, self.dtype)).float().sigmoid().cpu()
        found = select(scores, torch.tensor(self.text.thresholds) if threshold is None else threshold, top_k)
        return [[(self.text.tags[i], score) for i, score in tags] for tags in found]

    # --- one picture at a time

    @torch.inference_mode()
    def respond(
        self,
        images: Sequence[Image.Image],
        questions: Sequence[str],
        tasks: Sequence[str],
        settings: Generation,
        tags: Tags | None = None,
    ) -> list[Answer]:
        """Answers about pictures as they are, any size: both transforms, tags, prompt, answer and its score."""
        pixels = torch.stack([lion_transform(image, self.config.vit.image_size) for image in images])
        if self.config.tags == "none":
            scored: list[list[tuple[str, float]]] = [[] for _ in images]
        elif tags is None:
            scored = self.scored_tags(images)
        else:
            check_tags(tags, len(questions))
            scored = [[(tag, 1.0) for tag in (one.split(", ") if isinstance(one, str) else one)] for one in tags]
        prompts = self.prompts(questions, [[tag for tag, _ in one] for one in scored])
        encoded = self.encode(pixels, [self.text.pieces.encode(prompt) for prompt in prompts], questions, tasks)
        ids = generate(self.t5, *encoded, settings)[:: settings.returns].tolist()
        written = [row[1 : row.index(EOS) + 1] if EOS in row else row[1:] for row in ids]
        sums = log_likelihoods(self.t5, *encoded, [[row] for row in written])
        return [
            Answer(self.text.pieces.decode(row), prompt, one, total[0] / len(row))
            for row, prompt, one, total in zip(written, prompts, scored, sums, strict=True)
        ]

    def caption(self, image: Image.Image) -> str:
        return self.respond([image], [EVAL_TEMPLATES["caption"]], ["image"], GENERATION["caption"])[0].text

    def answer(self, image: Image.Image, question: str) -> str:
        prompt = render(EVAL_TEMPLATES["vqa"], question=question)
        return self.respond([image], [prompt], ["image"], GENERATION["answer"])[0].text

    def locate(self, image: Image.Image, expression: str) -> Box | None:
        """The box of what the expression refers to; None if the model wrote no box."""
        prompt = render(EVAL_TEMPLATES["rec"], expression=expression)
        return Box.parse(self.respond([image], [prompt], ["region"], GENERATION["locate"])[0].text)

    def describe(self, image: Image.Image, box: Box) -> str:
        prompt = render(EVAL_TEMPLATES["reg"], box=box)
        return self.respond([image], [prompt], ["region"], GENERATION["describe"])[0].text


def check_tags(tags: Tags, count: int) -> None:
    if isinstance(tags, str) or len(tags) != count:
        raise ValueError(f"tags must be one list or text per question, found {tags!r:.60} for {count}")
    for i, one in enumerate(tags):
        if PLACEHOLDER in one or any(PLACEHOLDER in tag for tag in one):
            raise ValueError(f"the tags of question {i} hold {PLACEHOLDER}, which is the soft prompt's place")


def check_questions(questions: Sequence[str]) -> None:
    for i, question in enumerate(questions):
        if not question.strip():
            raise ValueError(f"question {i} is empty")
        if PLACEHOLDER in question:
            raise ValueError(f"question {i} holds {PLACEHOLDER}, which is the soft prompt's place: take it out")
