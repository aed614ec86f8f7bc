"""Text to token ids and back: Unigram for FlanT5, WordPiece for the Q-Former, both read from the published files.

Both first cut added tokens such as `<extra_id_0>` out of the text, then normalise the rest and split it into words.
They differ in how a word becomes pieces.

Sources: Kudo, "Subword Regularization", 2018 (T5's sentencepiece); Devlin et al., "BERT", 2019. The ids equal those of
Hugging Face's `tokenizers`. Only characters newer than Unicode 8 may differ: Python's own tables class them.
"""

import base64
import re
import struct
import sys
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache, partial, reduce
from itertools import pairwise
from math import isfinite
from operator import methodcaller
from pathlib import Path
from typing import Any
from unicodedata import category, normalize

from ..files import need, read_json, read_text, reading

# The blocks of Chinese characters that BERT's authors chose.
_HAN = "[㐀-䶿一-鿿\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b81f\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f]"
SPACING = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "add_prefix_space": True, "split": True}
# Unicode's White_Space; str.isspace accepts four control characters more.
SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
# Joiners, Thai and Lao AM, half-width voicing marks and skin tones attach to the character before, like accents.
JOINING = "\u200c\u200d\u0e33\u0eb3\uff9e\uff9f" + "".join(map(chr, range(0x1F3FB, 0x1F400)))


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
        self.longest, self.unk_score = max(map(len, self.pieces)), min(score for _, score in vocab) - 10
        with reading("normalizer"):
            self.normalizers = read_normalizers(data.get("normalizer"))
        steps: dict[str, Any] = {key: data.get(key) for key in ("pre_tokenizer", "decoder")}
        self.drops_spaces = False
        match steps["pre_tokenizer"]:
            case {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, last]}:
                self.drops_spaces = True  # "trail " loses its last token
                steps["pre_tokenizer"] = last
        for key, spec in steps.items():
            if "type" not in need(spec, dict, key) or any(SPACING.get(k, v) != v for k, v in spec.items()):
                raise ValueError(f"{key} {spec!r:.99} is not T5's: take the published file")
        with reading("added_tokens"):
            added = need(data.get("added_tokens"), list)
            for spec in added:
                if flags := {k: v for k, v in spec.items() if k not in ("id", "content") and v != (k == "special")}:
                    raise ValueError(f"{spec['content']!r:.60} has {flags}, which no token of T5 has")
            self.special = {need(spec["content"], str): need(spec["id"], int) for spec in added}
            self.pad_id, self.eos_id, _ = (self.special[token] for token in ("<pad>", "</s>", "<extra_id_0>"))
        self.tokens = dict(enumerate(piece for piece, _ in vocab)) | {id: token for token, id in self.special.items()}
        self.splitter = _splitter(self.special)

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
        for part in self.splitter.split(text):
            if part in self.special:
                ids.append(self.special[part])
            else:
                normal = reduce(lambda text, step: step(text), self.normalizers, part)
                words = re.split(f"[{SPACE}]+", normal) if self.drops_spaces else [normal]
                ids += [id for text in words for word in metaspace(text) for id in self.cut(word)]
        return [*ids[max(0, len(ids) + 1 - limit) :], self.eos_id]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens and ids beyond the vocabulary (T5's embedding has more rows)."""
        tokens = [self.tokens[id] for id in ids if self.tokens.get(id, "<pad>") not in self.special]
        return _tidy("".join(token.replace("▁", " " if i else "") for i, token in enumerate(tokens)))

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


class Precompiled:
    """sentencepiece's normalisation: NFKC and rules of its own, such as tabs to spaces.

    The rules are a trie over UTF-8 bytes, Darts' double array, and behind it their right-hand sides, each ended by a
    zero. A unit holds the byte that leads to it, the offset of its children (child = node ^ offset ^ byte) and a flag:
    does a rule end here? If one does, child 0 holds the position of its right-hand side, and its own highest bit is 1.
    """

    def __init__(self, encoded: str):
        data = base64.b64decode(encoded, validate=True)
        size = struct.unpack_from("<I", data)[0]
        self.units, strings = struct.unpack_from(f"<{size // 4}I", data, 4), data[4 + size :]
        self.root, self.rules = self.units[0] >> 10, dict[int, str]()
        for node, unit in enumerate(self.units):
            if unit >> 8 & 1 and not unit >> 31:
                start = self.units[node ^ unit >> 10] & 0x7FFFFFFF
                self.rules[node] = strings[start : strings.index(b"\0", start)].decode()

    def __call__(self, text: str) -> str:
        return "".join(map(self.rewrite, clusters(text)))

    def rewrite(self, cluster: str) -> str:
        """Replace the cluster by the *shortest* rule that fits its start; without one, rewrite each character."""
        data, node = cluster.encode("utf-8", "surrogatepass"), self.root
        for byte in data if len(data) < 6 else b"":
            node ^= byte
            if node >= len(self.units) or self.units[node] & 0x800000FF != byte:
                break
            if node in self.rules:
                return self.rules[node]
            node ^= self.units[node] >> 10
        return cluster if len(cluster) < 2 else "".join(map(self.rewrite, cluster))


def clusters(text: str) -> list[str]:
    """Characters with their marks. Hangul, flags and emoji stay apart: together they are too long for `rewrite`."""
    starts = [0]
    for i, (before, char) in enumerate(pairwise(text), 1):
        mark = char >= "\x80" and (char in JOINING or category(char)[0] == "M")
        attached = mark and (before in JOINING or category(before) not in ("Cc", "Cf", "Zl", "Zp"))
        if not attached and before + char != "\r\n":
            starts.append(i)
    return [text[start:end] for start, end in pairwise([*starts, len(text)])]


def read_normalizers(spec: Any) -> list[Any]:
    """The steps that a tokenizer.json names, sequences unrolled. A regular expression of another kind may never end."""
    match spec:
        case None:
            return []
        case {"type": "Sequence", "normalizers": list(parts)}:
            return [step for part in parts for step in read_normalizers(part)]
        case {"type": "Precompiled", "precompiled_charsmap": str(encoded)}:
            return [Precompiled(encoded)]
        case {"type": "Replace", "pattern": {"Regex": " {2,}" | r"\s+" as pattern}, "content": str(new)}:
            return [partial(re.compile(pattern.replace(r"\s", f"[{SPACE}]")).sub, new.replace("\\", r"\\"))]
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            return [methodcaller("replace", old, new)]
        case {"type": "Strip", "strip_left": bool(left), "strip_right": bool(right)}:
            return [methodcaller("lstrip", SPACE)] * left + [methodcaller("rstrip", SPACE)] * right
    raise ValueError(f"{spec!r:.99} is unknown or incomplete, or its regular expression is none of FlanT5's")


def metaspace(text: str) -> list[str]:
    """A space becomes a visible mark that belongs to the word behind it: "a dog" is ▁a, ▁dog."""
    text = text.replace(" ", "▁")
    return re.split("(?!^)(?=▁)", text if text.startswith("▁") else "▁" + text) if text else []


class WordPieceTokenizer:
    """BERT's uncased one and LION's `[DEC]`: "Undoing" might become un ##do ##ing, and a word with a gap `[UNK]`."""

    def __init__(self, vocab: Sequence[str]):
        self.vocab = {token: id for id, token in enumerate(vocab)}
        self.vocab.setdefault("[DEC]", len(vocab))  # the release adds it as a start token and never uses it
        self.tokens = {id: token for token, id in self.vocab.items()}
        self.special = {name: self.vocab[name] for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")}
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, *_ = self.special.values()
        self.splitter = _splitter(self.special)

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
        for part in self.splitter.split(text):
            words = "".join(map(_fold, part)).split()
            ids += [self.special[part]] if part in self.special else [id for word in words for id in self.cut(word)]
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


def _splitter(tokens: Iterable[str]) -> re.Pattern[str]:
    """Its `split` cuts added tokens out of a text: "a <pad>b" becomes "a ", "<pad>", "b"."""
    return re.compile(f"({'|'.join(sorted(map(re.escape, filter(None, tokens)), key=len, reverse=True))})")


def _tidy(text: str) -> str:
    """Remove the spaces that decoding leaves before punctuation."""
    for spaced in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(spaced, spaced.strip())
    return text
