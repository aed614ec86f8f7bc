"""The normalisers that T5's `tokenizer.json` names, in the order of the file. The rules are those of Hugging Face's
`tokenizers`, odd ones included: the models were trained with them.

    "Ａ  dog"  --Precompiled, Replace-->  "A dog"
"""

import base64
import re
import struct
from functools import partial
from operator import methodcaller
from itertools import pairwise
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
    """The steps that a tokenizer.json names, sequences unrolled."""
    if spec is None:
        return []
    if need(spec, dict, "normalizer").get("type") == "Sequence":
        return [step for part in spec["normalizers"] for step in read_normalizers(part)]
    with reading(f"the normalizer {spec!r:.99}"):
        match spec:
            case {"type": "Precompiled"}:
                return [Precompiled(spec["precompiled_charsmap"])]
            case {"type": "Replace", "pattern": {"Regex": " {2,}" | r"\s+" as pattern}, "content": str(new)}:
                return [partial(re.compile(pattern.replace(r"\s", f"[{SPACE}]")).sub, new.replace("\\", r"\\"))]
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                return [methodcaller("replace", old, new)]
            case {"type": "Strip", "strip_left": bool(left), "strip_right": bool(right)}:
                return [methodcaller("lstrip", SPACE)] * left + [methodcaller("rstrip", SPACE)] * right
        raise ValueError("it is unknown or incomplete, or its regular expression is none of FlanT5's")
