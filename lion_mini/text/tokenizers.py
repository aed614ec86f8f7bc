"""Text to token ids and back: Unigram for FlanT5, WordPiece for the Q-Former, both read from the published files.

Both begin alike: added tokens such as `<extra_id_0>` are cut out of the running text, the rest is normalised and split
into words. They differ in how a word becomes pieces:

    Unigram     every piece has a log probability; the most probable way to cut the word wins (Viterbi)
    WordPiece   the longest piece that begins the word, then the longest that continues it, ...

Sources: Kudo, "Subword Regularization", 2018 (in T5: sentencepiece); Devlin et al., "BERT", 2019. The ids equal those
of Hugging Face's `tokenizers`, whose names the steps in `tokenizer.json` bear: where a rule looks odd, it is theirs,
and the models were trained with it. Only characters younger than Unicode 8 may be classed otherwise, as Python does.

next: images.py
"""

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from .charsmap import NORMALIZERS, PRE_TOKENIZERS, SPACE, get, read_metaspace, read_steps

_CHINESE = re.compile(  # the blocks that BERT's authors chose
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b81f\U0002b920-\U0002ceaf"
    "\U0002f800-\U0002fa1f]"
)


# --- what both share


def _read(path: str | PathLike[str]) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _keep_last(ids: list[int], limit: int | None, around: int) -> list[int]:
    """As many of the last ids as fit into `limit` with the special tokens around them."""
    if limit is None:
        return ids
    if limit < around:
        raise ValueError(f"limit is {limit}, but every text comes with {around} special tokens")
    return ids[max(0, len(ids) + around - limit) :]


def _tidy(text: str) -> str:
    """The spaces that decoding leaves before punctuation go."""
    for spaced in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(spaced, spaced.strip())
    return text


@dataclass(frozen=True)
class _Added:
    """A token that is found in running text before anything else is; the flags are those of `tokenizer.json`."""

    content: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


