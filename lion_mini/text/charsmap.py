"""The steps that T5's `tokenizer.json` names, which make words of a text before these are cut into pieces.

A normaliser changes the text, a pre-tokeniser splits it, and both are read from the file and run in its order:

    "Ａ  dog"  --Precompiled, Replace-->  "A dog"  --Metaspace-->  "▁A", "▁dog"

Where a rule looks odd, it is that of Hugging Face's `tokenizers`, and the models were trained with it.
next: tokenizers.py
"""

import base64
import re
import struct
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

# Unicode's White_Space; Python's own notion holds four control characters more.
SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
# Joiners, Thai and Lao AM, half-width voicing marks and skin tones attach to what they follow, like accents.
JOINING = "\u200c\u200d\u0e33\u0eb3\uff9e\uff9f" + "".join(map(chr, range(0x1F3FB, 0x1F400)))

Normalizer = Callable[[str], str]
PreTokenizer = Callable[[str, bool], list[tuple[str, bool]]]  # the flag: is this where the whole text begins?


class Precompiled:
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
        for cluster in clusters(text):
            whole = self.find(cluster) if len(utf8(cluster)) < 6 else None
            out += [whole] if whole is not None else [c if (rule := self.find(c)) is None else rule for c in cluster]
        return "".join(out)

    def find(self, text: str) -> str | None:
        """What the *shortest* rule that begins `text` makes of all of it: the accent on a ligature is lost."""
        node = self.units[0] >> 10
        for byte in utf8(text):
            node ^= byte
            if node >= len(self.units) or self.units[node] & 0x800000FF != byte:
                return None
            rule_ends = self.units[node] >> 8 & 1
            node ^= self.units[node] >> 10
            if rule_ends:
                start = self.units[node] & 0x7FFFFFFF
                return self.strings[start : self.strings.index(b"\0", start)].decode()
        return None


def utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def clusters(text: str) -> Iterator[str]:
    """Grapheme clusters, as far as `Precompiled` can tell: those of Hangul, flags and emoji have 6 bytes or more."""
    start = 0
    for i in range(1, len(text)):
        before, char = text[i - 1], text[i]
        if char < "\x80":
            joined = before + char == "\r\n"
        else:
            mark = char in JOINING or unicodedata.category(char)[0] == "M"
            joined = mark and (before in JOINING or unicodedata.category(before) not in ("Cc", "Cf", "Zl", "Zp"))
        if not joined:
            yield text[start:i]
            start = i
    yield text[start:]


def replace(pattern: re.Pattern[str], content: str, text: str) -> str:
    return pattern.sub(lambda _: content, text)


def strip(left: bool, right: bool, text: str) -> str:
    text = text.lstrip(SPACE) if left else text
    return text.rstrip(SPACE) if right else text


def whitespace_split(text: str, first: bool) -> list[tuple[str, bool]]:
    return [(word[0], first and word.start() == 0) for word in re.finditer(f"[^{SPACE}]+", text)]


@dataclass(frozen=True)
class Metaspace:
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
        words = [head] * bool(head) + [self.mark + word for word in rest]
        return [(word, first and i == 0) for i, word in enumerate(words)]


# --- reading them


def get(data: Any, key: str, kind: type, default: Any = None) -> Any:
    value = data.get(key, default) if isinstance(data, dict) else None
    if type(value) is not kind:
        name = {dict: "an object", list: "a list", str: "a string", int: "a whole number", bool: "true or false"}[kind]
        raise ValueError(f"{key} must be {name}, found {value!r:.60}")
    return value


def read_replace(spec: Any) -> Normalizer:
    pattern = get(spec, "pattern", dict)
    text = get(pattern, "Regex", str) if "Regex" in pattern else re.escape(get(pattern, "String", str))
    try:
        return partial(replace, re.compile(text), get(spec, "content", str))
    except re.error as error:
        raise ValueError(f"the pattern {text!r} of Replace is not a regular expression: {error}") from None


def read_metaspace(spec: Any) -> Metaspace:
    older = "always" if get(spec, "add_prefix_space", bool, True) else "never"  # how older files say it
    step = Metaspace(
        get(spec, "replacement", str), get(spec, "prepend_scheme", str, older), get(spec, "split", bool, True)
    )
    if len(step.mark) != 1:
        raise ValueError(f"replacement must be one character, found {step.mark!r}")
    if step.prepend not in ("always", "first", "never"):
        raise ValueError(f"prepend_scheme must be always, first or never, found {step.prepend!r}")
    return step


NORMALIZERS: dict[str, Callable[[Any], Normalizer]] = {
    "Precompiled": lambda spec: Precompiled(get(spec, "precompiled_charsmap", str)),
    "Replace": read_replace,
    "Strip": lambda spec: partial(strip, get(spec, "strip_left", bool), get(spec, "strip_right", bool)),
}
PRE_TOKENIZERS: dict[str, Callable[[Any], PreTokenizer]] = {
    "Metaspace": read_metaspace,
    "WhitespaceSplit": lambda spec: whitespace_split,
}


def read_steps(name: str, spec: Any, known: Mapping[str, Callable[[Any], Any]]) -> list[Any]:
    """The steps that stand at one key of a tokenizer.json, sequences unrolled."""
    if spec is None:
        return []
    kind = get(spec, "type", str)
    if kind == "Sequence":
        parts = get(spec, name.replace("_", "") + "s", list)
        return [step for part in parts for step in read_steps(name, part, known)]
    if kind not in known:
        raise ValueError(f"the {name} {kind!r} is unknown here; there are {', '.join(known)} and Sequence")
    return [known[kind](spec)]
