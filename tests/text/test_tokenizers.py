"""Ids and decoded text equal to the release's, with the golden vocabularies and the real ones, and odd text too."""

import base64
import json
import pickle
import random
import shutil
import struct
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from conftest import GOLDEN, assets, oracle

from lion_mini.text.tokenizers import UnigramTokenizer, WordPieceTokenizer

T5 = GOLDEN / "official" / "flan-t5" / "tokenizer.json"
BERT = GOLDEN / "official" / "bert-base-uncased" / "vocab.txt"
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
OLDER = {"type": "Metaspace", "replacement": "▁"}
RESAVED = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, METASPACE]}


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def changed(tmp_path: Path, source: Path = T5, **changes: Any) -> Path:
    """A tokenizer.json with other values at some of its top keys."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(load(source) | changes), encoding="utf-8")
    return path


def added(content: str, id: int, **flags: bool) -> dict[str, Any]:
    off = dict.fromkeys(("special", "lstrip", "rstrip", "single_word", "normalized"), False)
    return {"content": content, "id": id} | off | flags


def tiny(pieces: dict[str, float], **changes: Any) -> dict[str, Any]:
    """A tokenizer.json with a handful of pieces behind the required tokens, ids from 4."""
    names = ("<pad>", "</s>", "<unk>", "<extra_id_0>")
    data = {
        "model": {"type": "Unigram", "unk_id": 2, "vocab": [[p, 0.0] for p in names] + [[*p] for p in pieces.items()]},
        "added_tokens": [added(name, i, special=True) for i, name in enumerate(names)],
        "normalizer": None,
        "pre_tokenizer": METASPACE,
        "decoder": METASPACE,
    }
    return data | changes


CHARSMAP = load(T5)["normalizer"]["normalizers"][0]
ADDED = load(T5)["added_tokens"]


# --- what the release computed


def test_golden_probes() -> None:
    t5, bert = UnigramTokenizer.from_file(T5), WordPieceTokenizer.from_file(BERT)
    golden = load(GOLDEN / "golden.json")
    cuts = zip(golden["tokenizer_probe"], golden["t5_truncated_left_16"], golden["bert_truncated_left_12"], strict=True)
    for probe, last_16, last_12 in cuts:
        assert t5.encode(probe["text"]) == probe["t5"]
        assert bert.encode(probe["text"]) == probe["bert"]
        assert t5.decode(probe["t5"]) == probe["t5_decoded"]
        assert t5.encode(probe["text"], 16) == last_16
        assert bert.encode(probe["text"], 12) == last_12


def test_golden_generations() -> None:
    """What the release decoded from generated ids, some of them beyond the vocabulary."""
    t5 = UnigramTokenizer.from_file(T5)
    for sample in load(GOLDEN / "golden.json")["samples"]:
        for run in sample["generate"].values():
            assert [t5.decode(row).strip() for row in run["ids"]] == [text.strip() for text in run["text"]]


def test_real_vocabularies(tmp_path: Path) -> None:
    file = assets() / "t5_tokenizer.json"
    charsmap = load(file)["normalizer"]["normalizers"][0]
    other = UnigramTokenizer.from_file(changed(tmp_path, file, normalizer=charsmap, pre_tokenizer=RESAVED))
    t5, bert = UnigramTokenizer.from_file(file), WordPieceTokenizer.from_file(assets() / "bert_vocab.txt")
    for row in load(GOLDEN / "real_tokenizer.json"):
        assert t5.encode(row["text"]) == row["t5"]
        assert other.encode(row["text"]) == row["t5_whitespace_split"]
        assert bert.encode(row["text"]) == row["bert"]
        assert t5.decode(row["t5"]) == row["t5_decoded"]


# --- what the oracle says of anything else

_TEXT = (
    "abcdehortAÇÉz zé \t\n\r\v  .,'?!-_0٣²½ΣςİßﬁﬃªºⅧ①㈱ｆｕＬＬ漢字漢カガｶﾞ한국ᄒ"
    "\u1161\u0301\u0308\u0327\u0591\u200b\u200c\u200d\u00ad\x01\x1c\x85\xa0\u2028\u3000\ufeff\ufffd▁▁<>[]$^`~“”…👨👩🏽🇫🇷🫠™©ไทยำिक्षآ\u0378\ue000"
)
_WORDS = (
    *("<extra_id_0>", "<extra_id_1>", "</s>", "<pad>", "<unk>", "[CLS]", "[SEP]", "[DEC]", "[MASK]", "[cls]"),
    *("＜pad＞", " the ", " dog", "\r\n", "don't", "   ", "x" * 101, "👨\u200d👩\u200d👧", "<TAG>", "fine"),
)
_RARE = ("", " ", "\x01", "<extra_id_0>\x01", "a\u200b\u0301 b", "①\u0301\u0308\u0327 b", "ª\u200c🏽 b", "ª\r\n b")


def random_text(rng: random.Random) -> str:
    """A mixture of odd characters, tokens, and characters whose class has not changed since Unicode 3.2."""

    def part() -> str:
        kind = rng.random()
        if kind < 0.15:
            return rng.choice(_WORDS)
        char = chr(rng.randrange(0x20, 0x3400 if rng.random() < 0.5 else 0xFFFF))
        settled = unicodedata.ucd_3_2_0.category(char) == unicodedata.category(char) not in ("Cn", "Cs")
        return char if kind < 0.4 and settled else rng.choice(_TEXT)

    return "".join(part() for _ in range(rng.randrange(25)))


def compare(ours: UnigramTokenizer | WordPieceTokenizer, theirs: Any, count: int, seed: int = 0) -> None:
    """The same ids for random texts, and the same text for ids, some of them random; theirs is a `Tokenizer`."""
    tidy = oracle().PreTrainedTokenizerBase.clean_up_tokenization
    assert len(ours) == theirs.get_vocab_size()
    rng = random.Random(seed)
    for text in (*_RARE, *(random_text(rng) for _ in range(count))):
        ids = theirs.encode(text).ids
        assert ours.encode(text) == ids, repr(text)
        ids = [rng.randrange(len(ours) + 20) if rng.random() < 0.3 else id for id in ids]
        assert ours.decode(ids) == tidy(None, theirs.decode(ids)), ids


def test_t5_equals_the_oracle() -> None:
    compare(UnigramTokenizer.from_file(T5), oracle("tokenizers").Tokenizer.from_file(str(T5)), 600)


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": CHARSMAP},
        {"pre_tokenizer": RESAVED, "normalizer": CHARSMAP},
        {"pre_tokenizer": OLDER | {"add_prefix_space": True}, "decoder": OLDER | {"add_prefix_space": True}},
        {"normalizer": None},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": "\\1"}},
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": False}},
        {"normalizer": {"type": "Replace", "pattern": {"String": "a."}, "content": r"\1"}},
        {"added_tokens": [*ADDED, added("do", 480, special=True), added("dog", 481, special=True)]},
    ],
)  # fmt: skip
def test_what_a_file_declares(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Every step and every flag of an added token does what it does in the oracle."""
    path = changed(tmp_path, **changes)
    compare(UnigramTokenizer.from_file(path), oracle("tokenizers").Tokenizer.from_file(str(path)), 200)


