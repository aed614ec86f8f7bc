"""Penn Treebank tokens of captions without Java: what CIDEr counts.

COCO's evaluators pipe captions through Stanford CoreNLP 3.4.1 (-preserveLines -lowerCase) and then drop punctuation.
Its lexer tries every rule at every place, takes the longest match, and among equals the first. So does this table:

    A man can't ride his friend's bike; it's 3.5 miles!  ->  a man ca n't ride his friend 's bike it 's 3.5 miles
"""

import re
import unicodedata
from functools import cache

_SYMBOLS = re.compile(
    r"[¡¦-©¬®-±´¶-¸¿×÷;·։־׀׃׆׳״\u0600-\u0603؆-؊،؛؞؟٪٭۔܀-܍߶-߸।॥๏᾽‖‗†-․‰-‸※‾-⁂⁼-⁾₌-₎℀-⅏←-⯿。〒・！-／：-＠［-｀｛-･]"
)


@cache
def _shape(char: str) -> str:
    """What the rules read: あ for a letter beyond ASCII, ̂ for a mark, ٠ for a digit, ° for a symbol that is a token."""
    kind = unicodedata.category(char) if "\x80" <= char <= "\uffff" else ""
    if kind[:1] == "L":
        return "あ"
    if kind == "Nd":
        return "٠"
    if kind in ("Mn", "Mc", "Sk") and "˂" <= char < "\u0ed0":
        return "\u0302"
    return "°" if kind and _SYMBOLS.match(char) else char


# Parts of the rules: white space in them means nothing, and case only within (?-i: ).
_GAP = r"[ \t\n\xa0\u2000-\u200a\u3000]"
_STOP = r"(?: \. (?=[,;:、]) )?"  # "etc., ..." keeps its period
_L, _LD = (rf"(?: [a-zあ\u0302\xad{digit}] | &[aeiou](?:acute|grave|uml); )" for digit in ("", r"\d"))
_WORD = rf"{_L}{_LD}*+ (?: [.!?] {_L}{_LD}*+ )*+"  # cat, café, caf&eacute;, a1, road.many
_APO, _ANY_APO = r"(?: ['’\x92] | &apos; )", r"(?: ['’\x92`‘‛\x91] | &apos; )"
_CLITIC, _NOT = rf"{_APO}(?: [msd] | re | ve | ll )", rf"n{_ANY_APO}t"
_FRENCH = rf"(?: [dol]{_ANY_APO}[a-zあ\d] )?+ [a-zあ\d]++"  # d'Avignon
_TAG = r"""< (?: [!?][a-z-][^>\n]{0,999} | /[a-z][\w:.-]* | [a-z][\w:.-]*
    (?: [ ]+ [a-z][\w:.-]* (?: [ ]*=[ ]* (?: '[^'\n]{0,999}' | "[^"\n]{0,999}" ) )? )* [ ]*/? ) [ ]*>"""
_SITE = r"""(?: www\.(?:[^ \t\n\f\r"<>|.!?(){},]{1,63}\.){1,9}[a-z]{2,4}
    | (?:(?-i:[^ \t\n\f\r"`'<>|.!?(){},-_$]){1,63}\.){1,9}(?:com|net|org|edu) )
    (?: /[^ \t\n\f\r"<>|()]+[^ \t\n\f\r"<>|.!?(){},-] )?"""
_PHONE = r"""(?: \([0-9]{2,3}\)[ \xa0]? | \+{0,2}(?:[0-9]{2,4}[- \xa0])?[0-9]{2,4}[- \xa0] )
    [0-9]{3,4}[- \xa0]?[0-9]{3,5} | (?: \+{0,2}[0-9]{2,4}\. )?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}"""
_APO_WORDS = rf"""(?-i:[A-HJ-XZn]){_ANY_APO}[a-zあ]{{2,}} | [a-zあ]+[aeiouy]{_ANY_APO}(?-i:[aeiouA-Z])[a-zあ]*
    | e'er | o{_ANY_APO}o | cont'd\.? | nor'easter | c'mon | s'mores | ev'ry | li'l | nat'l | (?: dunkin | somethin | ol | [ldj] ){_APO}
    | {_APO}(?: n{_APO}? | em | till? | cause | [2-9]0s )"""
_FILE_TYPES = r"""bat|bmp|cgi|cpp|class|c|dll|docx|doc|exe|gif|gz|html|htm|h|jar|java|jpeg|jpg|mov|mp3|pdf|php|pl|png|
    ppt|ps|py|sql|tar|txt|wav|xml|x|zip"""
