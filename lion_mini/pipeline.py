"""Pictures and words in, words and boxes out: everything around the model that is no tensor.

    lion = Lion.from_pretrained("tiny")
    lion.caption(image)    lion.answer(image, "what is he holding?")    lion.locate(image, "the dog on the left") -> Box

`Lion` holds a `LionModel` (model/lion.py) and its vocabularies; `Lion.batch` makes a `Batch` of tensors for it.
"""

from bisect import bisect_right
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
from .files import check_tensors, read_folder, read_text, reading
from .images import lion_transform, ram_from_lion, ram_transform
from .model.generate import GENERATION, Generation, generate, log_likelihoods
from .model.lion import Batch, LionModel, skeleton
from .model.ram import Ram, select
from .quantize import best_dtype, to_int8, usable
from .text.prompts import EVAL_TEMPLATES, PLACEHOLDER, TASK_OF, render, tag_sentence
from .text.vocabularies import Vocabularies

TINY = Path(__file__).parent / "assets" / "tiny"  # the weights in the package, trained on the toy world
DType = torch.dtype | Literal["auto"] | None  # auto: bfloat16 where the device computes in it; None: as stored
DTYPES: dict[str, DType] = {"auto": "auto", "stored": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
MAX_TOKENS = 4096  # eight times what T5 was trained on; XL's scores then take 2.5 GB per layer and sample
Texts = Sequence[str]
Images = Sequence[Image.Image]
Tags = Sequence[Texts] | Texts | None  # per question a list, or one text joined by ", "; None: RAM's
Scored = list[tuple[str, float]]  # a picture's tags with RAM's scores


@dataclass(frozen=True)
class Answer:
    """What LION says about one picture, and what it was asked."""

    text: str
    prompt: str
    tags: Scored  # 1.0 for tags that were given
    score: float  # mean log-probability of the answer's tokens
    ids: Sequence[int] = ()  # T5's


class Lion:
    """A LION that takes pictures and text. `lion.model` is the torch module, `lion.text` its vocabularies."""

    def __init__(self, model: LionModel, text: Vocabularies):
        self.model, self.text, self.config = model, text, model.config

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str | torch.device = "cpu", dtype: DType = torch.float32
    ) -> "Lion":
        """The model in a folder of `weights.py convert` or of training, in eval mode; "tiny" is the built-in one."""
        if dtype not in DTYPES.values():
            raise ValueError(f"T5 may overflow in {dtype}: give float32, bfloat16, 'auto' or None")
        device, folder = usable(device), TINY if str(folder) == "tiny" else Path(folder)
        config = read_config(folder)
        text = Vocabularies.from_folder(folder, config)
        with reading(folder / "config.json"):
            model = skeleton(config)
        tensors = read_folder(folder, device, best_dtype(device) if dtype == "auto" else dtype)
        to_int8(model, {name for name, tensor in tensors.items() if tensor.dtype == torch.int8})
        check_tensors(folder, tensors, model.state_dict())
        model.load_state_dict(tensors, assign=True)
        return cls(model.eval().requires_grad_(False), text)

    @property
    def device(self) -> torch.device:
        return self.model.t5.shared.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its activations, also where linear layers are stored in int8."""
        return self.model.t5.shared.weight.dtype

    # --- words -> Batch

    def batch(self, pixels: Tensor, questions: Texts, tags: Tags, tasks: Texts, answers: Texts | None = None) -> Batch:
        """Pixels (b, 3, s, s) and words as tensors. With `answers` (training) T5's texts are cut."""
        self.check(pixels, questions, tags, tasks, answers)
        # 1. Tags, unless they are given.
        if tags is None:
            tags = [""] * len(questions) if self.config.tags == "none" else self.tag_pixels(pixels)
        # 2. Words to ids: the question for the Q-Former, tags and question for T5.
        limit = min(self.config.max_question_tokens, self.config.qformer.max_positions)
        question, question_mask = pad([self.text.words.encode(q, limit) for q in questions], self.text.words.pad_id)
        if answers is None:
            prompts = [self.text.pieces.encode(prompt) for prompt in self.prompts(questions, tags)]
        else:
            prompts = list(map(self.training_prompt, questions, tags))
        if (longest := max(map(len, prompts), default=0)) > MAX_TOKENS:
            raise ValueError(f"a question and its tags have {longest:,} tokens, but T5 reads at most {MAX_TOKENS:,}")
        prompt, prompt_mask = pad(prompts, PAD)
        # 3. Each picture once.
        pictures, which = pixels.unique(dim=0, return_inverse=True)
        return Batch(
            *(pictures, which, question, question_mask, prompt, prompt_mask),
            soft=prompt == self.text.pieces.special[PLACEHOLDER],
            task=torch.tensor([self.config.tasks.index(task) for task in tasks]),
            labels=None if answers is None else pad([self.answer_ids(answer) for answer in answers], IGNORE)[0],
        ).to(self.device, self.dtype)

    def check(self, pixels: Tensor, questions: Texts, tags: Tags, tasks: Texts, answers: Texts | None = None) -> None:
        """A ValueError says what is wrong with an argument."""
        size, count = self.config.vit.image_size, len(questions)
        for name, values in (("pixels", pixels), ("tags", tags), ("tasks", tasks), ("answers", answers)):
            if values is not None and (isinstance(values, str) or len(values) != count):
                found = f"a {type(values).__name__} of {len(values)}"
                raise ValueError(f"{name} must have one entry for each of {count} questions, found {found}")
        if pixels.shape[1:] != (3, size, size):
            raise ValueError(f"pixels must be (b, 3, {size}, {size}), found {tuple(pixels.shape)}")
        if unknown := set(tasks) - set(self.config.tasks):
            raise ValueError(f"the task {min(unknown)!r} is unknown; there are {', '.join(self.config.tasks)}")
        for i, (question, words) in enumerate(zip(questions, tags or [""] * count, strict=True)):
            if not question.strip():
                raise ValueError(f"question {i} is empty")
            if PLACEHOLDER in "".join([question, *words]):
                raise ValueError(f"question {i} or its tags hold {PLACEHOLDER}, which is the soft prompt's place")

    def prompts(self, questions: Texts, tags: Sequence[Texts]) -> list[str]:
        """The texts that T5 reads: the tag sentence, unless the model works without tags, and the question."""
        if self.config.tags == "none":
            return list(questions)
        soft = self.config.tags == "soft"
        return [tag_sentence(words, soft) + question for words, question in zip(tags, questions, strict=True)]

    def training_prompt(self, question: str, tags: Texts) -> list[int]:
        """The prompt's ids, at most `max_prompt_tokens` if that is possible: tags are dropped from the end."""
        tags = tags.split(", ") if isinstance(tags, str) else tags
        encode = lambda count: self.text.pieces.encode(self.prompts([question], [tags[:count]])[0])
        fit = bisect_right(range(len(tags) + 1), self.config.max_prompt_tokens, key=lambda count: len(encode(count)))
        return encode(max(0, fit - 1))

    def answer_ids(self, answer: str) -> list[int]:
        return [*self.text.pieces.encode(answer)[:-1][: self.config.max_answer_tokens - 1], EOS]

    # --- Batch -> model -> words

    def __call__(self, pixels: Tensor, questions: Texts, answers: Texts, tags: Tags, tasks: Texts) -> Tensor:  # -> ()
        """The language-modelling loss: the mean cross-entropy over all answer tokens, `</s>` included."""
        return self.model(self.batch(pixels, questions, tags, tasks, answers))

    def encode_image(self, pixels: Tensor, questions: Texts) -> Tensor:  # (b, 3, s, s) -> (b, q + n, d)
        """The visual tokens as T5 reads them: the Q-Former's, then the aggregator's."""
        count = len(questions)
        return self.model.see(self.batch(pixels, questions, [""] * count, self.config.tasks[:1] * count))

    @torch.inference_mode()
    def generate_ids(
        self, pixels: Tensor, questions: Texts, tags: Tags, tasks: Texts, settings: Generation = GENERATION["answer"]
    ) -> Tensor:  # (b, 3, s, s) -> (b * returns, t)
        batch = self.batch(pixels, questions, tags, tasks)
        return generate(self.model.t5, *self.model.encode(batch), batch.task, settings)

    def generate(
        self, pixels: Tensor, questions: Texts, tags: Tags, tasks: Texts, settings: Generation = GENERATION["answer"]
    ) -> list[str] | list[list[str]]:
        """One string per sample, or a list of `settings.returns` strings per sample if that is more than one."""
        ids, n = self.generate_ids(pixels, questions, tags, tasks, settings).tolist(), settings.returns
        texts = [self.text.pieces.decode(row) for row in ids]
        return texts if n == 1 else [texts[i : i + n] for i in range(0, len(texts), n)]

    @torch.inference_mode()
    def rank(
        self, pixels: Tensor, questions: Texts, tags: Tags, tasks: Texts, candidates: Sequence[Texts], segment: int = 32
    ) -> list[list[float]]:
        """The log-likelihood of each sample's candidates, `</s>` included: the greatest is the answer."""
        if len(candidates) != len(questions) or not all(candidates) or any(isinstance(c, str) for c in candidates):
            raise ValueError("candidates must be one list of texts per question, none of them empty")
        ids = [[self.text.pieces.encode(text) for text in texts] for texts in candidates]
        if (longest := max(len(row) for rows in ids for row in rows)) > 512:  # 32 of them take 2 GB
            raise ValueError(f"a candidate has {longest:,} tokens, but at most 512 can be ranked")
        batch = self.batch(pixels, questions, tags, tasks)
        return log_likelihoods(self.model.t5, *self.model.encode(batch), batch.task, ids, segment)

    # --- pictures -> tags

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

    # --- pictures and words -> answers

    @torch.inference_mode()
    def respond(
        self, images: Images, questions: Texts, tasks: Texts, settings: Generation, tags: Tags = None
    ) -> list[Answer]:
        """Answers about pictures of any size: both transforms, tags, prompt, answer and its score."""
        pixels = torch.stack([lion_transform(image, self.config.vit.image_size) for image in images])
        self.check(pixels, questions, tags, tasks)
        given: Tags = [()] * len(images) if self.config.tags == "none" else tags
        if given is None:
            scored = self.scored_tags(images)
        else:
            scored = [[(tag, 1.0) for tag in (row.split(", ") if isinstance(row, str) else row)] for row in given]
        names = [[tag for tag, _ in row] for row in scored]
        batch = self.batch(pixels, questions, names, tasks)
        encoded = (*self.model.encode(batch), batch.task)
        ids = generate(self.model.t5, *encoded, settings)[:: settings.returns].tolist()
        written = [row[1 : row.index(EOS) + 1] if EOS in row else row[1:] for row in ids]
        sums = log_likelihoods(self.model.t5, *encoded, [[row] for row in written])
        return [
            Answer(self.text.pieces.decode(row), prompt, tags, total / len(row), row)
            for row, prompt, tags, [total] in zip(written, self.prompts(questions, names), scored, sums, strict=True)
        ]

    def instruction(self, kind: str) -> str:
        """How these weights are asked: the paper's evaluation instruction, unless their config has another."""
        return self.config.instructions.get(kind, EVAL_TEMPLATES[kind])

    def ask(self, image: Image.Image, kind: str, settings: Generation, **fields: str | Box) -> str:
        """The answer to the instruction of a kind, such as "vqa"."""
        return self.respond([image], [render(self.instruction(kind), **fields)], [TASK_OF[kind]], settings)[0].text

    def caption(self, image: Image.Image) -> str:
        return self.ask(image, "caption", GENERATION["caption"])

    def answer(self, image: Image.Image, question: str) -> str:
        return self.ask(image, "vqa", GENERATION["answer"], question=question)

    def locate(self, image: Image.Image, expression: str) -> Box | None:
        """The box of what the expression refers to; None if the model wrote no box."""
        return Box.parse(self.ask(image, "rec", GENERATION["locate"], expression=expression))

    def describe(self, image: Image.Image, box: Box) -> str:
        """A phrase for what is in the box."""
        return self.ask(image, "reg", GENERATION["describe"], box=box)


def pad(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor | None]:  # -> (b, t), (b, t)
    """Pad to a rectangle. Returns (ids, mask); mask is None if no padding was needed."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, None if min(lengths) == max(lengths) else torch.arange(ids.shape[1]) < lengths[:, None]


def read_config(folder: Path) -> LionConfig:
    """The config.json of a folder that weights.py convert or training wrote."""
    if not (path := folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: it is not a folder of weights.py or train.py")
    with reading(path):
        return LionConfig.from_json(read_text(path))
