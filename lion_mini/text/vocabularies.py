"""The vocabularies of the three parts that read or write words: Q-Former, T5 and RAM."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import LionConfig
from ..files import read_text, reading
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
        texts = [[line.strip() for line in read_text(file).rstrip().split("\n")] for file in files[2:] if config.ram]
        names, lines = texts or ([], [])
        tags = config.ram.tags if config.ram else 0
        sizes = (len(words), config.qformer.vocab_size), (len(names), tags), (len(lines), tags)
        for path, (found, expected) in zip((files[0], *files[2:]), sizes, strict=False):
            with reading(path):
                if found != expected:
                    raise ValueError(f"{path} has {found} lines, the model needs {expected}")
        if not all(0 <= id < config.t5.vocab_size for id in pieces.tokens):
            raise ValueError(f"{files[1]} has ids up to {max(pieces.tokens)}, T5 only {config.t5.vocab_size} tokens")
        with reading(files[-1]):
            thresholds = list(map(float, lines))
            if odd := [line for line, value in zip(lines, thresholds, strict=True) if not 0 <= value <= 1]:
                raise ValueError(f"a threshold must be from 0 to 1, found {odd[0]}")
            return cls(words, pieces, names, thresholds)
