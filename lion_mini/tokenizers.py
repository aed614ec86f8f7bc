"""Text to token ids and back: Unigram for FlanT5, WordPiece for the Q-Former, both read from the published files.

Both begin alike: added tokens such as `<extra_id_0>` are cut out of the running text, the rest is normalised and split
into words. They differ in how a word becomes pieces:

    Unigram     every piece has a log probability; the most probable way to cut the word wins (Viterbi)
    WordPiece   from the left, the longest piece that fits, then the longest that continues it, ...

Sources: Kudo, "Subword Regularization", 2018, as in sentencepiece and T5; Devlin et al., "BERT", 2019. The ids equal
those of Hugging Face's `tokenizers`, to whose `tokenizer.json` the names of the steps belong; where a rule looks odd,
it is theirs, and the models were trained with it.

next: images.py
"""

import base64
import binascii
import json
import math
import re
import struct
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, overload

# What Unicode calls White_Space: Python's own notion adds four control characters.
_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
_TIDY = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
_CHINESE = re.compile(  # the blocks that BERT's authors listed
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b81f\U0002b920-\U0002ceaf"
    "\U0002f800-\U0002fa1f]"
)


def _tidy(text: str) -> str:
    """The space that a tokenizer leaves before punctuation goes."""
    for wide in _TIDY:
        text = text.replace(wide, wide.strip())
    return text