_ABBREVIATIONS = r"""jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu|thurs|fri|ala|ariz|calif|colo|conn|
    ct|dak|fla|ga|ind|kans?|ky|md|mich|minn|mo|mont|neb|nev|okla|penn|tenn|va|vt|wisc?|wyo|inc|cos?|corp|pp?t[ye]s?|
    ltd|plc|rt|bancorp|bhd|assn|univ|intl|sys|tel|est|ext|sq|jr|sr|bros|ed\.d|ph\.d|blvd|rd|esq|etc|al|seq|bldg|
    (?-i:(?=[A-Z])) (?:az|ark|del|ill|la|mass|miss|ore|pa|tex|wash)"""
_TITLES = r"""mrs?|ms|(?-i:M)iss|drs?|profs?|sens?|reps?|attys?|lt|col|gen|messrs|govs?|adm|rev|maj|sgt|cpl|pvt|capt|ste?|
    ave|pres|lieut|hon|brig|co?mdr|pfc|spc|supts?|det|mt|ft|adj|adv|asst|assoc|ens|insp|mlle|mme|msgr|sfc|invt|elec|
    natl|m(?-i:[ft])g|dept|vs|alex|wm|jos|cie|a\.k\.a|cf|treas|ph|(?:canada|sino|korean|eu|japan|non)-u\.s"""
_STARTERS = r"""(?-i:(?=[A-Z])) (?: about|according|additionally|after|an?|as|at|but|earlier|he|here?|her|however|if|in|
    it|last|many|more|mr\.|ms\.|now|once|one|other|our|she|since|so|some|such|that|the|their|then|there|these|they|
    this|we|when|while|what|yet|you )"""

_SOFT = {"\xad": ""}
_ROUND = {"(": "-lrb-", ")": "-rrb-"}  # the evaluators drop -LRB- in upper case only, so it counts as a word
_CURLY = {"&apos;": "'", "’": "'", "\x92": "'", "›": "'"} | dict.fromkeys("‘‛‹\x91", "`")
_CURLY |= dict.fromkeys("“«\x93", "``") | dict.fromkeys("”»\x94", "''")

