"""Several sources of examples in one order that is a pure function of the seed, and micro-batches of them."""

import random
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..images import augment, lion_transform
from .records import Example, Source


@dataclass(frozen=True)
class Batch:
    """Examples side by side, as `Lion.logits` takes them, and a sentence for each one that could not be read."""

    pixels: Tensor  # (b, 3, s, s)
    questions: list[str]
    answers: list[str]
    tags: list[list[str] | None]
    tasks: list[str]
    names: list[str]
    bad: list[str]

    def pin_memory(self) -> "Batch":
        """For DataLoader, which does not look into classes that it does not know."""
        return replace(self, pixels=self.pixels.pin_memory())


class Mixture:
    """Several sources in the order of one seed: `at(p)` says which record of which source stands at position p.

    An epoch is as long as all sources together. With ratios each has its share of it: a small source comes several
    times, a large one goes on in the next epoch where it stopped. Without, every record comes exactly once.
    """

    def __init__(self, sources: Sequence[Source], ratios: Sequence[float] | None, seed: int):
        self.sources, self.seed = sources, seed
        sizes = np.array([len(source) for source in sources])
        self.length = int(sizes.sum())
        shares = sizes / self.length
        if ratios is not None:
            if len(ratios) != len(sources) or min(ratios) <= 0:
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


class MicroBatches(Dataset):
    """Micro-batch g of a run: the samples at positions g * size and following."""

    def __init__(self, mixture: Mixture, size: int, image_size: int):
        self.mixture, self.size, self.image_size = mixture, size, image_size

    def __getitem__(self, g: int) -> Batch:
        examples, pixels, bad = [], [], []
        for position in range(g * self.size, (g + 1) * self.size):
            epoch, number, index = self.mixture.at(position)
            source, rng = self.mixture.sources[number], random.Random(f"{self.mixture.seed} {epoch} {number} {index}")
            try:
                example = source.read(index, rng)
            except ValueError as error:
                bad.append(str(error))
                continue
            mirrored = source.augments and example.task == "image"
            size = self.image_size
            pixels.append(augment(example.image, size, rng) if mirrored else lion_transform(example.image, size))
            examples.append(example)
        return collate(examples, pixels, bad, self.image_size)


def collate(examples: Sequence[Example], pixels: Sequence[Tensor], bad: Sequence[str], size: int) -> Batch:
    return Batch(
        torch.stack([*pixels]) if pixels else torch.empty(0, 3, size, size),
        [example.question for example in examples],
        [example.answer for example in examples],
        [example.tags for example in examples],
        [example.task for example in examples],
        [example.name for example in examples],
        [*bad],
    )


def loader(batches: MicroBatches, numbers: Iterable[int], workers: int) -> DataLoader:
    """These micro-batches in this order, made by so many worker processes ahead of time, or by none when asked for."""
    pin = torch.cuda.is_available()  # then the next batch travels to the GPU while it works on this one
    return DataLoader(
        batches, batch_size=None, sampler=[*numbers], num_workers=workers, worker_init_fn=quiet, pin_memory=pin
    )


def quiet(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; what it means is for the main one to say, and workers go on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
