"""Pictures and words in, words and boxes out: everything around the model that is no tensor.

    lion = Lion.from_pretrained("tiny")
    lion.caption(image)    lion.answer(image, "what is he holding?")    lion.locate(image, "the dog on the left") -> Box

`Lion` holds a `LionModel` (model/lion.py) and its vocabularies. `Lion.batch` makes a `Batch` of tensors from pixels,
questions, tags and tasks. Questions about the same picture share its encoding.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .box import Box
from .config import EOS, IGNORE, PAD, LionConfig
from .files import check_tensors, read_folder, read_text, reading, shapes_of
from .images import lion_transform, ram_from_lion, ram_transform
from .model.generate import GENERATION, Generation, generate, log_likelihoods
from .model.lion import Batch, LionModel, skeleton
from .model.ram import Ram, select
from .quantize import best_dtype, to_int8, usable
from .text.prompts import EVAL_TEMPLATES, PLACEHOLDER, render, tag_sentence
from .text.vocabularies import Vocabularies

TINY = Path(__file__).parent / "assets" / "tiny"  # the weights in the package, trained on the toy world
DTYPES: dict[str, torch.dtype | Literal["auto"] | None] = {  # the scripts' --dtype
    "auto": "auto", "stored": None, "float32": torch.float32, "bfloat16": torch.bfloat16,
}  # fmt: skip
Texts = Sequence[str]
Images = Sequence[Image.Image]
Tags = Sequence[Texts] | Texts  # per sample a list, or one string in which they are joined by ", "
ANSWER = GENERATION["answer"]
Scored = list[tuple[str, float]]  # a picture's tags with RAM's scores


@dataclass(frozen=True)
class Answer:
    """What LION says about one picture, and what it was asked."""

    text: str
    prompt: str
    tags: Scored  # 1.0 for tags that were given
    score: float  # mean log-probability of the answer's tokens


class Lion:
    """A LION that takes pictures and text. `lion.model` is the torch module, `lion.text` its vocabularies."""

    def __init__(self, model: LionModel, text: Vocabularies):
        self.model, self.text, self.config = model, text, model.config

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | Literal["auto"] | None = torch.float32,
    ) -> "Lion":
        """The model in a folder that `weights.py convert` or training wrote, in eval mode; "tiny" is the built-in one.

        `dtype=None` keeps the stored one; "auto" is bfloat16 where the device computes in it, else float32. float16 is
        refused, because T5's feed-forward layers exceed its largest number, 65,504.
        """
        if dtype == torch.float16:
            raise ValueError("T5 overflows in float16: use bfloat16, or float32")
        device = usable(device)
        if dtype == "auto":
            dtype = best_dtype(device)
        folder = TINY if str(folder) == "tiny" else Path(folder)
        config = read_config(folder)
        text = Vocabularies.from_folder(folder, config)
        model = skeleton(config)
        tensors = read_folder(folder, device, dtype)
        if any(tensor.dtype == torch.int8 for tensor in tensors.values()):
            to_int8(model)
        check_tensors(folder, shapes_of(tensors), shapes_of(model.state_dict()))
        model.load_state_dict(tensors, strict=True, assign=True)
        return cls(model.eval().requires_grad_(False), text)

    @property
    def device(self) -> torch.device:
        return self.model.t5.shared.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its activations, also where linear layers are stored in int8."""
        return self.model.t5.shared.weight.dtype

    # --- from words to tensors

    def prompts(self, questions: Texts, tags: Tags | None) -> list[str]:
        """The text that T5 reads: the tag sentence, unless the model works without tags, and the question."""
        if self.config.tags == "none":
            return list(questions)
        assert tags is not None
        soft = self.config.tags == "soft"
        return [tag_sentence(one, soft) + question for one, question in zip(tags, questions, strict=True)]

    def batch(
        self, pixels: Tensor, questions: Texts, tags: Tags | None, tasks: Texts, answers: Texts | None = None
    ) -> Batch:
        """Tensors for the model. `tags=None` asks RAM. With `answers` prompts and answers have their training length.

        A ValueError says what is wrong with an argument.
        """
        self.check(pixels, questions, tags, tasks, answers)
        if tags is None and self.config.tags != "none":
            tags = self.tag_pixels(pixels)
        if answers is None:
            prompts = [self.text.pieces.encode(prompt) for prompt in self.prompts(questions, tags)]
        else:
            pairs = zip(questions, tags or [""] * len(questions), strict=True)
            prompts = [self.training_prompt(question, one) for question, one in pairs]
        limit = min(self.config.max_question_tokens, self.config.qformer.max_positions)
        question, question_mask = pad([self.text.words.encode(q, limit) for q in questions], self.text.words.pad_id)
        prompt, prompt_mask = pad(prompts, PAD)
        pictures, which = pixels.unique(dim=0, return_inverse=True)
        batch = Batch(
            *(pictures, which, question, question_mask, prompt, prompt_mask),
            soft=prompt == self.text.pieces.special[PLACEHOLDER],
            task=torch.tensor([self.config.tasks.index(task) for task in tasks]),
            labels=None if answers is None else pad([self.answer_ids(answer) for answer in answers], IGNORE)[0],
        )
        return batch.to(self.device, self.dtype)

    def training_prompt(self, question: str, tags: Sequence[str] | str) -> list[int]:
        """The prompt's ids, at most `max_prompt_tokens` if that is possible: tags are dropped from the end."""
        tags = tags.split(", ") if isinstance(tags, str) else tags

        def ids(count: int) -> list[int]:
            return self.text.pieces.encode(self.prompts([question], [tags[:count]])[0])

        most = self.config.max_prompt_tokens
        if self.config.tags == "none" or len(ids(len(tags))) <= most:
            return ids(len(tags))
        return ids(max(0, bisect.bisect_right(range(len(tags)), most, key=lambda count: len(ids(count))) - 1))

    def answer_ids(self, answer: str) -> list[int]:
        return [*self.text.pieces.encode(answer)[:-1][: self.config.max_answer_tokens - 1], EOS]

    def check(
        self, pixels: Tensor, questions: Texts, tags: Tags | None, tasks: Texts, answers: Texts | None = None
    ) -> None:
        size, count = self.config.vit.image_size, len(questions)
        if pixels.shape[1:] != (3, size, size) or len(pixels) != count:
            found = f"found {tuple(pixels.shape)} for {count} questions"
            raise ValueError(f"pixels must be (b, 3, {size}, {size}), one per question: {found}")
        if set(tasks) - set(self.config.tasks) or len(tasks) != count:
            known = " or ".join(map(repr, sorted(self.config.tasks)))
            raise ValueError(f"tasks must be {known}, one per question: found {list(tasks)}")
        if answers is not None and (len(answers) != count or isinstance(answers, str)):
            raise ValueError(f"answers must be one text per question: found {len(answers)} for {count}")
        if tags is not None and (len(tags) != count or isinstance(tags, str)):
            raise ValueError(f"tags must be one list or text per question, found {tags!r:.60} for {count}")
        for i, question in enumerate(questions):
            if not question.strip():
                raise ValueError(f"question {i} is empty")
            if PLACEHOLDER in question:
                raise ValueError(f"question {i} holds {PLACEHOLDER}, which is the soft prompt's place: take it out")
        for i, one in enumerate(tags or ()):
            if PLACEHOLDER in one or any(PLACEHOLDER in tag for tag in one):
                raise ValueError(f"the tags of question {i} hold {PLACEHOLDER}, which is the soft prompt's place")

    # --- the model's outputs

    def __call__(
        self, pixels: Tensor, questions: Texts, answers: Texts, tags: Tags | None, tasks: Texts
    ) -> Tensor:  # (b, 3, s, s) -> ()
        """The language-modelling loss: the mean cross-entropy over all answer tokens, `</s>` included."""
        return self.model(self.batch(pixels, questions, tags, tasks, answers))

    def encode_image(self, pixels: Tensor, questions: Texts) -> Tensor:  # (b, 3, s, s) -> (b, q + n, d)
        """The visual tokens as T5 reads them: the Q-Former's, then the aggregator's."""
        count = len(questions)
        return self.model.see(self.batch(pixels, questions, [""] * count, self.config.tasks[:1] * count))

    @torch.inference_mode()
    def generate_ids(
        self, pixels: Tensor, questions: Texts, tags: Tags | None, tasks: Texts, settings: Generation = ANSWER
    ) -> Tensor:  # (b, 3, s, s) -> (b * returns, t)
        batch = self.batch(pixels, questions, tags, tasks)
        return generate(self.model.t5, *self.model.encode(batch), batch.task, settings)

    def generate(
        self, pixels: Tensor, questions: Texts, tags: Tags | None, tasks: Texts, settings: Generation = ANSWER
    ) -> list[str] | list[list[str]]:
        """One string per sample, or a list of `settings.returns` strings per sample if that is more than one."""
        ids = self.generate_ids(pixels, questions, tags, tasks, settings).tolist()
        texts = [self.text.pieces.decode(row) for row in ids]
        if settings.returns == 1:
            return texts
        return [texts[i : i + settings.returns] for i in range(0, len(texts), settings.returns)]

    @torch.inference_mode()
    def rank(
        self,
        pixels: Tensor,
        questions: Texts,
        tags: Tags | None,
        tasks: Texts,
        candidates: Sequence[Texts],
        segment: int = 32,
    ) -> list[list[float]]:
        """The log-likelihood of each sample's candidates, `</s>` included: the greatest is the answer."""
        if len(candidates) != len(questions) or not all(candidates) or any(isinstance(c, str) for c in candidates):
            raise ValueError("candidates must be one list of texts per question, none of them empty")
        ids = [[self.text.pieces.encode(text) for text in texts] for texts in candidates]
        batch = self.batch(pixels, questions, tags, tasks)
        return log_likelihoods(self.model.t5, *self.model.encode(batch), batch.task, ids, segment)

    # --- tags

    def tag(
        self, images: Images, threshold: float | None = None, top_k: int | None = None, return_scores: bool = False
    ) -> list[list[str]] | list[Scored]:
        """RAM's tags of each picture in the tag list's order; `threshold` replaces every tag's own."""
        scored = self.scored_tags(images, threshold, top_k)
        return scored if return_scores else [[tag for tag, _ in tags] for tags in scored]

    def scored_tags(self, images: Images, threshold: float | None = None, top_k: int | None = None) -> list[Scored]:
        size = self.ram.config.image_size
        return self.ram_tags(torch.stack([ram_transform(image, size) for image in images]), threshold, top_k)

    def tag_pixels(self, pixels: Tensor) -> list[list[str]]:
        """Tags of pictures that are already the ViT's input: resized to RAM's, so `tag` may differ a little."""
        pictures, which = pixels.unique(dim=0, return_inverse=True)
        tagged = self.ram_tags(ram_from_lion(pictures, self.ram.config.image_size))
        return [[tag for tag, _ in tagged[i]] for i in which.tolist()]

    @torch.no_grad()
    def ram_tags(self, pixels: Tensor, threshold: float | None = None, top_k: int | None = None) -> list[Scored]:
        """Tags and scores of pictures that are RAM's input (b, 3, s, s)."""
        scores = self.ram(pixels.to(self.device, self.dtype)).float().sigmoid().cpu()
        chosen = select(scores, torch.tensor(self.text.thresholds) if threshold is None else threshold, top_k)
        return [[(self.text.tags[i], score) for i, score in tags] for tags in chosen]

    @property
    def ram(self) -> Ram:
        if self.model.ram is None:
            raise ValueError("this LION has no tagger: give the tags, or convert the weights again with --ram")
        return self.model.ram

    # --- one picture at a time

    @torch.inference_mode()
    def respond(
        self, images: Images, questions: Texts, tasks: Texts, settings: Generation, tags: Tags | None = None
    ) -> list[Answer]:
        """Answers about pictures of any size: both transforms, tags, prompt, answer and its score."""
        pixels = torch.stack([lion_transform(image, self.config.vit.image_size) for image in images])
        self.check(pixels, questions, tags, tasks)
        if self.config.tags == "none":
            scored: list[Scored] = [[] for _ in images]
        elif tags is None:
            scored = self.scored_tags(images)
        else:
            scored = [[(tag, 1.0) for tag in (one.split(", ") if isinstance(one, str) else one)] for one in tags]
        names = [[tag for tag, _ in one] for one in scored]
        batch = self.batch(pixels, questions, names, tasks)
        encoded = (*self.model.encode(batch), batch.task)
        ids = generate(self.model.t5, *encoded, settings)[:: settings.returns].tolist()
        written = [row[1 : row.index(EOS) + 1] if EOS in row else row[1:] for row in ids]
        sums = log_likelihoods(self.model.t5, *encoded, [[row] for row in written])
        return [
            Answer(self.text.pieces.decode(row), prompt, one, total[0] / len(row))
            for row, prompt, one, total in zip(written, self.prompts(questions, names), scored, sums, strict=True)
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
        """A phrase for what is in the box."""
        prompt = render(EVAL_TEMPLATES["reg"], box=box)
        return self.respond([image], [prompt], ["region"], GENERATION["describe"])[0].text


def pad(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor | None]:  # -> (b, t), (b, t)
    """Pad to a rectangle. Returns (ids, mask); mask is None if no padding was needed."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, None if min(lengths) == max(lengths) else torch.arange(ids.shape[1]) < lengths[:, None]


def read_config(folder: Path) -> LionConfig:
    """The config.json of a folder that weights.py convert or training wrote."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: it is not a folder of weights.py or train.py")
    with reading(path):
        return LionConfig.from_json(read_text(path))