class _Splitter:
    """Cuts added tokens out of a text: "a <pad>b" becomes (0, "a "), (2, 0), (7, "b"), each with its position."""

    def __init__(self, tokens: Mapping[str, _Added]):
        self.tokens = tokens
        longest_first = sorted(filter(None, tokens), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def __call__(self, text: str) -> Iterator[tuple[int, str | int]]:
        done = 0
        for match in self.pattern.finditer(text):
            token = self.tokens[match[0]]
            start, end = match.span()
            if token.single_word and (_in_word(text[:start][-1:]) or _in_word(text[end:][:1])):
                continue
            if token.lstrip:
                start = len(text[:start].rstrip(SPACE))
            if token.rstrip:
                end = len(text) - len(text[end:].lstrip(SPACE))
            if done < start:
                yield done, text[done:start]
            yield start, token.id
            done = end
        if done < len(text):
            yield done, text[done:]


def _in_word(char: str) -> bool:
    kind = unicodedata.category(char or " ")
    letter = kind[0] in "LM" or char.islower() or char.isupper()  # circled letters, too, have a case
    return letter or kind in ("Nd", "Nl", "Pc") or char in ("\u200c", "\u200d")


# --- the tokenizers


class UnigramTokenizer:
    """T5's: each word is cut so that the log probabilities of its pieces have the largest sum.

    With the pieces ▁ -2, a -5, b -4, ▁a -4, ab -5 the word ▁ab is cut from left to right, keeping the best cut per end:

        ▁      ▁       -2
        ▁a     ▁a      -4     better than ▁ a, -7
        ▁ab    ▁ ab    -7     better than ▁a b, -8: the longest first piece need not be the best

    A character that is no piece costs 10 more than the worst piece; neighbours of that kind become one `<unk>`.
    """

    def __init__(self, data: Any):
        model = get(data, "model", dict)
        if model.get("type", "Unigram") != "Unigram" or model.get("byte_fallback"):
            raise ValueError(f"model must be Unigram without byte_fallback, found {model.get('type')!r:.60}")
        scored = get(model, "vocab", list)
        for i, pair in enumerate(scored):
            fits = isinstance(pair, list) and [*map(type, pair)] in ([str, float], [str, int])
            if not fits or not pair[0] or not math.isfinite(pair[1]):
                raise ValueError(f"model.vocab[{i}] must be a piece and its score, found {pair!r:.60}")
        self.unk_id: int = get(model, "unk_id", int)
        if not 0 <= self.unk_id < len(scored):
            raise ValueError(f"unk_id is {self.unk_id}, but model.vocab has {len(scored)} pieces")
        self.pieces = {piece: (id, float(score)) for id, (piece, score) in enumerate(scored)}
        self.longest = max(map(len, self.pieces))
        self.unk_score = min(score for _, score in scored) - 10
        self.cuts: dict[str, list[int]] = {}  # of the words seen last: few make up most of a text
        self.tokens = dict(enumerate(piece for piece, _ in scored))

        self.normalizers = read_steps("normalizer", data.get("normalizer"), NORMALIZERS)
        self.pre_tokenizers = read_steps("pre_tokenizer", data.get("pre_tokenizer"), PRE_TOKENIZERS)
        (self.decoder,) = read_steps("decoder", get(data, "decoder", dict), {"Metaspace": read_metaspace})

        added = [self._add(spec) for spec in get(data, "added_tokens", list)]
        self.special = {token.content: token.id for token in added if token.special}
        for name in ("<pad>", "</s>", "<extra_id_0>"):
            if name not in self.special:
                raise ValueError(f"added_tokens must hold the special token {name}, found {len(added)} others")
        self.pad_id, self.eos_id = self.special["<pad>"], self.special["</s>"]
        self.split_raw = _Splitter({token.content: token for token in added if not token.normalized})
        self.split_normal = _Splitter({self.normalise(token.content): token for token in added if token.normalized})

    def _add(self, spec: Any) -> _Added:
        content, id = get(spec, "content", str), get(spec, "id", int)
        expected = self.pieces[content][0] if content in self.pieces else len(self.tokens)
        if id != expected:
            raise ValueError(f"added_tokens gives {content!r} the id {id}, where model.vocab leads to {expected}")
        self.tokens[id] = content
        flags = ("special", "lstrip", "rstrip", "single_word", "normalized")
        return _Added(content, id, **{flag: get(spec, flag, bool, False) for flag in flags})

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> "UnigramTokenizer":
        """T5's `tokenizer.json`; a ValueError says in one sentence what in it is not as it must be."""
        text = _read(path)
        try:
            return cls(json.loads(text))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """The ids of a text and `</s>`; if they are more than `limit`, the first ones go."""
        ids: list[int] = []
        for start, part in self.split_raw(text):
            if isinstance(part, int):
                ids.append(part)
                continue
            for offset, inner in self.split_normal(self.normalise(part)):
                if isinstance(inner, int):
                    ids.append(inner)
                else:
                    ids += [id for word in self.words(inner, start + offset == 0) for id in self.cut(word)]
        return [*_keep_last(ids, limit, 1), self.eos_id]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens; ids beyond the vocabulary, which T5's table has, say nothing."""
        tokens = [self.tokens[id] for id in ids if id in self.tokens and self.tokens[id] not in self.special]
        first = "" if self.decoder.prepend != "never" else " "
        return _tidy("".join(t.replace(self.decoder.mark, " " if i else first) for i, t in enumerate(tokens)))

    def normalise(self, text: str) -> str:
        for step in self.normalizers:
            text = step(text)
        return text

    def words(self, text: str, first: bool) -> list[str]:
        parts = [(text, first)]
        for step in self.pre_tokenizers:
            parts = [inner for part in parts for inner in step(*part)]
        return [word for word, _ in parts]

    def cut(self, word: str) -> list[int]:
        """Viterbi: the ids of the most probable pieces; of two equally good last pieces the longer one."""
        if word in self.cuts:
            return self.cuts[word]
        best = [(0.0, 0, -1)] + [(-math.inf, 0, -1)] * len(word)  # score, start and id of the last piece, per end
        for start in range(len(word)):
            score = best[start][0]
            for end in range(start + 1, min(start + self.longest, len(word)) + 1):
                id, gain = self.pieces.get(word[start:end], (-1, -math.inf))
                if id < 0 and end == start + 1:
                    id, gain = self.unk_id, self.unk_score
                if score + gain > best[end][0]:
                    best[end] = (score + gain, start, id)
        ids: list[int] = []
        end = len(word)
        while end:
            _, end, id = best[end]
            if id != self.unk_id or ids[-1:] != [id]:
                ids.append(id)
        if len(self.cuts) == 1 << 14:
            self.cuts.clear()
        self.cuts[word] = ids[::-1]
        return self.cuts[word]


class WordPieceTokenizer:
    """BERT's uncased one and LION's `[DEC]`: "Undoing" might become un ##do ##ing, and a word with a gap `[UNK]`."""

    def __init__(self, vocab: list[str]):
        self.vocab: dict[str, int] = {}
        for id, token in enumerate(vocab):
            if self.vocab.setdefault(token, id) != id:
                raise ValueError(f"line {id + 1} repeats line {self.vocab[token] + 1}, {token!r}")
        names = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
        for name in names:
            if name not in self.vocab:
                raise ValueError(f"a line must be {name}, found {len(vocab)} others")
        self.vocab.setdefault("[DEC]", len(vocab))  # the release adds it to mark where a text begins, and never does
        self.special = {name: self.vocab[name] for name in (*names, "[DEC]")}
        self.pad_id, self.unk_id, self.cls_id, self.sep_id = (self.vocab[name] for name in names[:4])
        self.tokens = {id: token for token, id in self.vocab.items()}
        self.split_raw = _Splitter({name: _Added(name, id) for name, id in self.special.items()})

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> "WordPieceTokenizer":
        """`vocab.txt`, a token per line; a ValueError says in one sentence what in it is not as it must be."""
        text = _read(path).replace("\r\n", "\n").removesuffix("\n")
        try:
            return cls(text.split("\n") if text else [])  # splitlines would also split at characters that are tokens
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def __len__(self) -> int:
        return len(self.vocab)

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """`[CLS]`, the ids of a text and `[SEP]`; if they are more than `limit`, the first ones of the text go."""
        ids: list[int] = []
        for _, part in self.split_raw(text):
            ids += [part] if isinstance(part, int) else [id for word in _bert_words(part) for id in self.cut(word)]
        return [self.cls_id, *_keep_last(ids, limit, 2), self.sep_id]

    def decode(self, ids: Iterable[int]) -> str:
        """The lower-case text of ids, without special tokens."""
        tokens = [self.tokens[id] for id in ids if id in self.tokens and self.tokens[id] not in self.special]
        rest = [token[2:] if token.startswith("##") else " " + token for token in tokens[1:]]
        return _tidy("".join(tokens[:1] + rest))

    def cut(self, word: str) -> list[int]:
        """The longest piece first; `[UNK]` for the whole word if any of it remains, or if it is very long."""
        if len(word) > 100:
            return [self.unk_id]
        ids: list[int] = []
        start = 0
        while start < len(word):
            for end in range(len(word), start, -1):
                id = self.vocab.get(("##" if start else "") + word[start:end])
                if id is not None:
                    break
            else:
                return [self.unk_id]
            ids.append(id)
            start = end
        return ids


def _bert_words(text: str) -> list[str]:
    """Lower case without accents; Chinese characters and punctuation are words of their own."""
    text = _CHINESE.sub(r" \g<0> ", "".join(map(_bert_clean, text)))
    return "".join(map(_bert_fold, unicodedata.normalize("NFD", text))).split()


def _bert_clean(char: str) -> str:
    kind = unicodedata.category(char)
    if char in "\t\n\r" or kind[0] == "Z":
        return " "
    return "" if kind in ("Cc", "Cf", "Co", "Cs") or char == "\ufffd" else char


def _bert_fold(char: str) -> str:
    kind = unicodedata.category(char)
    if kind[0] == "P" or char in "$+<=>^`|~":
        return f" {char} "
    return "" if kind == "Mn" else char.lower()  # one by one: the last sigma of a word stays like the others