def _cut(ids: list[int], limit: int | None, kept: int) -> list[int]:
    """The last ids, so many that `limit` holds them and the `kept` tokens around them: what a prompt ends with counts."""
    if limit is None:
        return ids
    if limit < kept:
        raise ValueError(f"limit is {limit}, but the tokens around every text are already {kept}")
    return ids[max(0, len(ids) - (limit - kept)) :]


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
        longest_first = sorted((token for token in tokens if token), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def __call__(self, text: str) -> Iterator[tuple[int, str | int]]:
        done = 0
        for match in self.pattern.finditer(text):
            token = self.tokens[match[0]]
            start, end = match.span()
            if token.single_word and (_in_word(text[:start][-1:]) or _in_word(text[end : end + 1])):
                continue
            if token.lstrip:
                start = max(done, len(text[:start].rstrip(_SPACE)))
            if token.rstrip:
                end = len(text) - len(text[end:].lstrip(_SPACE))
            if done < start:
                yield done, text[done:start]
            yield start, token.id
            done = end
        if done < len(text):
            yield done, text[done:]


def _in_word(char: str) -> bool:
    return char != "" and (char.isalpha() or unicodedata.category(char) in ("Nd", "Nl", "Pc", "Mn", "Mc", "Me"))


# --- the steps that a tokenizer.json declares


class _Precompiled:
    """sentencepiece's normalisation (NFKC and some of its own), compiled: full width to half width, tabs to spaces.

    The map is a trie over UTF-8 bytes, stored as Darts' double array, and then the replacements, each ended by a zero.
    A unit holds the byte that leads to it, the offset of its children (child = node ^ offset ^ byte) and whether a key
    ends here, in which case child 0 holds the position of its replacement.
    """

    def __init__(self, encoded: str):
        try:
            data = base64.b64decode(encoded, validate=True)
            size = struct.unpack_from("<I", data)[0]
            self.units = struct.unpack_from(f"<{size // 4}I", data, 4)
            self.strings = data[4 + size :]
        except (binascii.Error, struct.error, ValueError):
            raise ValueError("precompiled_charsmap is not a trie and its strings in base64") from None
        if not self.units:
            raise ValueError("precompiled_charsmap is an empty trie")

    def __call__(self, text: str) -> str:
        """Clusters of a base and its marks are looked up whole if they are short, else character by character."""
        out = []
        for cluster in _clusters(text):
            whole = self.find(cluster) if len(_utf8(cluster)) < 6 else None
            out += [self.find(char, char) for char in cluster] if whole is None else [whole]
        return "".join(out)

    @overload
    def find(self, text: str) -> str | None: ...
    @overload
    def find(self, text: str, default: str) -> str: ...
    def find(self, text: str, default: str | None = None) -> str | None:
        """What the *shortest* key that begins `text` is replaced by: a ligature loses the accent that follows it."""
        units, node = self.units, _children(self.units[0])
        for byte in _utf8(text):
            node ^= byte
            if node >= len(units) or units[node] & 0x800000FF != byte:
                break
            unit = units[node]
            node ^= _children(unit)
            if unit >> 8 & 1:
                start = units[node] & 0x7FFFFFFF
                return self.strings[start : self.strings.index(b"\0", start)].decode()
        return default


def _children(unit: int) -> int:
    return unit >> 10 << ((unit & 512) >> 6)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _clusters(text: str) -> Iterator[str]:
    """Grapheme clusters, as far as they are shorter than 6 bytes: Hangul, flags and joined emoji never are."""
    start = 0
    for i in range(1, len(text)):
        before, char = text[i - 1], text[i]
        if char < "\x80":
            joined = char == "\n" and before == "\r"
        else:
            joined = _is_mark(char) and (_is_mark(before) or unicodedata.category(before) not in ("Cc", "Cf", "Zl", "Zp"))
        if not joined:
            yield text[start:i]
            start = i
    if text:
        yield text[start:]


def _is_mark(char: str) -> bool:
    # joiners, Thai and Lao AM, and the half-width voicing marks attach as well, whatever their category
    return char >= "\x80" and (unicodedata.category(char)[0] == "M" or char in "\u200c\u200d\u0e33\u0eb3\uff9e\uff9f")


def _replace(pattern: re.Pattern[str], content: str, text: str) -> str:
    return pattern.sub(lambda _: content, text)


def _strip(left: bool, right: bool, text: str) -> str:
    text = text.lstrip(_SPACE) if left else text
    return text.rstrip(_SPACE) if right else text


def _whitespace_split(text: str, first: bool) -> list[tuple[str, bool]]:
    return [(match[0], first and match.start() == 0) for match in re.finditer(f"[^{_SPACE}]+", text)]


@dataclass(frozen=True)
class _Metaspace:
    """Spaces become a visible mark that belongs to the word behind it: "a dog" is ▁a, ▁dog."""

    mark: str
    prepend: str  # "always", to the "first" word of a text only, or "never"
    split: bool

    def __call__(self, text: str, first: bool) -> list[tuple[str, bool]]:
        text = text.replace(" ", self.mark)
        if (self.prepend == "always" or (self.prepend == "first" and first)) and not text.startswith(self.mark):
            text = self.mark + text
        if not self.split:
            return [(text, first)]
        head, *rest = text.split(self.mark)
        return [(head, first)] * bool(head) + [(self.mark + word, False) for word in rest]


def _get(data: Any, key: str, kind: type, default: Any = None) -> Any:
    value = data.get(key, default) if isinstance(data, dict) else None
    if type(value) is not kind:
        raise ValueError(f"{key} must be a {kind.__name__}, found {value!r:.60}")
    return value


def _read_replace(spec: Any) -> Callable[[str], str]:
    pattern = _get(spec, "pattern", dict)
    text = _get(pattern, "Regex", str) if "Regex" in pattern else re.escape(_get(pattern, "String", str))
    try:
        return partial(_replace, re.compile(text), _get(spec, "content", str))
    except re.error as error:
        raise ValueError(f"the Replace pattern {text!r} is not a regular expression: {error}") from None


def _read_metaspace(spec: Any) -> _Metaspace:
    mark = _get(spec, "replacement", str, "▁")
    prefix = "always" if _get(spec, "add_prefix_space", bool, True) else "never"  # what older files say instead
    prepend = _get(spec, "prepend_scheme", str, prefix)
    if prepend not in ("always", "first", "never") or len(mark) != 1:
        raise ValueError(f"Metaspace needs one character and always, first or never, found {mark!r} and {prepend!r}")
    return _Metaspace(mark, prepend, _get(spec, "split", bool, True))


_NORMALIZERS: dict[str, Callable[[Any], Callable[[str], str]]] = {
    "Precompiled": lambda spec: _Precompiled(_get(spec, "precompiled_charsmap", str)),
    "Replace": _read_replace,
    "Strip": lambda spec: partial(_strip, _get(spec, "strip_left", bool), _get(spec, "strip_right", bool)),
}
_PRE_TOKENIZERS: dict[str, Callable[[Any], Callable[[str, bool], list[tuple[str, bool]]]]] = {
    "WhitespaceSplit": lambda spec: _whitespace_split,
    "Metaspace": _read_metaspace,
}


def _read_steps(name: str, spec: Any, known: Mapping[str, Callable[[Any], Any]]) -> list[Any]:
    """The steps below one key of a tokenizer.json, sequences unrolled."""
    if spec is None:
        return []
    kind = _get(spec, "type", str)
    if kind == "Sequence":
        parts = _get(spec, name.replace("_", "") + "s", list)
        return [step for part in parts for step in _read_steps(name, part, known)]
    if kind not in known:
        raise ValueError(f"the {name} {kind!r} is unknown here; there are Sequence, {', '.join(known)}")
    return [known[kind](spec)]


class UnigramTokenizer:
    """T5's tokenizer: the cut of each word whose pieces have the largest sum of log probabilities.

    With the pieces ▁ -2, a -5, b -4, ▁a -4, ab -5 the word ▁ab is cut from left to right, keeping the best per end:

        ▁      ▁       -2
        ▁a     ▁a      -4     better than ▁ a, -7
        ▁ab    ▁ ab    -7     better than ▁a b, -8: the longest first piece is not always the best one

    A character that no piece holds costs 10 more than the worst piece; neighbours of that kind become one `<unk>`.
    """

    def __init__(self, data: Any):
        model = _get(data, "model", dict)
        if model.get("type", "Unigram") != "Unigram":
            raise ValueError(f"model.type must be Unigram, found {model['type']!r}")
        if model.get("byte_fallback"):
            raise ValueError("model.byte_fallback is set, which no T5 has")
        scored = _get(model, "vocab", list)
        for i, pair in enumerate(scored):
            fits = isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and pair[0]
            if not fits or type(pair[1]) not in (int, float) or not math.isfinite(pair[1]):
                raise ValueError(f"model.vocab[{i}] must be a piece and its score, found {pair!r:.60}")
        self.unk_id: int = _get(model, "unk_id", int)
        if not 0 <= self.unk_id < len(scored):
            raise ValueError(f"model.unk_id {self.unk_id} is not one of the {len(scored)} pieces")
        self.pieces = {piece: (id, float(score)) for id, (piece, score) in enumerate(scored)}
        self.unk_score = min(score for _, score in scored) - 10
        self.longest = max(map(len, self.pieces))
        self.normalizers = _read_steps("normalizer", data.get("normalizer"), _NORMALIZERS)
        self.pre_tokenizers = _read_steps("pre_tokenizer", data.get("pre_tokenizer"), _PRE_TOKENIZERS)
        decoder = data.get("decoder")
        if _get(decoder, "type", str) != "Metaspace":
            raise ValueError(f"the decoder {decoder['type']!r} is unknown here; there is Metaspace")
        self.decoder = _read_metaspace(decoder)
        self.tokens = {id: piece for piece, (id, _) in self.pieces.items()}
        added = [self._added(spec) for spec in _get(data, "added_tokens", list)]
        self.special = {token.content: token.id for token in added if token.special}
        for name in ("<pad>", "</s>", "<extra_id_0>"):
            if name not in self.special:
                raise ValueError(f"added_tokens has no special token {name}")
        self.pad_id, self.eos_id = self.special["<pad>"], self.special["</s>"]
        self.split_raw = _Splitter({token.content: token for token in added if not token.normalized})
        self.split_normal = _Splitter({self.normalise(token.content): token for token in added if token.normalized})
        self.skipped = set(self.special.values())

    def _added(self, spec: Any) -> _Added:
        content, id = _get(spec, "content", str), _get(spec, "id", int)
        expected = self.pieces[content][0] if content in self.pieces else len(self.tokens)
        if id != expected:
            raise ValueError(f"added_tokens gives {content!r} the id {id}, where the pieces say {expected}")
        self.tokens[id] = content
        flags = ("special", "lstrip", "rstrip", "single_word", "normalized")
        return _Added(content, id, **{flag: _get(spec, flag, bool, False) for flag in flags})

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> "UnigramTokenizer":
        """T5's `tokenizer.json`; a ValueError names what in it is not as expected."""
        try:
            return cls(json.loads(_read(path)))
        except RecursionError:
            raise ValueError(f"{path} is not JSON: it is nested too deep") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """The ids of a text and `</s>`; with a limit, the last ones and `</s>`."""
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
        return [*_cut(ids, limit, 1), self.eos_id]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens and with the spaces before punctuation tidied."""
        text = ""
        for i, token in enumerate(self.tokens[id] for id in ids if id in self.tokens and id not in self.skipped):
            text += token.replace(self.decoder.mark, "" if i == 0 and self.decoder.prepend != "never" else " ")
        return _tidy(text)

    def normalise(self, text: str) -> str:
        for step in self.normalizers:
            text = step(text)
        return text

    def words(self, text: str, first: bool) -> list[str]:
        """The words that are cut on their own; `first` where a text begins."""
        words = [(text, first)]
        for step in self.pre_tokenizers:
            words = [part for word, first in words for part in step(word, first)]
        return [word for word, _ in words]

    def cut(self, word: str) -> list[int]:
        """Viterbi: the ids of the most probable pieces."""
        best = [(0.0, 0, -1)] + [(-math.inf, 0, -1)] * len(word)  # score, start and id of the last piece, per end
        for start in range(len(word)):
            score = best[start][0]
            alone = False
            for end in range(start + 1, min(start + self.longest, len(word)) + 1):
                piece = self.pieces.get(word[start:end])
                if piece is None:
                    continue
                alone |= end == start + 1
                if score + piece[1] > best[end][0]:
                    best[end] = (score + piece[1], start, piece[0])
            if not alone and score + self.unk_score > best[start + 1][0]:
                best[start + 1] = (score + self.unk_score, start, self.unk_id)
        ids: list[int] = []
        end = len(word)
        while end:
            _, end, id = best[end]
            if id != self.unk_id or ids[-1:] != [id]:
                ids.append(id)
        return ids[::-1]


class WordPieceTokenizer:
    """BERT's uncased tokenizer with LION's `[DEC]`: "Undoing" is lower-cased and cut into un ##do ##ing."""

    SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

    def __init__(self, vocab: list[str]):
        self.vocab: dict[str, int] = {}
        for id, token in enumerate(vocab):
            if self.vocab.setdefault(token, id) != id:
                raise ValueError(f"line {id + 1} repeats line {self.vocab[token] + 1}: {token!r}")
        for token in self.SPECIAL:
            if token not in self.vocab:
                raise ValueError(f"the vocabulary of {len(vocab)} lines has no line {token}")
        self.vocab.setdefault("[DEC]", len(vocab))  # the release adds it as the token a text begins with, and never uses it
        self.special = {token: self.vocab[token] for token in (*self.SPECIAL, "[DEC]")}
        self.pad_id, self.unk_id = self.special["[PAD]"], self.special["[UNK]"]
        self.cls_id, self.sep_id = self.special["[CLS]"], self.special["[SEP]"]
        self.tokens = {id: token for token, id in self.vocab.items()}
        self.skipped = set(self.special.values())
        self.split_raw = _Splitter({token: _Added(token, id) for token, id in self.special.items()})

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> "WordPieceTokenizer":
        """`vocab.txt`, a token per line; a ValueError names what in it is not as expected."""
        lines = _read(path).replace("\r\n", "\n").removesuffix("\n").split("\n")  # other line breaks may be tokens
        try:
            return cls(lines)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def __len__(self) -> int:
        return len(self.vocab)

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """`[CLS]`, the ids of a text and `[SEP]`; with a limit, the last ones between the two."""
        ids: list[int] = []
        for _, part in self.split_raw(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += [id for word in _bert_words(part) for id in self.cut(word)]
        return [self.cls_id, *_cut(ids, limit, 2), self.sep_id]

    def decode(self, ids: Iterable[int]) -> str:
        """The lower-case text of ids, without special tokens and with the spaces before punctuation tidied."""
        tokens = [self.tokens[id] for id in ids if id in self.tokens and id not in self.skipped]
        rest = (token[2:] if token.startswith("##") else " " + token for token in tokens[1:])
        return _tidy("".join([*tokens[:1], *rest]))

    def cut(self, word: str) -> list[int]:
        """The longest piece first, and `[UNK]` for the whole word if any of it is left."""
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
    return "" if kind == "Mn" else char.lower()  # one by one: a word's last sigma stays what every sigma is


def _read(path: str | PathLike[str]) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