# Rules: "token // what must follow it", which counts for the length, and how the token is spelt.
_RULES: list[tuple[str, dict[str, str] | None]] = [
    (r"c\+\+ | [cf]\#", {}),
    (r"(?: can(?=not) | (?:gon|wan)(?=na) | got(?=ta) | (?:gim|lem)(?=me) | 't(?=is|was) ) // not|na|ta|me|is|was", {}),
    (_TAG, {}),
    (r"""[.,;:?!"'] | [`‘‛‹\x91]{1,2} | [’›\x92]{1,2} | '' | [“«”»\x93\x94] | -{1,4} | [–—―\x96\x97] | &(?:md|mdash|ndash);
        | (?-i: &(?:apos|quot); ) | &nbsp; | \.{3,5} | (?:\.[ \xa0]){2,4}\. | […\x85]""", None),
    (r"&(?:amp|lt|gt);", {"&amp;": "&", "&lt;": "<", "&gt;": ">"}),
    (r"&(?:ht|tl|ur|lr|qc|ql|qr|odq|cdq|apos|quot|\#[0-9]+);", {}),
    (rf"{_WORD} // {_CLITIC}", _SOFT),  # it 's
    (rf"[a-z\xad]*[a-mo-z]\xad* // {_NOT}", _SOFT),  # do n't
    (_WORD + _STOP, _SOFT),
    (_APO_WORDS, {}),
    (rf"y{_APO} // [a-zあ]", {}),  # y' all
    (r"""https?://[^ \t\n\f\r"<>|(){}]+[^ \t\n\f\r"<>|.!?(){},-]""", {}),
    (_SITE, {}),
    (r"""(?:&lt;|<)? [a-z0-9][^ \t\n\f\r"<>|()\xa0{}]{0,254}@[^ \t\n\f\r"<>|(){}.\xa0]++
        (?:\.[^ \t\n\f\r"<>|(){}.\xa0]++)*+ (?:&gt;|>)?""", {}),  # a.b@mail.com
    (rf"@[a-z_][a-z_0-9]* | \#{_L}+", {}),  # @nyc_1 #été
    (rf"{_CLITIC} // [^a-z]", _CURLY),
    (rf"{_NOT} // [^a-z]", _CURLY),
    (r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}", {}),
    (r"[-+]?(?: \d*+(?:[.:,\xad٫٬]\d++)++ | \d++ )", _SOFT),
    (r"[⁺⁻₊₋]?(?:[⁰¹²³⁴-⁹]+|[₀-₉]+)", {}),
    (r"(?:\d{1,4}[- \xa0])?\d{1,4}(?:\\?/|⁄)\d{1,4}", {}),  # 1 1/2
    (r"[¼½¾⅓-⅞]", {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}),
    (rf"-[lr][rcs]b- | c\.d\.s | pro- | anti- | s(?:&|&amp;)(?:p-500|ls) | cap{_APO}n | c{_APO}est", {"&amp;": "&"}),
    (r"[a-z0-9]+(?:-[a-z]+){0,2}(?:\\?/[a-z0-9]+(?:-[a-z]+){0,2}){1,2}", {}),  # and/or
    (r"(?-i:[A-Z]*)\$ | [¢£¤¥\x80₠€؋฿₤￠￡￥￦]", {"¢": "cents", "£": "#"} | dict.fromkeys("\x80¤₠€", "$")),
    (rf"[a-z] // \.{_GAP}+(?:{_STARTERS}|{_TAG}){_GAP}", {}),  # plan B. The
    (rf"(?:ca|figs?|prop|nos?|art|bldg|pp|op)\. // {_GAP}?\d", {}),  # no. 5
    (rf"(?:{_ABBREVIATIONS})\. // (?:.|\n){{2}}|", {}),
    (rf"(?:{_TITLES}|[a-z](?:\.[a-z])*)\.", {}),  # Dr. U.S.
    (rf"{_APO}[0-9][0-9] // {_GAP}", {}),  # '92
    (rf"{_LD}{{1,99}}(?:\.{_LD}{{1,99}}){{0,9}}\.(?:{_FILE_TYPES}) // {_GAP}|[.?!,]", {}),
    (_PHONE, _ROUND),
    (r"(?-i: [<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]] ) // [^a-z0-9]", _ROUND),  # :-)
    (r"(?-i: [-^x=~<>']_[-^x=~<>'] | \([-^x=~<>'][_.]?[-^x=~<>']\) | \([\^x=~<>']-[\^x=~<>'`]\) )", _ROUND),
    (r"[()\[\]{}]", _ROUND | {"[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}),
    (rf"[a-z0-9][a-z0-9.,\xad]{{0,199}}+(?:-(?:[a-z](?:\.[a-z])+\.|[a-z0-9\xad]+))+{_STOP}", _SOFT),  # 3.5-inch
    (rf"{_FRENCH}(?:[-_֊‐‑]{_FRENCH})*+{_STOP}", {}),  # 10-year-old
    (rf"(?-i:[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+){_STOP}", {"&amp;": "&"}),  # R&B
    (r"' // [a-z][^ \t\n\r\xa0]", None),
    (rf"{_CLITIC}|{_NOT}", _CURLY),
    (r"[`‘’‚‛“”„‟\x91-\x94‹›«»]{1,2}", _CURLY),
    (r"@+ | \#+ | _+ | \*+ | (?:\\\*){1,3} | [?!]+ | -+ | << | >> | [+%&~^|\\¦°=/<>] | [、¡]", {}),
]
_LEXER = re.compile(
    "[ \t]*" + "".join(
        "(?=(({}){})|)".format(token, f"(?:{context})" if slash else "")
        for token, slash, context in (rule.partition(" // ") for rule, _ in _RULES)
    ),
    re.IGNORECASE | re.VERBOSE,
)


def ptb_tokenize(captions: list[str]) -> list[list[str]]:
    """Each caption's tokens as CIDEr counts them: lower-cased, clitics apart, without punctuation.

    As in the evaluator they are one text: the next caption's first word decides whether "plan B." keeps its period.
    """
    text = "".join(re.sub(r"[\n\r\v\f\x85\u2028\u2029]", " ", caption) + "\n" for caption in captions)
    shapes, place = "".join(map(_shape, text)), 0
    lines: list[list[str]] = [[]]
    while place < len(text):
        spans = _LEXER.match(shapes, place).regs  # type: ignore[union-attr]
        longest = max(spans[1::2])
        if longest[1] < 0:  # no rule: a line's end, a space, or a character that the lexer drops
            if text[spans[0][1] : spans[0][1] + 1] == "\n":
                lines.append([])
            place = spans[0][1] + 1
            continue
        rule = spans[1::2].index(longest)
        start, place = spans[2 + 2 * rule]
        spelling = _RULES[rule][1]
        if spelling is not None:
            token = text[start:place].lower()
            for old, new in spelling.items():
                token = token.replace(old, new)
            lines[-1].extend(token.split())
    return lines[:-1]
