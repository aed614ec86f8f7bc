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

import base64
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
from typing import Any

# Unicode's White_Space; Python's own notion holds four control characters more.
_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
# Joiners, Thai and Lao AM, half-width voicing marks and skin tones attach to what they follow, like accents.
_JOINING = "\u200c\u200d\u0e33\u0eb3\uff9e\uff9f" + "".join(map(chr, range(0x1F3FB, 0x1F400)))
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
                start = len(text[:start].rstrip(_SPACE))
            if token.rstrip:
                end = len(text) - len(text[end:].lstrip(_SPACE))
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


# --- the steps that a tokenizer.json may declare

Normalizer = Callable[[str], str]
PreTokenizer = Callable[[str, bool], list[tuple[str, bool]]]  # the flag: is this where the whole text begins?


class _Precompiled:
    """sentencepiece's normalisation (NFKC and rules of its own): full width to half width, tabs to spaces, ...

    The rules are a trie over UTF-8 bytes, stored as Darts' double array, and then their right-hand sides, each ended
    by a zero. A unit of the array holds the byte that leads to it, the offset of its children (child = node ^ offset ^
    byte) and whether a rule ends here; then child 0 holds the position of the right-hand side.
    """

    def __init__(self, encoded: str):
        try:
            data = base64.b64decode(encoded, validate=True)
            size = struct.unpack_from("<I", data)[0]
            self.units = struct.unpack_from(f"<{size // 4}I", data, 4)
            self.strings = data[4 + size :]
        except (struct.error, ValueError):
            raise ValueError("precompiled_charsmap is not a trie and its strings in base64") from None
        if not self.units or not self.strings.endswith(b"\0"):
            raise ValueError("precompiled_charsmap is cut off")

    def __call__(self, text: str) -> str:
        """A character and its marks are looked up whole if they are short, else one by one."""
        out = []
        for cluster in _clusters(text):
            whole = self.find(cluster) if len(_utf8(cluster)) < 6 else None
            out += [whole] if whole is not None else [c if (rule := self.find(c)) is None else rule for c in cluster]
        return "".join(out)

    def find(self, text: str) -> str | None:
        """What the *shortest* rule that begins `text` makes of all of it: the accent on a ligature is lost."""
        node = self.units[0] >> 10
        for byte in _utf8(text):
            node ^= byte
            if node >= len(self.units) or self.units[node] & 0x800000FF != byte:
                return None
            rule_ends = self.units[node] >> 8 & 1
            node ^= self.units[node] >> 10
            if rule_ends:
                start = self.units[node] & 0x7FFFFFFF
                return self.strings[start : self.strings.index(b"\0", start)].decode()
        return None


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _clusters(text: str) -> Iterator[str]:
    """Grapheme clusters, as far as `_Precompiled` can tell: those of Hangul, flags and emoji have 6 bytes or more."""
    start = 0
    for i in range(1, len(text)):
        before, char = text[i - 1], text[i]
        if char < "\x80":
            joined = before + char == "\r\n"
        else:
            mark = char in _JOINING or unicodedata.category(char)[0] == "M"
            joined = mark and (before in _JOINING or unicodedata.category(before) not in ("Cc", "Cf", "Zl", "Zp"))
        if not joined:
            yield text[start:i]
            start = i
    yield text[start:]


def _replace(pattern: re.Pattern[str], content: str, text: str) -> str:
    return pattern.sub(lambda _: content, text)


def _strip(left: bool, right: bool, text: str) -> str:
    text = text.lstrip(_SPACE) if left else text
    return text.rstrip(_SPACE) if right else text


def _whitespace_split(text: str, first: bool) -> list[tuple[str, bool]]:
    return [(word[0], first and word.start() == 0) for word in re.finditer(f"[^{_SPACE}]+", text)]


@dataclass(frozen=True)
class _Metaspace:
    """A space becomes a visible mark that belongs to the word behind it: "a dog" is ▁a, ▁dog."""

    mark: str
    prepend: str  # a mark where there is no space: "always", to the "first" word of a text, or "never"
    split: bool

    def __call__(self, text: str, first: bool) -> list[tuple[str, bool]]:
        text = text.replace(" ", self.mark)
        if (self.prepend == "always" or (self.prepend == "first" and first)) and not text.startswith(self.mark):
            text = self.mark + text
        if not self.split:
            return [(text, first)]
        head, *rest = text.split(self.mark)
        return [(head, first), *((self.mark + word, False) for word in rest)]


# --- reading them


def _get(data: Any, key: str, kind: type, default: Any = None) -> Any:
    value = data.get(key, default) if isinstance(data, dict) else None
    if type(value) is not kind:
        name = {dict: "an object", list: "a list", str: "a string", int: "a whole number", bool: "true or false"}[kind]
        raise ValueError(f"{key} must be {name}, found {value!r:.60}")
    return value


