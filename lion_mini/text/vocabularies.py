"""The words that a model's three text-reading parts know: the Q-Former's, T5's and RAM's."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import LionConfig
from ..files import read_lines, reading
from .tokenizers import UnigramTokenizer, WordPieceTokenizer


@dataclass(frozen=True)
class Vocabularies:
    words: WordPieceTokenizer  # Q-Former
    pieces: UnigramTokenizer  # T5
    tags: list[str]  # RAM; empty without a tagger
    thresholds: list[float]  # the least score of each tag

    FILES = ("vocab.txt", "tokenizer.json", "ram_tag_list.txt", "ram_tag_list_threshold.txt")

    @classmethod
    def from_folder(cls, folder: Path, config: LionConfig) -> "Vocabularies":
        return cls.from_files([folder / name for name in cls.FILES], config)

    @classmethod
    def from_files(cls, files: Sequence[Path], config: LionConfig) -> "Vocabularies":
        """Read the four files (two without a tagger). A ValueError says if one does not fit the model's sizes."""
        vocab, tokenizer, *tagger = files
        words, pieces = WordPieceTokenizer.from_file(vocab), UnigramTokenizer.from_file(tokenizer)
        counts = [(vocab, len(words), config.qformer.vocab_size)]
        names, floors = list[str](), list[float]()
        if config.ram:
            tags, thresholds = tagger
            names = read_lines(tags)
            for number, line in enumerate(read_lines(thresholds), 1):
                with reading(f"{thresholds}, line {number}"):
                    floors.append(float(line))
            counts += [(tags, len(names), config.ram.tags), (thresholds, len(floors), config.ram.tags)]
        for path, found, expected in counts:
            if found != expected:
                raise ValueError(f"{path} has {found} lines, the model needs {expected}")
        if len(pieces) > config.t5.vocab_size:
            raise ValueError(f"{tokenizer} has {len(pieces)} pieces, T5 only {config.t5.vocab_size}")
        return cls(words, pieces, names, floors)
