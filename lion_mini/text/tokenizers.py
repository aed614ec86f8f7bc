"""Text to token ids and back: Unigram for FlanT5, WordPiece for the Q-Former, both read from the published files.

Both first cut added tokens such as `<extra_id_0>` out of the text, then normalise the rest and split it into words.
They differ in how a word becomes pieces:

    Unigram     every piece has a log probability; the most probable cut of the word wins (Viterbi)
    WordPiece   the longest piece that begins the word, then the longest that continues it, ...

Sources: Kudo, "Subword Regularization", 2018 (T5's sentencepiece); Devlin et al., "BERT", 2019. The ids equal those of
Hugging Face's `tokenizers`. Only characters newer than Unicode 8 may differ: Python's own tables class them.
"""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache, reduce
from math import isfinite
from pathlib import Path
from typing import Any
from unicodedata import category, normalize

from ..files import need, read_json, read_text, reading
from .charsmap import SPACE, read_normalizers

# The blocks of Chinese characters that BERT's authors chose.
_HAN = "[㐀-䶿一-鿿\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b81f\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f]"

MARK = "▁"
SPACES = {"type": "Metaspace", "replacement": MARK, "prepend_scheme": "always", "add_prefix_space": True, "split": True}


class UnigramTokenizer:
    """T5's: each word is cut so that the log probabilities of its pieces have the largest sum.

    An example: the word ▁ab and the pieces ▁ -2, a -5, b -4, ▁a -4, ab -5. From left to right the best cut per end is

        ▁      ▁       -2
        ▁a     ▁a      -4     better than ▁ a, -7
        ▁ab    ▁ ab    -7     better than ▁a b, -8: the longest first piece need not be the best

    A character that is no piece costs 10 more than the worst piece; neighbours of that kind become one `<unk>`.
    """

    def __init__(self, data: dict[str, Any]):
        model = need(data.get("model"), dict, "model")
        if model.get("type", "Unigram") != "Unigram" or model.get("byte_fallback"):
            raise ValueError(f"model must be Unigram without byte_fallback, found {model.get('type')!r:.60}")
        self.unk_id = need(model.get("unk_id"), int, "unk_id")
        with reading("model.vocab"):
            vocab = [(need(piece, str), float(score)) for piece, score in need(model["vocab"], list)]
            if not all(isfinite(score) for _, score in vocab) or not 0 <= self.unk_id < len(vocab):
                raise ValueError("a score is not finite, or unk_id is no piece")
        self.pieces = {piece: (id, score) for id, (piece, score) in enumerate(vocab)}
        self.tokens = dict(enumerate(piece for piece, _ in vocab))
        self.longest, self.unk_score = max(map(len, self.pieces)), min(score for _, score in vocab) - 10
        self.normalizers = read_normalizers(data.get("normalizer"))
        for key in ("pre_tokenizer", "decoder"):
            spec = need(data.get(key), dict, key)
            if any(SPACES.get(name, value) != value for name, value in spec.items()) or "replacement" not in spec:
                fault = "is not FlanT5's: another library may have saved the file again; take the published one"
                raise ValueError(f"{key} {spec!r:.99} {fault}")
        with reading("added_tokens"):
            added = {need(spec["content"], str): spec for spec in need(data.get("added_tokens"), list)}
            if words := [token for token, spec in added.items() if spec.get("single_word")]:
                raise ValueError(f"{words[0]!r} is a single_word token, which T5 has not")
            self.tokens |= {need(spec["id"], int, token): token for token, spec in added.items()}
            self.special = {token: spec["id"] for token, spec in added.items() if spec.get("special")}
            self.pad_id, self.eos_id, _ = (self.special[token] for token in ("<pad>", "</s>", "<extra_id_0>"))
        self.split_raw = _Splitter({t: spec for t, spec in added.items() if not spec.get("normalized")})
        self.split_normal = _Splitter({self.normalise(t): spec for t, spec in added.items() if spec.get("normalized")})

    @classmethod
    def from_file(cls, path: str | Path) -> "UnigramTokenizer":
        """Read T5's `tokenizer.json`; a ValueError says what is wrong with it."""
        with reading(Path(path)):
            return cls(read_json(Path(path)))

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: str, limit: int = sys.maxsize) -> list[int]:
        """The ids of a text and `</s>`; beyond `limit` the front is cut off."""
        ids: list[int] = []
        for raw in self.split_raw(text):
            for part in [raw] if isinstance(raw, int) else self.split_normal(self.normalise(raw)):
                words = [] if isinstance(part, int) else metaspace(part)
                ids += [part] if isinstance(part, int) else [id for word in words for id in self.cut(word)]
        return [*ids[max(0, len(ids) + 1 - limit) :], self.eos_id]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens and ids beyond the vocabulary (T5's embedding has more rows)."""
        tokens = [self.tokens[id] for id in ids if self.tokens.get(id, "<pad>") not in self.special]
        return _tidy("".join(token.replace(MARK, " " if i else "") for i, token in enumerate(tokens)))

    def normalise(self, text: str) -> str:
        return reduce(lambda text, step: step(text), self.normalizers, text)

    @lru_cache(1 << 14)  # noqa: B019  few words make up most of a text
    def cut(self, word: str) -> list[int]:
        """Viterbi: the ids of the most probable pieces; of two equally good last pieces the longer one."""
        best = [(0.0, 0, -1)]  # per end: score, start and id of the last piece
        for end in range(1, len(word) + 1):
            starts = range(max(0, end - self.longest), end)
            cuts = [(best[i][0] + piece[1], i, piece[0]) for i in starts if (piece := self.pieces.get(word[i:end]))]
            if word[end - 1] not in self.pieces:
                cuts.append((best[end - 1][0] + self.unk_score, end - 1, self.unk_id))
            best.append(max(cuts, key=lambda cut: cut[0]))
        ids, end = list[int](), len(word)
        while end:
            _, end, id = best[end]
            if id != self.unk_id or ids[-1:] != [id]:
                ids.append(id)
        return ids[::-1]


def metaspace(text: str) -> list[str]:
    """A space becomes a visible mark that belongs to the word behind it: "a dog" is ▁a, ▁dog."""
    text = text.replace(" ", MARK)
    return re.split(f"(?!^)(?={MARK})", text if text.startswith(MARK) else MARK + text) if text else []


class WordPieceTokenizer:
    """BERT's uncased one and LION's `[DEC]`: "Undoing" might become un ##do ##ing, and a word with a gap `[UNK]`."""

    def __init__(self, vocab: Sequence[str]):
        self.vocab = {token: id for id, token in enumerate(vocab)}
        self.vocab.setdefault("[DEC]", len(vocab))  # the release adds it as a start token and never uses it
        self.tokens = {id: token for token, id in self.vocab.items()}
        self.special = {name: self.vocab[name] for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")}
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, *_ = self.special.values()
        self.split_raw = _Splitter({name: {"id": id} for name, id in self.special.items()})

    @classmethod
    def from_file(cls, path: str | Path) -> "WordPieceTokenizer":
        """Read `vocab.txt`, a token per line; a ValueError says what is wrong with it."""
        with reading(Path(path)):
            return cls(read_text(Path(path)).removesuffix("\n").split("\n"))  # splitlines also splits at some tokens

    def __len__(self) -> int:
        return len(self.vocab)

    def encode(self, text: str, limit: int = sys.maxsize) -> list[int]:
        """`[CLS]`, the ids of a text and `[SEP]`; beyond `limit` the front of the text is cut off."""
        ids: list[int] = []
        for part in self.split_raw(text):
            words = [] if isinstance(part, int) else "".join(map(_fold, part)).split()
            ids += [part] if isinstance(part, int) else [id for word in words for id in self.cut(word)]
        return [self.cls_id, *ids[max(0, len(ids) + 2 - limit) :], self.sep_id]

    def decode(self, ids: Iterable[int]) -> str:
        """The lower-case text of ids, without special tokens."""
        tokens = [self.tokens[id] for id in ids if self.tokens.get(id, "[PAD]") not in self.special]
        return _tidy(" ".join(tokens).replace(" ##", ""))

    @lru_cache(1 << 14)  # noqa: B019
    def cut(self, word: str) -> list[int]:
        """The longest piece first; `[UNK]` for the whole word if any of it remains, or if it is very long."""
        ids, start = list[int](), 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = (end for end in range(len(word), start, -1) if prefix + word[start:end] in self.vocab)
            if len(word) > 100 or not (end := next(ends, 0)):
                return [self.unk_id]
            ids.append(self.vocab[prefix + word[start:end]])
            start = end
        return ids


@cache
def _fold(char: str) -> str:
    """Lower case without accents; spaces set Chinese characters and punctuation apart."""
    if char == "\ufffd" or (category(char) in ("Cc", "Cf", "Co", "Cs") and char not in "\t\n\r"):
        return ""
    plain = [c for c in normalize("NFD", char) if category(c) != "Mn"]
    apart = re.match(_HAN, char) or any(category(c)[0] == "P" or c in "$+<=>^`|~" for c in plain)
    return f" {''.join(plain)} " if apart else "".join(plain).lower()


class _Splitter:
    """Cuts added tokens out of a text: "a <pad>b" becomes "a ", 0, "b"."""

    def __init__(self, tokens: Mapping[str, dict[str, Any]]):  # id and flags as in tokenizer.json
        self.tokens = tokens
        longest_first = sorted(map(re.escape, filter(None, tokens)), key=len, reverse=True)
        self.pattern = re.compile(f"({'|'.join(longest_first) or '(?!)'})")

    def __call__(self, text: str) -> list[str | int]:
        parts = self.pattern.split(text)  # text, token, text, ..., token, text
        for i in range(1, len(parts), 2):
            if self.tokens[parts[i]].get("lstrip"):
                parts[i - 1] = parts[i - 1].rstrip(SPACE)
            if self.tokens[parts[i]].get("rstrip"):
                parts[i + 1] = parts[i + 1].lstrip(SPACE)
        return [self.tokens[part]["id"] if i % 2 else part for i, part in enumerate(parts) if part]


def _tidy(text: str) -> str:
    """Remove the spaces that decoding leaves before punctuation."""
    for spaced in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(spaced, spaced.strip())
    return text
