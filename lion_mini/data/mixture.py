"""Micro-batches from several sources, in an order that is a pure function of the seed.

Nothing here has a state. Sample p of a run follows from the seed and p alone, so any process can make any batch, and a
resumed run needs no saved position. However many ranks share a batch, it is the same batch:

    position     0 1 2 3 4 5 6 7 8 | 9 ...        epoch 0, shuffled by (seed, 0): every record once | epoch 1 ...
    micro-batch  |0 ||1 ||2 ||3 |                 of 2 samples; rank r of w takes micro-batches r, r + w, r + 2w, ...

A record that cannot be used is named and replaced by the next usable one of its source, so no micro-batch is empty.
"""

import math
import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..images import augment, lion_transform, ram_transform
from ..model.lion import Batch
from ..pipeline import Lion
from .records import Source, TrainingExample

PATIENCE = 100  # unusable records in a row that end a run


class Mixture:
    """Several sources in the order of one seed: `at(p)` says which record of which source stands at position p.

    An epoch is as long as all sources together. Without ratios every record comes once. With ratios each source has its
    share of the epoch: a small one repeats, a large one continues in the next epoch where it stopped.
    """

    def __init__(self, sources: Sequence[Source], ratios: Sequence[float] | None, seed: int):
        self.sources, self.seed, self._epoch = sources, seed, -1
        sizes = [len(source) for source in sources]
        weights = sizes if ratios is None else ratios
        if len(weights) != len(sources) or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"ratios must be {len(sources)} numbers above 0, one per file, not {list(weights)}")
        self.length, self.bounds = sum(sizes), np.array([0, *np.cumsum(np.array(weights) / sum(weights))[:-1], 1])

    def at(self, position: int) -> tuple[int, int, int]:  # -> epoch, source, record
        epoch, offset = divmod(position, self.length)
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self.plan(epoch)
        source, record = self._plan[offset].tolist()
        return epoch, source, record

    def plan(self, epoch: int) -> np.ndarray:  # -> (length, 2)
        """The epoch's samples in order: number of the source, and of the record in it."""
        rows = []
        given = np.rint(np.outer((epoch * self.length, (epoch + 1) * self.length), self.bounds)).astype(np.int64)
        for i, (first, last) in enumerate(np.diff(given).T.tolist()):  # samples of source i before and after the epoch
            size = len(self.sources[i])
            passes = range(first // size, last // size + 1)
            order = [np.random.default_rng((self.seed, 1 + i, n)).permutation(size) for n in passes]
            records = np.concatenate(order)[first % size :][: last - first]
            rows.append(np.stack((np.full_like(records, i), records), axis=1))
        return np.random.default_rng((self.seed, 0, epoch)).permutation(np.concatenate(rows))


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


class MicroBatches(Dataset):
    """Micro-batch g of a run: the samples at positions g * size and following. `ram_size=None` asks for no tags."""

    def __init__(self, mixture: Mixture, size: int, image_size: int, ram_size: int | None = None):
        self.mixture, self.size, self.image_size, self.ram_size = mixture, size, image_size, ram_size

    def __getitem__(self, g: int) -> Samples | ValueError:
        pixels, examples, bad = list[Tensor](), list[TrainingExample](), list[str]()
        for position in range(g * self.size, (g + 1) * self.size):
            epoch, number, index = self.mixture.at(position)
            source = self.mixture.sources[number]
            for _ in range(patience := min(PATIENCE, len(source))):
                rng = random.Random(f"{self.mixture.seed} {epoch} {number} {index}")
                try:
                    example = source.read(index, rng)
                    break
                except ValueError as error:
                    bad.append(str(error))
                    index = (index + 1) % len(source)
            else:  # returned, because raised in a worker it would bring a traceback along
                return ValueError(f"{patience} records in a row cannot be used: {bad[-1]}")
            transform = partial(augment, rng=rng) if source.augments and example.task == "image" else lion_transform
            pixels.append(transform(example.image, self.image_size))
            examples.append(example)
        untagged = [ram_transform(e.image, self.ram_size) for e in examples if self.ram_size and e.tags is None]
        words = zip(*((e.question, e.answer, e.tags, e.task, e.name) for e in examples), strict=True)
        return Samples(torch.stack(pixels), torch.stack(untagged) if untagged else None, *map(list, (*words, bad)))


def micro_batches(batches: MicroBatches, numbers: Sequence[int], workers: int) -> Iterator[tuple[int, Samples]]:
    """These micro-batches in this order, with their numbers, prepared by so many worker processes (0: by this one)."""
    loader = DataLoader(batches, None, sampler=numbers, num_workers=workers, worker_init_fn=ignore_signals)
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
    by_ram = iter([] if samples.ram_pixels is None else lion.ram_tags(samples.ram_pixels))
    tags = [[tag for tag, _ in next(by_ram, ())] if given is None else given for given in samples.tags]
    return lion.batch(samples.pixels, samples.questions, tags, samples.tasks, samples.answers)
