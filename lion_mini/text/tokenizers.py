"""Text to token ids and back: Unigram for FlanT5, WordPiece for the Q-Former, both read from the published files.

Both first cut added tokens such as `<extra_id_0>` out of the text, then normalise the rest and split it into words.
They differ in how a word becomes pieces:

    Unigram     every piece has a log probability; the most probable cut of the word wins (Viterbi)
    WordPiece   the longest piece that begins the word, then the longest that continues it, ...

Sources: Kudo, "Subword Regularization", 2018 (T5's sentencepiece); Devlin et al., "BERT", 2019. The ids equal those of
Hugging Face's `tokenizers`. Only characters newer than Unicode 8 may differ: Python's own tables class them.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unicodedata import category, normalize

from ..files import need, read_json, read_text, reading
from .charsmap import SPACE, read_steps

# The blocks of Chinese characters that BERT's authors chose.
_HAN = re.compile(
    "[㐀-䶿一-鿿\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b81f\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f]"
)


class UnigramTokenizer:
    """T5's: each word is cut so that the log probabilities of its pieces have the largest sum.

    With the pieces ▁ -2, a -5, b -4, ▁a -4, ab -5 the word ▁ab is cut from left to right, keeping the best cut per end:

        ▁      ▁       -2
        ▁a     ▁a      -4     better than ▁ a, -7
        ▁ab    ▁ ab    -7     better than ▁a b, -8: the longest first piece need not be the best

    A character that is no piece costs 10 more than the worst piece; neighbours of that kind become one `<unk>`.
    """

    def __init__(self, data: dict[str, Any]):
        model = need(data.get("model"), dict, "model")
        if model.get("type", "Unigram") != "Unigram" or model.get("byte_fallback"):
            raise ValueError(f"model must be Unigram without byte_fallback, found {model.get('type')!r:.60}")
        vocab, self.unk_id = need(model.get("vocab"), list, "model.vocab"), need(model.get("unk_id"), int, "unk_id")
        for i, pair in enumerate(vocab):
            fits = isinstance(pair, list) and [*map(type, pair)] in ([str, float], [str, int])
            if not fits or not pair[0] or not math.isfinite(pair[1]):
                raise ValueError(f"model.vocab[{i}] must be a piece and its score, found {pair!r:.60}")
        if not 0 <= self.unk_id < len(vocab):
            raise ValueError(f"unk_id is {self.unk_id}, but model.vocab has {len(vocab)} pieces")
        self.pieces = {piece: (id, float(score)) for id, (piece, score) in enumerate(vocab)}
        self.tokens = dict(enumerate(piece for piece, _ in vocab))
        self.longest, self.unk_score = max(map(len, self.pieces)), min(score for _, score in vocab) - 10
        self.cuts: dict[str, list[int]] = {}  # a cache: few words make up most of a text
        self.normalizers = read_steps("normalizer", data.get("normalizer"))
        self.pre_tokenizers = read_steps("pre_tokenizer", data.get("pre_tokenizer"))
        (self.decoder,) = read_steps("decoder", need(data.get("decoder"), dict, "decoder"))
        added = {spec["content"]: spec for spec in need(data.get("added_tokens"), list, "added_tokens")}
        for token, spec in added.items():
            if spec["id"] != (expected := self.pieces.get(token, (len(self.tokens),))[0]):
                raise ValueError(f"added_tokens gives {token!r} the id {spec['id']!r:.60}, not {expected}")
            self.tokens[expected] = token
        self.special = {token: spec["id"] for token, spec in added.items() if spec.get("special")}
        if missing := {"<pad>", "</s>", "<extra_id_0>"} - self.special.keys():
            raise ValueError(f"added_tokens must hold the special token {min(missing)}")
        self.pad_id, self.eos_id = self.special["<pad>"], self.special["</s>"]
        self.split_raw = _Splitter({t: spec for t, spec in added.items() if not spec.get("normalized")})
        self.split_normal = _Splitter({self.normalise(t): spec for t, spec in added.items() if spec.get("normalized")})

    @classmethod
    def from_file(cls, path: str | Path) -> "UnigramTokenizer":
        """Read T5's `tokenizer.json`; a ValueError says what is wrong with it."""
        with reading(path):
            return cls(read_json(Path(path)))

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """The ids of a text and `</s>`; beyond `limit` the front is cut off."""
        ids: list[int] = []
        for start, raw in self.split_raw(text):
            for offset, part in [(0, raw)] if isinstance(raw, int) else self.split_normal(self.normalise(raw)):
                first = start + offset == 0
                ids += [part] if isinstance(part, int) else [id for w in self.words(part, first) for id in self.cut(w)]
        return [*_keep_last(ids, limit, 1), self.eos_id]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens and ids beyond the vocabulary (T5's embedding has more rows)."""
        tokens = [self.tokens[id] for id in ids if id in self.tokens and self.tokens[id] not in self.special]
        first = "" if self.decoder.prepend != "never" else " "
        return _tidy("".join(t.replace(self.decoder.mark, " " if i else first) for i, t in enumerate(tokens)))

    def normalise(self, text: str) -> str:
        for step in self.normalizers:
            text = step(text)
        return text

    def words(self, text: str, first: bool) -> list[str]:  # first: the whole text begins with this part
        parts = [(text, first)]
        for step in self.pre_tokenizers:
            parts = [inner for part in parts for inner in step(*part)]
        return [word for word, _ in parts]

    def cut(self, word: str) -> list[int]:
        """Viterbi: the ids of the most probable pieces; of two equally good last pieces the longer one."""
        if word in self.cuts:
            return self.cuts[word]
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
        if len(self.cuts) == 1 << 14:
            self.cuts.clear()
        return self.cuts.setdefault(word, ids[::-1])


class WordPieceTokenizer:
    """BERT's uncased one and LION's `[DEC]`: "Undoing" might become un ##do ##ing, and a word with a gap `[UNK]`."""

    def __init__(self, vocab: Sequence[str]):
        self.vocab: dict[str, int] = {}
        for id, token in enumerate(vocab):
            if self.vocab.setdefault(token, id) != id:
                raise ValueError(f"line {id + 1} repeats line {self.vocab[token] + 1}, {token!r}")
        self.vocab.setdefault("[DEC]", len(vocab))  # the release adds it as a start token and never uses it
        names = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")
        if missing := [name for name in names if name not in self.vocab]:
            raise ValueError(f"a line must be {missing[0]}")
        self.special = {name: self.vocab[name] for name in names}
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, *_ = self.special.values()
        self.tokens = {id: token for token, id in self.vocab.items()}
        self.split_raw = _Splitter({name: {"id": id} for name, id in self.special.items()})

    @classmethod
    def from_file(cls, path: str | Path) -> "WordPieceTokenizer":
        """Read `vocab.txt`, a token per line; a ValueError says what is wrong with it."""
        with reading(path):
            return cls(read_text(Path(path)).removesuffix("\n").split("\n"))  # splitlines also splits at some tokens

    def __len__(self) -> int:
        return len(self.vocab)

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """`[CLS]`, the ids of a text and `[SEP]`; beyond `limit` the front of the text is cut off."""
        ids: list[int] = []
        for _, part in self.split_raw(text):
            ids += [part] if isinstance(part, int) else [id for word in _bert_words(part) for id in self.cut(word)]
        return [self.cls_id, *_keep_last(ids, limit, 2), self.sep_id]

    def decode(self, ids: Iterable[int]) -> str:
        """The lower-case text of ids, without special tokens."""
        tokens = [self.tokens[id] for id in ids if id in self.tokens and self.tokens[id] not in self.special]
        return _tidy(" ".join(tokens).replace(" ##", ""))

    def cut(self, word: str) -> list[int]:
        """The longest piece first; `[UNK]` for the whole word if any of it remains, or if it is very long."""
        if len(word) > 100:
            return [self.unk_id]
        ids, start = list[int](), 0
        while start < len(word):
            prefix, end = "##" if start else "", len(word)
            while end > start and prefix + word[start:end] not in self.vocab:
                end -= 1
            if end == start:
                return [self.unk_id]
            ids.append(self.vocab[prefix + word[start:end]])
            start = end
        return ids


def _bert_words(text: str) -> list[str]:
    """Lower case without accents; Chinese characters and punctuation are words of their own."""
    text = normalize("NFD", _HAN.sub(r" \g<0> ", "".join(map(_clean, text))))
    return "".join(map(_fold, text)).split()


@cache
def _clean(char: str) -> str:
    control = char == "\ufffd" or category(char) in ("Cc", "Cf", "Co", "Cs")
    return "" if control and char not in "\t\n\r" else char


@cache
def _fold(char: str) -> str:
    """Per character: in a whole word, lower() would change the last sigma."""
    if category(char)[0] == "P" or char in "$+<=>^`|~":
        return f" {char} "
    return "" if category(char) == "Mn" else char.lower()


class _Splitter:
    """Cuts added tokens out of a text: "a <pad>b" becomes (0, "a "), (2, 0), (7, "b"), each with its position."""

    def __init__(self, tokens: Mapping[str, dict[str, Any]]):  # id and flags as in tokenizer.json
        self.tokens = tokens
        longest_first = sorted(map(re.escape, filter(None, tokens)), key=len, reverse=True)
        self.pattern = re.compile("|".join(longest_first) or "(?!)")

    def __call__(self, text: str) -> list[tuple[int, str | int]]:
        parts, done = list[tuple[int, str | int]](), 0
        for match in self.pattern.finditer(text):
            token, start, end = self.tokens[match[0]], *match.span()
            if token.get("single_word") and (_in_word(text[:start][-1:]) or _in_word(text[end:][:1])):
                continue
            if token.get("lstrip"):
                start = len(text[:start].rstrip(SPACE))
            if token.get("rstrip"):
                end = len(text) - len(text[end:].lstrip(SPACE))
            parts += [(done, text[done:start]), (start, token["id"])]
            done = end
        return [part for part in [*parts, (done, text[done:])] if part[1] != ""]


def _in_word(char: str) -> bool:
    letter = category(char or " ")[0] in "LM" or char.islower() or char.isupper()  # circled letters, too, have a case
    return letter or category(char or " ") in ("Nd", "Nl", "Pc") or char in ("\u200c", "\u200d")


def _keep_last(ids: list[int], limit: int | None, around: int) -> list[int]:
    """As many of the last ids as fit into `limit` with the special tokens around them."""
    if limit is not None and limit < around:
        raise ValueError(f"limit is {limit}, but every text comes with {around} special tokens")
    return ids if limit is None else ids[max(0, len(ids) + around - limit) :]


def _tidy(text: str) -> str:
    """Remove the spaces that decoding leaves before punctuation."""
    for spaced in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(spaced, spaced.strip())
    return text
