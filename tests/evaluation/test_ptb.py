"""ptb_tokenize against the lexer itself (the jar in pycocoevalcap), on whole kinds of strings."""

import json
import os
import random
import re
import shutil
import subprocess
import time
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import ROOT, oracle

from lion_mini.evaluation.metrics import cider
from lion_mini.evaluation.ptb import ptb_tokenize

FIXTURES = ROOT / "tests" / "fixtures"

# A part and its choices: a choice may name other parts; {s} is a space and {u00ad} the character of that number.
PARTS = r"""
9: 0 1 2 3 4 5 6 7 8 9
2: {9}{9}
3: {9}{9}{9}
4: {2}{2}
n: {9} {2} {3} {9},{3} {9}.{9} .{9} -{9} +{2} {2}.{2} {4} 0{9} {9}:{9} {9}.{9}.{9}
x: a b c d e g i k m n o p s t w x y z A B C E I L N O R S T U W é ñ
word: cat Stop STOP the Milk a I 7up isn road Über 3D naïve ok GOOD x2 résumé main_st Open
mark: . , ; : ? ! ... !! ?! ' " ) ( ] - -- / \ * & % + = ~ | < > ^ _ @ # $ ` ’ ” … .. .) ." ,"
host: foo.com www.foo.com Foo.com my-site.com bbc.co.uk www.a.b.org foo.edu www.foo.travel é.com FOO.COM foo.de
path: / /a /a/b.html /?q=1&r=2 /a-b_c /~me /a(b) /x, /index.php /A#b :80/x
type: txt jpg PDF zip mp3 c h py html jpeg docx xyz x tar.gz class
user: me john.doe j_d a+b x-y 1a info Bob é a,b
unit: kg lb lbs ft in cm mm mph km/h °C °F % oz ml GB am pm px m² ° ′ K th st nd rd s x '
money: $ £ € ¥ ¢ US$ HK$ A$ R$ us$ ¤ ₤ ฿ ₹ USD # c$ € ￡
frac: ½ ¼ ¾ ⅓ ⅔ ⅛ ⅞ {9}/{9} {2}/{9} {9}⁄{9} {9}\/{9} ² ³ x² ₂ H₂O ¹⁄₂ ⁻¹
month: Jan Jan. Sept. Sept Dec. July May Mon. Tues. Fri Sat. aug.
abbr: Mr. Dr. St. Ave. Blvd. Rd. Inc. Co. Corp. Ltd. etc. vs. No. no. fig. Figs. art. pp. op. ca. Jr. Sr. Ph.D. Ed.D.
abbr: Mt. Ft. ft. sq. Pa. pa. La. Miss. miss. Mass. Ill. ill. Tex. tex. Wash. Del. Ore. Calif. Conn. Ct. Gen. Capt.
abbr: Sgt. Dept. Univ. est. ext. tel. approx. min. max. oz. lb. Bros. Esq. Mrs. Ms. Prof. Rev. Hon. Gov. Sen. Rep.
abbr: Mfg. bldg. al. seq. cf. Wm. Alex. Mlle. Assoc. prop. Ste. Det. Plc. Ark. Az. Va. Wis. Wisc. Kan. Pte. Nos. Cie.
acro: U.S. U.S U.K. p.m. a.m. A.M. D.V.D R.I.P. e.g. i.e. J.R.R. B. I. x. A.B B.Sc. Ph.D U.S.A non-U.S. é.
follow: The An A In It cat He We cats If THE this Then However Mr. Also You a They they 5 <b>
stem: it he I they we you who dog what let can there do ca wo is should could ain would mus n DO CA IT y l d o
apo: ' ' ' ’ ` ‘ &apos; ' ´
clitic: s m d re ve ll t S M D RE all em til tis twas n cause bout ya sall
slang: cannot CANNOT cannots gonna Gonna gotta wanna gimme lemme 'tis 'twas 'Twas cannot. dunno c'mon ma'am o'clock
slang: O'Brien y'all Y'all d'or l'eau D'Arcy 'n' 'em 'til 'till '90s '20s '10s '92 'cause s'mores li'l nat'l ev'ry ol'
slang: Dunkin' somethin' cont'd cont'd. nor'easter e'er ne'er O'o Cap'n c'est more'n rock'n'roll d'ye n't 't John's
slang: cats' James's Qu'ran Shi'ite B'Gosh o’clock y’all 'll 's pro- anti- pro-life S&P-500 S&amp;P-500 S&Ls C.D.s c++
slang: C# f# a# C++ c+ don't won't can't couldn't've I'd've y'all'd fo'c'sle goin' 'er jack-o'-lantern d'Avignon-x
eyes: : ; = >: <; :' 8 X x B
nose: - o  *  ' ^  ,
mouth: ) ( D P d p O o \ { @ | [ ] / 3 * S ))
face: ^_^ (^_^) -_- o_o x_x >_< (-_-) (x.x) ^.^ (^-^) (='-'=) ~_~ '_' <3 </3 \o/ ¯\_(ツ)_/¯ (^o^) (--) (^-`)
tag: #nyc #NYC2014 @home @nyc_1 #été #a_b ##x @ # @@x #1 @1 @_a @é #über! #a.b @a.b #日本 ＠x # @x's #tag's
hyphen: well-known 10-year-old half-eaten x-ray T-shirt 3-D A-1 e-mail -5 -x x- a--b a---b a-b-c-d.e 1-2 12-b 7-Eleven
hyphen: U.S.-led and/or 24/7 he/she a/b/c/d w/ w/o 1/2-inch a_b __x__ 3.5-inch 1,000-lb non‐stop semi‑dry co-U.S.
hyphen: mid-’90s rock-n-roll o'clock-ish a-é é-a AT&T R&B B&amp;B AT&amp;T A+B a+b Q&A M&M's a&b A&b-c 5-o'clock
open: ( [ { < " ' “ ‘ « ‹ `` ` „ ‚ << '' ( [ -LRB- “‘ ‘‘
close: ) ] } > " ' ” ’ » › '' ` ” ’ >> ) ] -RRB- ’” ’’ ” ”
dash: - -- --- ---- ----- ------ – — ― −  - ‐ ‑ &mdash; &ndash; &MD; ~ =
dots: . .. ... .... ..... ...... ....... .{s}. .{s}.{s}. .{s}.{s}.{s}.{s}. .{s}.{s}.{s}.{s}.{s}. … .… …. ..{s}. .a ...5
entity: &amp; &lt; &gt; &quot; &apos; &nbsp; &AMP; &LT; &QUOT; &copy; &#39; &#x27; &eacute; caf&eacute; &Ouml;
entity: &hellip; &amp;amp; & &; &ht; &amp
html: <b> </b> <br/> <p> <a{s}href="x"> <a{s}href='x{s}y'{s}id="b"> <!--{s}x,{s}y{s}--> <?xml{s}v?> <img{s}src=x> <3>
html: <b <1> <é> <a:b> </a_b{s}> <x{s}y> <a@b.com> <B> <br{s}/>
accent: café naïve résumé Ångström São Łódź ñandú façade œuvre straße ÉCOLE ǅ ﬁ İstanbul ΣΑΣ e{u0301}te{u0301} ª Ⅷ K
accent: o{u0308} àb Ⅷ ª º µ ſ K ŉ
script: 日本 日本語 中文字 漢字。 ひらがな カタカナ 한국어 Привет мир שלום שָׁלוֹם مرحبا مَرْحَبًا नमस्ते हिन्दी ไทย ภาษาไทย
script: Ελλάδα; 日、本 ァ・ィ ＡＢＣ ｱｲ 〒 《本》 「本」 ٣ ٣٫٥ १२ {u3000} Հայ։ ߀߁ ༼ አማ ། ؟ ،
emoji: 😀 👍🏽 ❤️ ❤ ☺ ★ ☀️ 🇺🇸 👨‍👩‍👧 ✓ ✔️ → ← ⇒ ♥ ♫ ☎ ① Ⓐ ⓐ ■ ● ✈ ♀ ⚡ 🏳️‍🌈 ㊗ ©️ ™ 1️⃣ ☃
sign: © ® ™ ° § ¶ † ‡ • · × ÷ ± ¬ ¦ ¡ ¿ ‰ ′ ″ ∞ ≠ ≤ № ℃ ℉ Ω º ¹ ² ¨ ´ ¯ ≈ ∆ ◊ ⁂ ‼ ⁉ ※ ￥ ＆ ！ ～ ｡ ﷼ ₩ ₽ ₿ ₫ ₪ ¢ £ ¤ €
gap: {s} {s} {s}{s} {u0009} {u00a0} {u2003} {u2009} {u3000} {u200b} {u202f} {u205f} {u1680} {ufeff} {u200e} {u2060}
gap: {u001f} {u0000} {u007f} {u00a0}{u00a0} {u200d} {s}{u0009}
soft: {u00ad} co{u00ad}op a{u00ad} {u00ad}b {u00ad}{u00ad} 1{u00ad}2 1{u00ad}000 co{u00ad}op-b do{u00ad}n't
soft: it{u00ad}'s a{u00ad}.b é{u00ad} {u00ad}5 -{u00ad} A{u00ad}B.
ascii: ! " # $ % & ' ( ) * + , - . / : ; < = > ? @ [ \ ] ^ _ ` { | } ~ {s} a B c n 1 2 's 0 x {s} {s}
"""