def test_real_t5_equals_the_oracle() -> None:
    path = assets() / "t5_tokenizer.json"
    compare(UnigramTokenizer.from_file(path), oracle("tokenizers").Tokenizer.from_file(str(path)), 600)


def test_a_folder_that_transformers_saved_again(tmp_path: Path) -> None:
    """Its `trail ` is one token shorter than that of the published file: read as it is, and weights.py says so."""
    shutil.copyfile(assets() / "t5_tokenizer.json", tmp_path / "tokenizer.json")
    published = UnigramTokenizer.from_file(tmp_path / "tokenizer.json")
    theirs = oracle().T5TokenizerFast.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "again")
    again = UnigramTokenizer.from_file(tmp_path / "again" / "tokenizer.json")
    assert again.drops_spaces > published.drops_spaces
    assert [len(tokenizer.encode("trail ")) for tokenizer in (published, again)] == [3, 2]
    for text in ("trail ", " two  words\t", "a<extra_id_0> b", ""):
        assert again.encode(text) == theirs(text).input_ids


@pytest.mark.parametrize("real", [False, True])
def test_bert_equals_the_oracle(tmp_path: Path, real: bool) -> None:
    path = assets() / "bert_vocab.txt" if real else BERT
    shutil.copyfile(path, tmp_path / "vocab.txt")
    theirs = oracle().BertTokenizer.from_pretrained(tmp_path)
    theirs.add_special_tokens({"bos_token": "[DEC]"})
    compare(WordPieceTokenizer.from_file(path), theirs.backend_tokenizer, 600)


