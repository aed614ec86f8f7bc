"""Penn Treebank tokens of captions without Java: what CIDEr counts.

COCO's evaluators pipe captions through Stanford CoreNLP 3.4.1 (-preserveLines -lowerCase) and then drop punctuation.
Its lexer tries every rule at every place and takes the longest match, the first of equals. So does this table:

    A man can't ride his friend's bike; it's 3.5 miles!  ->  a man ca n't ride his friend 's bike it 's 3.5 miles
"""

import re
import unicodedata

_MARKS = re.compile("[\u02c2-\u07f5\u0900-\u0a4d\u0a81-\u0acd\u0b82-\u0bcd\u0c01-\u0c56\u0d3e-\u0d48\u0e30-\u0ecd]")
_SYMBOLS = re.compile("[¡¦-©¬®-±´¶-¸¿×÷\u037e\u0387։־׃׳״؀-؃،؛؞؟٪٭۔।॥‖‗†-‣‰-‸※‾-⁂⁼-⁾₌-₎℀-⅏←-⯿。〒・！-／：-＠［-｀｛-･]")


def _shape(char: str) -> str:
    """What the rules read: あ for a letter beyond ASCII, ˆ for a mark, ٠ for a digit, ° for a symbol, else itself."""
    if not "\x80" <= char <= "\uffff":
        return char if char < "\x80" else "\ufffd"
    kind = unicodedata.category(char)
    if kind in ("Mn", "Mc", "Sk"):
        return "ˆ" if _MARKS.match(char) else "°" if _SYMBOLS.match(char) else char
    return "あ" if kind[0] == "L" else "٠" if kind == "Nd" else "°" if _SYMBOLS.match(char) else char


# Parts of the rules. White space in them means nothing, and case only within (?-i: ).
# Bounds such as {0,999} keep the time linear in hostile lines.
_GAP, _STOP = r"[ \t\n\xa0\u2000-\u200a\u3000]", r"(?: \. (?=[,;:、]) )?"  # "etc., and" keeps its period
_L, _LD = (rf"(?: [a-zあˆ\xad{digit}] | &[aeiou](?:acute|grave|uml); )" for digit in ("", r"\d"))
_WORD = rf"{_L}{_LD}*+ (?: [.!?] {_L}{_LD}*+ )*+"
_APO, _ANY_APO = r"(?: ['’\x92] | &apos; )", r"(?: ['’\x92`‘‛\x91] | &apos; )"
_CLITIC, _NOT = rf"{_APO}(?: [msd] | re | ve | ll )", rf"n{_ANY_APO}t"
_FRENCH = rf"(?: [dol]{_ANY_APO}[a-zあ\d] )? [a-zあ\d]++"
_TAG = r"""< (?: [!?][a-z-][^>\n]{0,999} | /[a-z][a-z0-9_:.-]* | [a-z][a-z0-9_:.-]*
    (?: [ ]+ [a-z][a-z0-9_:.-]* (?: [ ]*=[ ]* (?: '[^'\n]{0,999}' | "[^"\n]{0,999}" ) )? )* [ ]*/? ) [ ]*>"""
_WWW = r"""www\.(?: [^ \t\n\f\r"<>|.!?(){},]{1,63}\. ){1,9}[a-z]{2,4}"""
_COM = r"""(?: (?-i:[^ \t\n\f\r"`'<>|.!?(){},-_$]){1,63}\. ){1,9}(?:com|net|org|edu)"""
_PATH = r"""/[^ \t\n\f\r"<>|()]+[^ \t\n\f\r"<>|.!?(){},-]"""