# A kind of string and its templates.
KINDS = r"""
marks: {word}{mark}{word} {word}{mark} {word}{mark}{mark}{word} {mark}{word}{mark}
sites: http://{host} https://{host}{path} {host}{path} {host} {host}{mark} http://{word}{mark}{word} {host}{path}{mark}
files: {word}.{type} {x}{9}.{type} {word}.{type}{mark} {word}-{word}.{type} {word}.{x}.{type} {host}/{word}.{type}
mail: {user}@{host} {user}@{host}{mark} <{user}@{host}> &lt;{user}@{host}&gt; {user}@{word} mailto:{user}@{host},{x}
units: {n}{unit} {n}{s}{unit} {n}-{unit} {n}x{n} {n}{unit}{mark} {n}{unit}/{n}{unit} {n}'{n}" {n}{mark}{n}
money: {money}{n} {money}{s}{n} {n}{money} {n}{s}{money} {money}{n}{mark} {money}{n}-{money}{n} {money}{money}
fractions: {n}{frac} {n}{s}{frac} {frac} {frac}{unit} {frac}{mark} {n}-{frac} {x}{frac} {frac}{s}{unit} {frac}{frac}
dates: {2}/{2}/{2} {9}-{9}-{4} {month}{s}{2} {month}{2} {2}/{9} {2}.{2}.{4} '{2} '{9}0s {3}0s {4}-{2}-{2} {month},{s}{4}
times: {2}:{2} {9}:{2}{unit} {9}:{2}{s}{acro} {2}h{2} {2}:{2}:{2} {9}{acro} {9}{s}{acro}{s}{word} {9}{s}o'clock{mark}
phones: {3}-{3}-{4} ({3}){s}{3}-{4} +{9}-{3}-{3}-{4} {3}.{3}.{4} (0{9}){s}{4}{s}{4} {3}{s}{3}{s}{4} {3}-{4} ({3}){4}
abbreviations: {abbr} {abbr}{s}{follow} {abbr}{9} {abbr}{s}{9} {abbr}{mark} {abbr}{word} {abbr}{s}{s}{word} {x}{s}{abbr}
acronyms: {acro} {acro}{s}{follow} {acro}{mark} {acro}{word} {x}.{s}{follow}{s}{word} {x}.{x}. {x}.{x}.{x} {acro}{apo}s
clitics: {stem}{apo}{clitic} {stem}n{apo}t {stem}{apo}{clitic}{apo}{clitic} {apo}{clitic} {word}{apo}{x} {x}{apo}{word}
contractions: {slang} {slang}{s}{word} {slang}{mark} {slang}{x} {mark}{slang}
emoticons: {eyes}{nose}{mouth} {eyes}{mouth} {face} {word}{eyes}{mouth} {eyes}{nose}{mouth}{x} {face}{mark} {face}{x}
handles: {tag} {tag}{mark} #{word} @{word} #{x}{9} {word}{tag} {mark}{tag}
hyphens: {hyphen} {hyphen}{mark} {word}-{word} {n}-{word}-{n} {word}-{acro} {word}/{word} {word}_{word} {word}\/{word}
quotes: {open}{word}{close} {open}{word}{s}{word}{mark}{close} {open}{open}{word}{close}{close} {close}{word}{open}
dashes: {word}{dash}{word} {dash}{word} {word}{s}{dash}{s}{word} {n}{dash}{n} {dash}{dash} {dash}{mark} {dots}{dash}
dots: {word}{dots}{word} {dots}{word} {word}{dots} {n}{dots} {dots}{n} {dots}{mark} {word}{s}{dots}{s}{word}
markup: {html} {html}{word}{html} {entity} {word}{entity}{word} {entity}{mark} {html}{entity} {x}{entity} {html}{mark}
accents: {accent} {accent}{mark} {accent}{accent} {accent}-{word} {accent}{apo}s {accent}{9} {accent}/{word}.{accent}
scripts: {script} {script}{mark} {script}{word} {script}{script} {script}{9} {script}-{script} {script}{sign}
emoji: {emoji} {word}{emoji} {emoji}{word} {emoji}{emoji} {emoji}{mark} {9}{emoji} {x}{s}{emoji}{s}{emoji} {abbr}{emoji}
symbols: {sign} {sign}{word} {word}{sign} {n}{sign} {sign}{n} {sign}{sign} {sign}{mark} {x}{sign}{x}
soft hyphens: {soft} {soft}{mark} {soft}{soft} {word}{soft} {soft}{word} {soft}.{type}{s}
white space: {word}{gap}{word} {n}{gap}{frac} {n}{gap}{n}{gap}{n} {acro}{gap}{follow}{gap} {abbr}{gap}{gap}{word}
noise: {ascii}{ascii}{ascii} {ascii}{ascii}{ascii}{ascii}{ascii} {ascii}{ascii}{ascii}{ascii}{ascii}{ascii}{ascii}
"""
FRAMES = """{} {} {} {}. {}, {}? {}! ({}) "{}" “{}” '{}' {}: {}; a{s}{}{s}b A{s}sign{s}says{s}{}. {}{s}The{s}cat"""