def test_ties_equal_the_oracle() -> None:
    """Whole-number scores make many cuts equally good, and repeated pieces are allowed: the last one counts."""
    data = tiny({"▁": -2, "a": -1, "b": -1, "ab": -2, "ba": -2, "aba": -3, "▁a": -3, "bb": -2, "abab": -4})
    data["model"]["vocab"].append(["aba", -2])
    ours, theirs = UnigramTokenizer(data), oracle("tokenizers").Tokenizer.from_str(json.dumps(data))
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choice("aabbc ") for _ in range(rng.randrange(12)))
        assert ours.encode(text) == [*theirs.encode(text).ids, 1], text


# --- what needs no reference


def test_the_worked_example() -> None:
    t5 = UnigramTokenizer(tiny({"▁": -2, "a": -5, "b": -4, "▁a": -4, "ab": -5}))
    assert t5.encode("a") == [7, 1]
    assert t5.encode("ab") == [4, 8, 1]
    assert t5.encode("a cd<extra_id_0>") == [7, 4, 2, 3, 1]  # two unknown neighbours are one <unk>
    assert (t5.pad_id, t5.eos_id, t5.unk_id, t5.special["<extra_id_0>"], len(t5)) == (0, 1, 2, 3, 9)
    for score, ids in ((-3, [4, 6, 7, 1]), (-1, [4, 5, 2, 8, 1])):  # acb d sums to -26, a <unk> bd to -24 + score
        t5 = UnigramTokenizer(tiny({"▁": -1, "a": -1, "acb": -13, "d": -13, "bd": score}))
        assert t5.encode("acbd") == ids


def test_word_pieces() -> None:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    bert = WordPieceTokenizer([*special, "un", "##do", "##ing", "##doi", "."])
    assert (bert.pad_id, bert.unk_id, bert.cls_id, bert.sep_id) == (0, 1, 2, 3)
    assert (bert.special["[DEC]"], len(bert)) == (10, 11)
    assert bert.encode("Un Ündo. [DEC] undoing") == [2, 5, 5, 6, 9, 10, 1, 3]  # "##doi" is longer, and leaves "ng"
    assert bert.decode([2, 5, 7, 9, 5, 3, 0, 99]) == "uning. un"
    assert bert.decode([7, 7, 5]) == "##inging un"
    assert bert.encode("un" + "do" * 49) == [2, 5, *[6] * 49, 3]  # 100 characters
    assert bert.encode("un" + "ing" * 33) == [2, 1, 3]  # 101
    kept = WordPieceTokenizer(["[DEC]", *special])
    assert (kept.special["[DEC]"], len(kept)) == (0, 6)


def test_new_line_styles(tmp_path: Path) -> None:
    """A vocabulary saved on Windows, or without its last line break, is the same; a line separator is a token."""
    lines = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "\u2028", "\x85"]
    path = tmp_path / "vocab.txt"
    for text in ("\r\n".join(lines) + "\r\n", "\n".join(lines), "\n".join(lines) + "\n"):
        path.write_bytes(text.encode())
        assert list(WordPieceTokenizer.from_file(path).vocab) == [*lines, "[DEC]"]


