"""The vocabularies of the three parts that read or write words: Q-Former, T5 and RAM."""

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
        """Read the files, the last two only with a tagger. A ValueError names one that does not fit the model."""
        vocab, tokenizer, tags, thresholds = (folder / name for name in cls.FILES)
        words, pieces = WordPieceTokenizer.from_file(vocab), UnigramTokenizer.from_file(tokenizer)
        names, lines = (read_lines(tags), read_lines(thresholds)) if config.ram else ([], [])
        count = config.ram.tags if config.ram else 0
        sizes = (vocab, words, config.qformer.vocab_size), (tags, names, count), (thresholds, lines, count)
        for path, entries, expected in sizes:
            if len(entries) != expected:
                raise ValueError(f"{path} has {len(entries)} lines, the model needs {expected}")
        if len(pieces) > config.t5.vocab_size:
            raise ValueError(f"{tokenizer} has {len(pieces)} pieces, T5 only {config.t5.vocab_size}")
        with reading(thresholds):
            return cls(words, pieces, names, list(map(float, lines)))