# Name: token, or token // what must follow it; this counts for the length but stays for the next token.
_RULES = {
    "mark": r"""'' | \.{3,5} | (?:\.[ \xa0]){2,4}\. | […\x85] | -{1,4} | [–—―\x96\x97] | [`‘‛‹\x91]{1,2} | [’›\x92]{1,2}
        | [“«”»\x93\x94] | [.,;:?!"'] | &(?:md|mdash|ndash|nbsp); | (?-i: &(?:apos|quot); )""",  # dropped
    "halves": r"(?: can(?=not)|(?:gon|wan)(?=na)|got(?=ta)|(?:gim|lem)(?=me)|'t(?=is|was) ) // not|na|ta|me|is|was",
    "tag": _TAG,  # <br />
    "entity": r"&(?:amp|lt|gt|ht|tl|ur|lr|qc|ql|qr|odq|cdq|apos|quot|\#[0-9]+);",  # &amp; &#39;
    "host": rf"(?: {_WORD}(?={_CLITIC}) | [a-z\xad]*[a-mo-z]\xad*(?={_NOT}) ) // {_CLITIC}|{_NOT}",  # it 's, do n't
    "word": _WORD + _STOP,  # cat, café, a1, caf&eacute;, road.many
    "apostrophe": rf"""(?-i:[A-HJ-XZn]){_ANY_APO}[a-zあ]{{2,}} | [a-zあ]+[aeiouy]{_ANY_APO}(?-i:[aeiouA-Z])[a-zあ]*
        | (?: dunkin | somethin | ol | [ldj] ){_APO} | y{_APO}(?=[a-zあ]) | c{_APO}est | cap{_APO}n | o{_ANY_APO}o
        | e'er | s'mores | ev'ry | li'l | nat'l | nor'easter | cont'd\.? | {_APO}(?: em | till? | cause | n{_APO}? )
        | {_APO}(?: [2-9]0s | [0-9]{{2}}(?={_GAP}) ) | c'mon""",  # O'Brien, 'n', '92
    "site": rf"""https?://[^ \t\n\f\r"<>|(){{}}]+[^ \t\n\f\r"<>|.!?(){{}},-] | {_WWW}{_PATH} | {_WWW}
        | {_COM}(?:{_PATH})?""",
    "mail": r"""(?:&lt;|<)? [a-z0-9][^ \t\n\f\r"<>|()\xa0{}]{0,254}@[^ \t\n\f\r"<>|(){}.\xa0]++
        (?: \.[^ \t\n\f\r"<>|(){}.\xa0]++ )*+ (?:&gt;|>)?""",
    "handle": rf"@[a-z_][a-z_0-9]* | \#{_L}+",  # @home, #tag
    "clitic": rf"(?: {_CLITIC}|{_NOT} ) // [^a-z]",  # 's, n't
    "number": r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4} | [-+]?(?: \d*+(?:[.:,\xad٫٬]\d++)++ | \d++ )",  # 12/31/99 1,000 -.5
    "fraction": r"(?:\d{1,4}[- \xa0])?\d{1,4}(?:\\?/|⁄)\d{1,4} | [¼½¾⅓-⅞] | [⁺⁻₊₋]?(?:[⁰¹²³⁴-⁹]+|[₀-₉]+)",  # 1 1/2
    "special": r"-[lr][rcs]b- | pro- | anti- | s(?:&|&amp;)(?:p-500|ls) | c\+\+ | [cf]\#",
    "slashed": r"[a-z0-9]+(?:-[a-z]+){0,2}(?: \\?/[a-z0-9]+(?:-[a-z]+){0,2} ){1,2}",  # and/or
    "money": r"(?-i:[A-Z]*)\$ | [¢£¤¥\x80₠€؋฿₤￠￡￥￦]",  # US$
    "last letter": rf"""[a-z] // \.{_GAP}+(?: {_TAG} | (?-i:(?=[A-Z])) (?: about|according|additionally|after|an?|as|at|
        but|earlier|he|here?|her|however|if|in|it|last|many|more|mr\.|ms\.|now|once|one|other|our|she|since|so|some|such|
        that|the|their|then|there|these|they|this|we|when|while|what|yet|you ) ){_GAP}""",  # plan B. The
    "abbreviation": r"""(?: jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu|thurs|fri|ala|ariz|calif|rt|
        colo|conn|ct|dak|fla|ga|ind|kans?|ky|md|mich|minn|mo|mont|neb|nev|okla|penn|tenn|va|vt|wisc?|wyo|inc|cos?|corp|
        pp?t[ye]s?|ltd|plc|bancorp|bhd|assn|univ|intl|sys|tel|est|ext|sq|jr|sr|bros|(?:ed|ph)\.d|blvd|rd|esq|etc|al|seq|
        bldg | (?-i:(?=[A-Z])) (?:az|ark|del|ill|la|mass|miss|ore|pa|tex|wash) )\. // (?:.|\n){2}|""",
    "title": rf"""(?: [a-z](?:\.[a-z])* | (?:canada|sino|korean|eu|japan|non)-u\.s | a\.k\.a|mrs?|ms|(?-i:M)iss|drs?|cf|
        profs?|sens?|reps?|attys?|lt|col|gen|messrs|govs?|adm|rev|maj|sgt|cpl|pvt|capt|ste?|ave|pres|lieut|hon|brig|pfc|
        co?mdr|spc|supts?|det|mt|ft|adj|adv|asst|assoc|ens|insp|mlle|mme|msgr|sfc|invt|elec|natl|m(?-i:[ft])g|dept|vs|
        alex|wm|jos|cie|treas|ph | (?:ca|figs?|prop|nos?|art|bldg|pp|op)(?=\.{_GAP}?\d) )\.""",  # U.S. Dr. no. 5
    "file": rf"""{_LD}{{1,99}}(?: \.{_LD}{{1,99}} ){{0,9}}\.(?:bat|bmp|cgi|cpp|class|c|dll|docx|doc|exe|gif|gz|html|htm|
        h|jar|java|jpeg|jpg|mov|mp3|pdf|php|pl|png|ppt|ps|py|sql|tar|txt|wav|xml|x|zip) // {_GAP}|[.?!,]""",
    "phone": r"""(?: \([0-9]{2,3}\)[ \xa0]? | \+{0,2}(?:[0-9]{2,4}[- \xa0])?[0-9]{2,4}[- \xa0] )
        [0-9]{3,4}[- \xa0]?[0-9]{3,5} | (?: \+{0,2}[0-9]{2,4}\. )?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}""",
    "smiley": r"""(?-i: [<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]] )(?![a-z0-9])
        | (?-i: [-^x=~<>']_[-^x=~<>'] | \([-^x=~<>'][_.]?[-^x=~<>']\) | \([\^x=~<>']-[\^x=~<>'`]\) )""",  # :-) ^_^
    "hyphened": rf"[a-z0-9][a-z0-9.,\xad]{{0,199}}+(?: -(?: [a-z](?:\.[a-z])+\. | [a-z0-9\xad]+ ) )+{_STOP}",  # 3-inch
    "letters and digits": rf"{_FRENCH}(?: [-_֊‐‑]{_FRENCH} )*+{_STOP}",  # 10-year-old, d'Or
    "capitals": rf"(?-i:[A-Z]+)(?: (?:&amp;|[+&])(?-i:[A-Z]+) )+{_STOP}",  # R&B
    "opening quote": r"' // [a-z][^ \t\n\r\xa0]",  # dropped
    "clitic before letter": rf"{_CLITIC}|{_NOT}",
    "quotes": r"[`‘’‚‛“”„‟\x91-\x94‹›«»]{1,2}",
    "symbol": r"@+ | \#+ | _+ | \*+ | (?:\\\*){1,3} | [?!]+ | -+ | << | >> | [()\[\]{}+%&~^|\\°⁄⁺⁻₊₋=/<>、]",
    "rest": r"(?:.|\n)",  # dropped
}
_AS_WRITTEN = {"tag", "handle", "apostrophe", "site", "mail", "file", "letters and digits"}
_SPELLING = {  # the evaluators drop -LRB- and its kin in upper case only, so in lower case they count as words
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "\xad": "", "&amp;": "&",
    "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "&lt;": "<", "&gt;": ">", "&apos;": "'", "¢": "cents",
    "£": "#", "\x80": "$", "¤": "$", "₠": "$", "€": "$", "‘": "`", "‛": "`", "‹": "`", "\x91": "`", "’": "'", "›": "'",
    "\x92": "'", "“": "``", "«": "``", "\x93": "``", "”": "''", "»": "''", "\x94": "''",
}  # fmt: skip
_SPELT = re.compile(r"^[\[\]{}]$|[\xad()½¼¾⅓⅔¢£\x80¤₠€‘‛‹\x91’›\x92“«\x93”»\x94]|&(?:amp|lt|gt|apos);")
_PAIRS = ((token, context) for token, _, context in (rule.partition(" // ") for rule in _RULES.values()))
_LEXER = re.compile(r"\ *" + "".join(f"(?=(({token})(?:{context}))|)" for token, context in _PAIRS), re.I | re.X)


def ptb_tokenize(captions: list[str]) -> list[list[str]]:
    """Each caption's tokens as CIDEr counts them: lower-cased, clitics apart, without punctuation.

    As in the evaluator they are one text: the next caption's first word decides whether "plan B." keeps its period.
    """
    text = "".join(re.sub(r"[\n\r\v\f\x85\u2028\u2029]", " ", caption) + "\n" for caption in captions)
    shapes, names, place = "".join(map(_shape, text)), list(_RULES), 0
    lines: list[list[str]] = [[]]
    while place < len(text):
        spans = _LEXER.match(shapes, place).regs  # type: ignore[union-attr]
        rule = spans[1::2].index(max(spans[1::2]))  # spans: all, then each rule with and without what follows
        start, place = spans[2 + 2 * rule]
        if text[start] == "\n":
            lines.append([])
        elif names[rule] not in ("mark", "opening quote", "rest"):
            token = text[start:place].lower()
            spelt = token if names[rule] in _AS_WRITTEN else _SPELT.sub(lambda found: _SPELLING[found[0]], token)
            lines[-1].extend(spelt.split())
    return lines[:-1]