def table(text: str) -> dict[str, list[str]]:
    rows: dict[str, list[str]] = defaultdict(list)
    for line in text.strip("\n").splitlines():
        name, _, choices = line.partition(": ")
        rows[name] += choices.split(" ")
    return rows


def generate(count: int) -> dict[str, list[str]]:
    """`count` strings of each kind, some alone and some in a sentence, brackets or quotes; always the same ones."""
    draw, parts = random.Random(0), table(PARTS)

    def expand(text: str) -> str:
        return re.sub(r"\{(\w+)\}", lambda found: part(found[1]), text)

    def part(name: str) -> str:
        if name == "s":
            return " "
        return expand(draw.choice(parts[name])) if name in parts else chr(int(name[1:], 16))

    frames = FRAMES.split(" ")
    return {
        kind: [expand(draw.choice(frames).replace("{}", draw.choice(templates))) for _ in range(count)]
        for kind, templates in table(KINDS).items()
    }


def lexer(lines: list[str]) -> list[list[str]]:
    """Each line's tokens as pycocoevalcap has them: its jar, its arguments, its dropped punctuation."""
    module = oracle("pycocoevalcap.tokenizer.ptbtokenizer")
    if not shutil.which("java"):
        if os.environ.get("LION_REQUIRE_ORACLE"):
            pytest.fail("java is missing, and LION_REQUIRE_ORACLE is set")
        pytest.skip("the jar in pycocoevalcap is the oracle of this test: install a Java runtime")
    jar = Path(str(module.__file__)).with_name(module.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    # a last line end: pycocoevalcap leaves it out, by which the very last caption can differ
    found = subprocess.run(
        command, input="".join(f"{line}\n" for line in lines).encode(), capture_output=True, check=True
    )
    tokens = found.stdout.decode().split("\n")[:-1]
    assert len(tokens) == len(lines)
    return [" ".join(t for t in line.split(" ") if t not in module.PUNCTUATIONS).split() for line in tokens]


KINDS_STORED, DIFFERED = (
    json.loads((FIXTURES / name).read_text(encoding="utf-8"))["cases"]
    for name in ("ptb_kinds.json", "ptb_fixture.json")
)


@pytest.mark.parametrize("cases", [KINDS_STORED, DIFFERED], ids=["kinds", "once different"])
def test_stored_strings(cases: list[dict[str, str]]) -> None:
    found = ptb_tokenize([case["raw"] for case in cases])
    assert len(found) >= 200
    for case, tokens in zip(cases, found, strict=True):
        assert tokens == case["tokens"].split(), case["raw"]


def test_kinds_of_strings_equal_the_lexer() -> None:
    kinds = generate(600)
    everything = [string for strings in kinds.values() for string in strings]
    cases = iter(zip(everything, ptb_tokenize(everything), lexer(everything), strict=True))
    assert len(kinds) >= 16
    for kind, strings in kinds.items():
        wrong = [case for case in (next(cases) for _ in strings) if case[1] != case[2]]
        print(f"{kind}: {100 - 100 * len(wrong) / len(strings):.2f} %")
        assert len(wrong) <= 0.01 * len(strings), wrong


def test_real_captions_and_stored_strings_equal_the_lexer() -> None:
    corpora = json.loads((FIXTURES / "cider_fixture.json").read_text(encoding="utf-8"))["cases"]
    images = [image for corpus in corpora for image in corpus["images"]]
    lines = [caption for image in images for caption in (*image["references"], image["hypothesis"])]
    lines += [case["raw"] for case in KINDS_STORED + DIFFERED]
    assert ptb_tokenize(lines) == lexer(lines)


def test_cider_of_a_messy_corpus_equals_pycocoevalcap() -> None:
    strings = [string for kind, strings in generate(100).items() if kind != "accents" for string in strings]
    references = [[*strings[i : i + 4], " ".join(strings[i : i + 4])] for i in range(0, len(strings), 4)]
    hypotheses = [" ".join(strings[i + 1 : i + 3]) for i in range(0, len(strings), 4)]
    words = iter(lexer([reference for image in references for reference in image]))
    theirs = {i: [" ".join(next(words)) for _ in image] for i, image in enumerate(references)}
    scored = {i: [" ".join(tokens)] for i, tokens in enumerate(lexer(hypotheses))}
    expected, scores = oracle("pycocoevalcap.cider.cider").Cider().compute_score(theirs, scored)
    corpus, found = cider(references, hypotheses)
    assert corpus == pytest.approx(expected, abs=1e-6)
    assert found == pytest.approx(list(scores), abs=1e-6)


def test_nothing_but_a_caption_ends_a_line() -> None:
    lines = {"Dr.\rX\x85y\u2028z": "dr. x y z", "<a b='": "< a b =", "'> c": "> c", "": "", "\n": ""}
    assert ptb_tokenize(list(lines)) == [tokens.split() for tokens in lines.values()]


@pytest.mark.parametrize("unit", ["a,", "a*.", "1a.", "a-", "<!a", "<a b='", "a@", "www.a", "'", "-", "😀"])
def test_time_grows_with_the_length_alone(unit: str) -> None:
    times = []
    for length in (2_000, 20_000):
        start = time.perf_counter()
        ptb_tokenize([(unit * length)[:length]])
        times.append(time.perf_counter() - start)
    assert times[1] < 40 * times[0] + 0.1