def test_decode_tidies_spaces() -> None:
    words = ["▁", "a", ".", "?", "!", ",", "'", "n't", "'m", "'s", "'ve", "'re", "b", ";"]
    t5 = UnigramTokenizer(tiny(dict.fromkeys(words, -1.0)))
    a, space, b = t5.pieces["a"][0], t5.pieces["▁"][0], t5.pieces["b"][0]
    for word in (".", "?", "!", ",", "n't", "'m", "'s", "'ve", "'re"):
        assert t5.decode([a, space, t5.pieces[word][0]]) == "a" + word
    assert t5.decode([space, a, space, t5.pieces["'"][0], space, b, space, t5.pieces[";"][0]]) == "a'b ;"
    assert t5.decode([0, a, 3, 2, space, b, 1, 0, 0, 500]) == "a b"
    assert t5.decode([]) == ""


def test_limits() -> None:
    """The end of a text is kept, and what stands around it."""
    t5, bert = UnigramTokenizer.from_file(T5), WordPieceTokenizer.from_file(BERT)
    whole = t5.encode("a red dog")
    assert [t5.encode("a red dog", limit) for limit in (1, 2, 5, 9)] == [[1], whole[-2:], whole, whole]
    words = bert.encode("a red dog")
    assert [bert.encode("a red dog", limit) for limit in (2, 3, 99)] == [[5, 6], [5, *words[-2:]], words]


def test_lone_surrogates_and_pickle() -> None:
    """Half a character, as a shell may pass it, is an unknown one; a tokenizer travels to a data loader's workers."""
    for tokenizer in (UnigramTokenizer.from_file(T5), WordPieceTokenizer.from_file(BERT)):
        assert tokenizer.encode("a \udcff dog")[-2:] == tokenizer.encode("a dog")[-2:]
        assert pickle.loads(pickle.dumps(tokenizer)).encode("a ﬁne dog") == tokenizer.encode("a ﬁne dog")


# --- what is refused


def bad_unigram(key: str, value: Any) -> dict[str, Any]:
    """A good file with one thing changed, at a key such as "model.vocab"."""
    data = tiny({"▁": -2.0})
    *path, last = key.split(".")
    inner = data
    for name in path:
        inner = inner[name]
    inner[last] = value
    return data