def _read_replace(spec: Any) -> Normalizer:
    pattern = _get(spec, "pattern", dict)
    text = _get(pattern, "Regex", str) if "Regex" in pattern else re.escape(_get(pattern, "String", str))
    try:
        return partial(_replace, re.compile(text), _get(spec, "content", str))
    except re.error as error:
        raise ValueError(f"the pattern {text!r} of Replace is not a regular expression: {error}") from None


def _read_metaspace(spec: Any) -> _Metaspace:
    older = "always" if _get(spec, "add_prefix_space", bool, True) else "never"  # how older files say it
    step = _Metaspace(
        _get(spec, "replacement", str), _get(spec, "prepend_scheme", str, older), _get(spec, "split", bool, True)
    )
    if len(step.mark) != 1:
        raise ValueError(f"replacement must be one character, found {step.mark!r}")
    if step.prepend not in ("always", "first", "never"):
        raise ValueError(f"prepend_scheme must be always, first or never, found {step.prepend!r}")
    return step


_NORMALIZERS: dict[str, Callable[[Any], Normalizer]] = {
    "Precompiled": lambda spec: _Precompiled(_get(spec, "precompiled_charsmap", str)),
    "Replace": _read_replace,
    "Strip": lambda spec: partial(_strip, _get(spec, "strip_left", bool), _get(spec, "strip_right", bool)),
}
_PRE_TOKENIZERS: dict[str, Callable[[Any], PreTokenizer]] = {
    "Metaspace": _read_metaspace,
    "WhitespaceSplit": lambda spec: _whitespace_split,
}


def _read_steps(name: str, spec: Any, known: Mapping[str, Callable[[Any], Any]]) -> list[Any]:
    """The steps that stand at one key of a tokenizer.json, sequences unrolled."""
    if spec is None:
        return []
    kind = _get(spec, "type", str)
    if kind == "Sequence":
        parts = _get(spec, name.replace("_", "") + "s", list)
        return [step for part in parts for step in _read_steps(name, part, known)]
    if kind not in known:
        raise ValueError(f"the {name} {kind!r} is unknown here; there are {', '.join(known)} and Sequence")
    return [known[kind](spec)]


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
        model = _get(data, "model", dict)
        if model.get("type", "Unigram") != "Unigram" or model.get("byte_fallback"):
            raise ValueError(f"model must be Unigram without byte_fallback, found {model.get('type')!r:.60}")
        scored = _get(model, "vocab", list)
        for i, pair in enumerate(scored):
            fits = isinstance(pair, list) and [*map(type, pair)] in ([str, float], [str, int])
            if not fits or not pair[0] or not math.isfinite(pair[1]):
                raise ValueError(f"model.vocab[{i}] must be a piece and its score, found {pair!r:.60}")
        self.unk_id: int = _get(model, "unk_id", int)
        if not 0 <= self.unk_id < len(scored):
            raise ValueError(f"unk_id is {self.unk_id}, but model.vocab has {len(scored)} pieces")
        self.pieces = {piece: (id, float(score)) for id, (piece, score) in enumerate(scored)}
        self.longest = max(map(len, self.pieces))
        self.unk_score = min(score for _, score in scored) - 10
        self.cuts: dict[str, list[int]] = {}  # of the words seen last: few make up most of a text
        self.tokens = dict(enumerate(piece for piece, _ in scored))

        self.normalizers = _read_steps("normalizer", data.get("normalizer"), _NORMALIZERS)
        self.pre_tokenizers = _read_steps("pre_tokenizer", data.get("pre_tokenizer"), _PRE_TOKENIZERS)
        (self.decoder,) = _read_steps("decoder", _get(data, "decoder", dict), {"Metaspace": _read_metaspace})

        added = [self._add(spec) for spec in _get(data, "added_tokens", list)]
        self.special = {token.content: token.id for token in added if token.special}
        for name in ("<pad>", "</s>", "<extra_id_0>"):
            if name not in self.special:
                raise ValueError(f"added_tokens must hold the special token {name}, found {len(added)} others")
        self.pad_id, self.eos_id = self.special["<pad>"], self.special["</s>"]
        self.split_raw = _Splitter({token.content: token for token in added if not token.normalized})
        self.split_normal = _Splitter({self.normalise(token.content): token for token in added if token.normalized})

    def _add(self, spec: Any) -> _Added:
        content, id = _get(spec, "content", str), _get(spec, "id", int)
        expected = self.pieces[content][0] if content in self.pieces else len(self.tokens)
        if id != expected:
            raise ValueError(f"added_tokens gives {content!r} the id {id}, where model.vocab leads to {expected}")
        self.tokens[id] = content
        flags = ("special", "lstrip", "rstrip", "single_word", "normalized")
        return _Added(content, id, **{flag: _get(spec, flag, bool, False) for flag in flags})

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
