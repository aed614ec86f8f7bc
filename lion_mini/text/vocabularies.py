"""The vocabularies of the three parts that read or write words: Q-Former, T5 and RAM."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import LionConfig
from ..files import read_lines, reading
from .tokenizers import UnigramTokenizer, WordPieceTokenizer


@dataclass(frozen=True)
class Vocabularies:
    FILES = ("vocab.txt", "tokenizer.json", "ram_tag_list.txt", "ram_tag_list_threshold.txt")
    words: WordPieceTokenizer  # Q-Former
    pieces: UnigramTokenizer  # T5
    tags: list[str]  # RAM; empty without a tagger
    thresholds: list[float]  # the least score of each tag

    @classmethod
    def from_folder(cls, folder: Path, config: LionConfig) -> "Vocabularies":
        return cls.from_files([folder / name for name in cls.FILES], config)

    @classmethod
    def from_files(cls, files: Sequence[Path], config: LionConfig) -> "Vocabularies":
        """Read the files, the last two only with a tagger. A ValueError names one that does not fit the model."""
        words, pieces = WordPieceTokenizer.from_file(files[0]), UnigramTokenizer.from_file(files[1])
        names, lines = (read_lines(files[2]), read_lines(files[3])) if config.ram else ([], [])
        sizes = [(files[0], len(words), config.qformer.vocab_size)]
        if config.ram:
            sizes += [(files[2], len(names), config.ram.tags), (files[3], len(lines), config.ram.tags)]
        for path, found, expected in sizes:
            if found != expected:
                raise ValueError(f"{path} has {found} lines, the model needs {expected}")
        if len(pieces) > config.t5.vocab_size:
            raise ValueError(f"{files[1]} has {len(pieces)} pieces, T5 only {config.t5.vocab_size}")
        with reading(files[-1]):
            return cls(words, pieces, names, list(map(float, lines)))
