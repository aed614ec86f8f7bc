"""Micro-batches from several sources, in an order that is a pure function of the seed.

Nothing here has a state. Sample p of a run follows from the seed and p alone, so any process can make any batch, and a
resumed run needs no saved position. However many ranks share a batch, it is the same batch:

    position     0 1 2 3 4 5 6 7 8 | 9 ...        epoch 0, shuffled by (seed, 0): every record once | epoch 1 ...
    micro-batch  |0 ||1 ||2 ||3 |                 of 2 samples; rank r of w takes micro-batches r, r + w, r + 2w, ...

A record that cannot be used is named and replaced by the next usable one of its source, so no micro-batch is empty.
"""

import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..images import augment, lion_transform, ram_transform
from ..model.lion import Batch
from ..pipeline import Lion
from .records import Example, Source

PATIENCE = 100  # unusable records in a row that end a run


class Mixture:
    """Several sources in the order of one seed: `at(p)` says which record of which source stands at position p.

    An epoch is as long as all sources together. Without ratios every record comes once. With ratios each source has its
    share of the epoch: a small one repeats, a large one continues in the next epoch where it stopped.
    """

    def __init__(self, sources: Sequence[Source], ratios: Sequence[float] | None, seed: int):
        self.sources, self.seed = sources, seed
        sizes = np.array([len(source) for source in sources])
        self.length = int(sizes.sum())
        shares = sizes / self.length
        if ratios is not None:
            if len(ratios) != len(sources) or not min(ratios) > 0:
                raise ValueError(f"ratios must be {len(sources)} numbers above 0, one per file, not {list(ratios)}")
            shares = np.array(ratios) / sum(ratios)
        self.bounds = np.concatenate(([0.0], np.cumsum(shares)[:-1], [1.0]))
        self._epoch, self._plan = -1, np.empty((0, 2), np.int64)

    def drawn(self, epochs: int) -> np.ndarray:  # -> (sources,)
        """How many samples each source has given after so many epochs."""
        return np.diff(np.rint(self.bounds * (self.length * epochs)).astype(np.int64))

    def plan(self, epoch: int) -> np.ndarray:  # -> (length, 2)
        """The epoch's samples in order: number of the source, and of the record in it."""
        if epoch != self._epoch:
            rows = []
            for i, (first, last) in enumerate(zip(self.drawn(epoch), self.drawn(epoch + 1), strict=True)):
                size = len(self.sources[i])
                passes = range(first // size, -(-last // size))
                order = [np.random.default_rng((self.seed, 1 + i, n)).permutation(size) for n in passes]
                start = passes.start * size
                chosen = np.concatenate([*order, np.empty(0, np.int64)])[first - start : last - start]
                rows.append(np.stack((np.full_like(chosen, i), chosen), axis=1))
            self._plan = np.random.default_rng((self.seed, 0, epoch)).permutation(np.concatenate(rows))
            self._epoch = epoch
        return self._plan

    def at(self, position: int) -> tuple[int, int, int]:  # -> epoch, source, record
        epoch, offset = divmod(position, self.length)
        source, index = self.plan(epoch)[offset].tolist()
        return epoch, source, index


@dataclass(frozen=True)
class Samples:
    """A micro-batch as a worker makes it: pictures as tensors, words still as words."""

    pixels: Tensor  # (b, 3, s, s), the ViT's input
    ram_pixels: Tensor | None  # (u, 3, r, r), RAM's input, for the u samples without tags
    questions: list[str]
    answers: list[str]
    tags: list[list[str] | None]
    tasks: list[str]
    names: list[str]
    bad: list[str]  # a sentence for each record that was replaced

    def pin_memory(self) -> "Samples":
        """Called by DataLoader."""
        return replace(self, pixels=self.pixels.pin_memory())


class MicroBatches(Dataset):
    """Micro-batch g of a run: the samples at positions g * size and following. `ram_size=None` asks for no tags."""

    def __init__(self, mixture: Mixture, size: int, image_size: int, ram_size: int | None = None):
        self.mixture, self.size, self.image_size, self.ram_size = mixture, size, image_size, ram_size

    def __getitem__(self, g: int) -> Samples | ValueError:
        examples, pixels, untagged, bad = [], [], [], list[str]()
        for position in range(g * self.size, (g + 1) * self.size):
            try:
                example, rng, augmented = self.usable(position, bad)
            except ValueError as error:
                return error  # raised in a worker, it would bring a traceback along
            examples.append(example)
            transform = partial(augment, rng=rng) if augmented else lion_transform
            pixels.append(transform(example.image, self.image_size))
            if example.tags is None and self.ram_size:
                untagged.append(ram_transform(example.image, self.ram_size))
        return Samples(
            torch.stack(pixels),
            torch.stack(untagged) if untagged else None,
            [example.question for example in examples],
            [example.answer for example in examples],
            [example.tags for example in examples],
            [example.task for example in examples],
            [example.name for example in examples],
            bad,
        )

    def usable(self, position: int, bad: list[str]) -> tuple[Example, random.Random, bool]:
        """The example at a position or the next usable one of its source, and whether to augment it."""
        epoch, number, index = self.mixture.at(position)
        source = self.mixture.sources[number]
        for _ in range(min(PATIENCE, len(source))):
            rng = random.Random(f"{self.mixture.seed} {epoch} {number} {index}")
            try:
                example = source.read(index, rng)
                return example, rng, source.augments and example.task == "image"
            except ValueError as error:
                bad.append(str(error))
                index = (index + 1) % len(source)
        raise ValueError(f"{min(PATIENCE, len(source))} records in a row cannot be used: {bad[-1]}")


def micro_batches(batches: MicroBatches, numbers: Sequence[int], workers: int) -> Iterator[tuple[int, Samples]]:
    """These micro-batches in this order, with their numbers, prepared by so many worker processes (0: by this one)."""
    pin = torch.cuda.is_available()
    loader = DataLoader(
        batches, batch_size=None, sampler=numbers, num_workers=workers, worker_init_fn=ignore_signals, pin_memory=pin
    )
    for number, samples in zip(numbers, loader, strict=True):
        if isinstance(samples, ValueError):
            raise samples
        yield number, samples


def ignore_signals(worker: int) -> None:
    """A terminal's Ctrl-C reaches every process. The main one decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def collate(lion: Lion, samples: Samples) -> Batch:
    """The model's tensors: untagged samples are tagged by RAM, from the whole picture; words are tokenised."""
    found = iter(lion.ram_tags(samples.ram_pixels) if samples.ram_pixels is not None else ())
    tags = [[tag for tag, _ in next(found, ())] if one is None else one for one in samples.tags]
    return lion.batch(samples.pixels, samples.questions, tags, samples.tasks, samples.answers)