def charsmap(data: bytes) -> dict[str, str]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"tokenizer.json: it must be an object, found \[\]"),
        ({"model": 3}, "model must be an object, found 3"),
        (bad_unigram("model.type", "BPE"), "model must be Unigram without byte_fallback, found 'BPE'"),
        (bad_unigram("model.byte_fallback", True), "model must be Unigram without byte_fallback"),
        (bad_unigram("model.vocab", {"a": 1}), "model.vocab: it must be a list, found {'a': 1}"),
        (bad_unigram("model.vocab", [["a", 0.0], ["b"]]), "model.vocab: not enough values to unpack"),
        (bad_unigram("model.vocab", [["a", None]]), "model.vocab: .*float.. argument must be"),
        (bad_unigram("model.vocab", [["a", 10**400]]), "model.vocab: int too large"),
        (bad_unigram("model.vocab", [["a", float("nan")], ["b", 0], ["c", 0]]), "model.vocab: a score is not finite"),
        (bad_unigram("model.unk_id", 9), "model.vocab: .* unk_id is no piece"),
        (bad_unigram("model.unk_id", None), "unk_id must be a whole number, found None"),
        (bad_unigram("normalizer", {"type": "Nmt"}), "normalizer: {'type': 'Nmt'} is unknown or incomplete"),
        (bad_unigram("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFKC"}]}), "'NFKC'} is unknown"),
        (bad_unigram("normalizer", "NFKC"), "normalizer: 'NFKC' is unknown"),
        (bad_unigram("normalizer", {"type": "Strip"}), "'Strip'} is unknown or incomplete"),
        (bad_unigram("normalizer", {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}), "'\\('.* is unk"),
        (bad_unigram("normalizer", {"type": "Replace", "pattern": {"Regex": "(a+)+b"}, "content": ""}), "none of Flan"),
        (bad_unigram("normalizer", {"type": "Strip", "strip_left": 10**9, "strip_right": True}), "is unknown"),
        (bad_unigram("normalizer", {"type": "Precompiled", "precompiled_charsmap": "§"}), "normalizer: .*ASCII char"),
        (bad_unigram("normalizer", charsmap(b"")), "normalizer: .*requires a buffer"),
        (bad_unigram("normalizer", charsmap(struct.pack("<I", 0) + b"\0")), "normalizer: .*out of range"),
        (bad_unigram("normalizer", charsmap(struct.pack("<3I", 8, 1 << 10, 0x100 | 9 << 10) + b"a\0")), "out of range"),
        (bad_unigram("normalizer", charsmap(struct.pack("<3I", 8, 0x80000005, 0x100 | 1 << 10) + b"a\0")), "not found"),
        (bad_unigram("normalizer", charsmap(struct.pack("<3I", 8, 0x80000000, 0x100 | 1 << 10) + b"\xff\0")), "UTF-8"),
        (bad_unigram("pre_tokenizer", {"type": "ByteLevel"}), "pre_tokenizer {'type': 'ByteLevel'} is not T5's"),
        (bad_unigram("pre_tokenizer", OLDER | {"add_prefix_space": False}), "False} is not T5's"),
        (bad_unigram("pre_tokenizer", METASPACE | {"split": False}), "False} is not T5's"),
        (bad_unigram("pre_tokenizer", {}), "pre_tokenizer {} is not T5's"),
        (bad_unigram("pre_tokenizer", METASPACE | {"prepend_scheme": "first"}), "'first'.* is not T5's"),
        (bad_unigram("pre_tokenizer", METASPACE | {"replacement": "__"}), "'__'.* is not T5's"),
        (bad_unigram("decoder", {"type": "WordPiece"}), "decoder {'type': 'WordPiece'} is not T5's"),
        (bad_unigram("decoder", None), "decoder must be an object, found None"),
        (bad_unigram("added_tokens", []), "added_tokens: the field '<pad>' is missing"),
        (bad_unigram("added_tokens", [added("<pad>", 0, special=True)]), "added_tokens: the field '</s>' is missing"),
        (bad_unigram("added_tokens", [added("x", 9, special=True, single_word=True)]), "'x' has .*'single_word'"),
        (bad_unigram("added_tokens", [added("x", 9)]), "added_tokens: 'x' has {'special': False}, which no"),
        (bad_unigram("added_tokens", [added("x", 0, special=True) | {"id": "0"}]), "it must be a whole number"),
    ],
)  # fmt: skip
def test_bad_unigram_files(tmp_path: Path, data: Any, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as caught:
        UnigramTokenizer.from_file(path)
    assert str(caught.value).startswith(f"{path}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "it is empty"),
        (b"<html>\n", "it is a web page"),
        (b"a\n", r"the field '\[PAD\]' is missing"),
        (b"[PAD]\n[UNK]\n[CLS]\n[MASK]\n", r"the field '\[SEP\]' is missing"),
        (b"[PAD]\n\xff\n", "it is not UTF-8 text"),
    ],
)
def test_bad_vocabularies(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=message) as caught:
        WordPieceTokenizer.from_file(path)
    assert str(caught.value).startswith(f"{path}")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for tokenizer in (UnigramTokenizer, WordPieceTokenizer):
        with pytest.raises(ValueError, match="x: No such file"):
            tokenizer.from_file(path)
    for text, fault in (("{", "not whole JSON"), ("[" * 100_000, "nested too deeply"), ("", "not whole JSON")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"x: it is {fault}"):
            UnigramTokenizer.from_file(path)
