"""The normalisers and pre-tokenisers that T5's `tokenizer.json` names, in the order of the file.

A normaliser changes the text, a pre-tokeniser splits it into words. The rules are those of Hugging Face's `tokenizers`,
odd ones included: the models were trained with them.

    "Ａ  dog"  --Precompiled, Replace-->  "A dog"  --Metaspace-->  "▁A", "▁dog"
"""

import base64
import re
import struct
from functools import partial
from itertools import pairwise
from operator import methodcaller
from typing import Any
from unicodedata import category

from ..files import need, reading

# Unicode's White_Space; str.isspace accepts four control characters more.
SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
# Joiners, Thai and Lao AM, half-width voicing marks and skin tones attach to the character before, like accents.
JOINING = "\u200c\u200d\u0e33\u0eb3\uff9e\uff9f" + "".join(map(chr, range(0x1F3FB, 0x1F400)))


class Precompiled:
    """sentencepiece's normalisation: NFKC and rules of its own, such as tabs to spaces.

    The rules are a trie over UTF-8 bytes, Darts' double array, and behind it their right-hand sides, each ended by a
    zero. A unit holds the byte that leads to it, the offset of its children (child = node ^ offset ^ byte) and a flag:
    does a rule end here? If one does, child 0 holds the position of its right-hand side.
    """

    def __init__(self, encoded: str):
        data = base64.b64decode(encoded, validate=True)
        size = struct.unpack_from("<I", data)[0]
        self.units, self.strings = struct.unpack_from(f"<{size // 4}I", data, 4), data[4 + size :]
        self.root = self.units[0] >> 10

    def __call__(self, text: str) -> str:
        return "".join(map(self.rewrite, clusters(text)))

    def rewrite(self, cluster: str) -> str:
        """Replace the cluster by the *shortest* rule that fits its start; without one, rewrite each character."""
        data, node = cluster.encode("utf-8", "surrogatepass"), self.root
        for byte in data if len(data) < 6 else b"":
            node ^= byte
            if node >= len(self.units) or self.units[node] & 0x800000FF != byte:
                break
            rule_ends, node = self.units[node] >> 8 & 1, node ^ self.units[node] >> 10
            if rule_ends:
                return self.strings[self.units[node] & 0x7FFFFFFF :].split(b"\0", 1)[0].decode()
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


class Metaspace:
    """A space becomes a visible mark that belongs to the word behind it: "a dog" is ▁a, ▁dog."""

    def __init__(self, spec: dict[str, Any]):
        older = "always" if spec.get("add_prefix_space", True) else "never"
        self.mark, self.prepend = spec["replacement"], spec.get("prepend_scheme", older)
        if len(self.mark) != 1 or self.prepend not in ("always", "first", "never"):
            raise ValueError("replacement must be one character, prepend_scheme always, first or never")
        self.pattern = re.compile(f"(?!^)(?={re.escape(self.mark)})" if spec.get("split", True) else "(?!)")

    def __call__(self, text: str, first: bool) -> list[str]:  # first: the whole text begins with this one
        text = text.replace(" ", self.mark)
        prepend = self.prepend == "always" or (self.prepend == "first" and first)
        return self.pattern.split(self.mark + text if prepend and text[:1] not in ("", self.mark) else text)


def read_steps(key: str, spec: Any) -> list[Any]:
    """The steps at one key of a tokenizer.json, sequences unrolled."""
    if spec is None:
        return []
    if need(spec, dict, key).get("type") == "Sequence":
        return [step for part in spec[f"{key.replace('_', '')}s"] for step in read_steps(key, part)]
    with reading(f"the {key} {spec!r:.99}"):
        match key, spec:
            case "normalizer", {"type": "Precompiled"}:
                return [Precompiled(spec["precompiled_charsmap"])]
            case "normalizer", {"type": "Replace", "pattern": old, "content": new}:
                pattern = old["Regex"] if "Regex" in old else re.escape(old["String"])
                return [partial(re.compile(pattern).sub, new.replace("\\", r"\\"))]
            case "normalizer", {"type": "Strip", "strip_left": left, "strip_right": right}:
                return [methodcaller("lstrip", SPACE)] * left + [methodcaller("rstrip", SPACE)] * right
            case "pre_tokenizer", {"type": "WhitespaceSplit"}:
                return [lambda text, first: re.split(f"[{SPACE}]+", text)]
            case "pre_tokenizer" | "decoder", {"type": "Metaspace"}:
                return [Metaspace(spec)]
        raise ValueError("it is unknown or incomplete")
