"""Penn Treebank tokens of captions without Java: what CIDEr counts.

COCO's evaluators pipe captions through Stanford CoreNLP 3.4.1 (-preserveLines -lowerCase) and then drop punctuation.
One regular expression gives the same tokens, exactly on captions, approximately on prose:

    A man can't ride his friend's bike; it's 3.5 miles!  ->  a man ca n't ride his friend 's bike it 's 3.5 miles
"""

import re

# The evaluators drop -LRB- and its kin in upper case only, so in lower case they count as words.
_RENAMED = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "£": "#", "€": "$", "¢": "cents",
}  # fmt: skip
_CHARACTERS = str.maketrans(
    {"’": "'", "‘": "`", "“": '"', "”": '"', "«": '"', "»": '"', "—": "--", "–": "--", "…": "..."}
    | {"½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 "}
)
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&nbsp;": " "}
_ENTITY = re.compile("|".join(_ENTITIES), re.IGNORECASE)
_DROPPED = re.compile(r"""['`"]+|[.?!,:;]|-+|\.(?: ?\.)+""")
_RENAMABLE = re.compile("|".join(map(re.escape, _RENAMED)))

# Parts of _TOKEN: white space in them means nothing.
_ABBREVIATIONS = r"""
    st|ave|rd|blvd|dr|mr|mrs|ms|jr|sr|inc|co|corp|ltd|bros|sq|ct|mt|ft|al|vs|v|etc|jan|feb|mar|apr|jun|jul|aug|sep|
    sept|oct|nov|dec|mon|tue|tues|wed|thu|thurs|fri|penn|calif|ind|fla|okla|wis|colo|conn|ga|ky|md|mich|minn|mo|mont|
    neb|nev|tenn|va|vt|wyo|ariz|ala|kan|kans|dak|univ|dept|assn|assoc|est|bldg|gen|gov|sen|rep|col|lt|sgt|maj|capt|
    cpl|pvt|adm|brig|cmdr|prof|rev|hon|pres|treas|supt|insp|mlle|mme|messrs|drs|esq|tel|asst|ext|intl|natl|rte|ph\.d
"""
_STARTERS = r"""
    A|The|In|An|At|There|It|That|Some|Other|While|As|Their|One|Her|This|He|They|Many|She|About|Such|These|More|After|
    But|What|If|Here|You|We|So|Yet|When|Now|Since|However|According|Our|Then|Additionally
"""

_LETTER, _ALNUM = r"[^\W\d_]", r"[^\W_]"
_TOKEN = re.compile(
    rf"""
      \n
    | </?[a-z][^<>\n]*>
    | https?://[^\s,;"]*\w | [\w.+-]+@\w+(?:\.\w+)*
    | [:;=]-?[()DP](?!\w)  # :)
    | [#@][a-z_]+  # #tag, @home
    | can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b) | (?:gim|lem)(?=me\b) | 't(?=(?:is|was)\b) | more(?='n\b)
    | (?: o'clock | ma'am | c'mon | d'ye | ol' | dunkin' | [odl]'{_LETTER}{{2,}} )(?!{_ALNUM}) | y'(?=all\b) | 'n'
    | '(?: \d\ds? | em | till? | cause | n | s | m | d | re | ve | ll )(?!{_ALNUM}) | n't(?!{_ALNUM})
    | (?: {_ABBREVIATIONS} | (?-i:La) )\.(?!{_ALNUM}) | no\.(?=[ ]*\d)
    | {_LETTER}(?:\.{_LETTER})+(?!{_ALNUM})\.?  # U.S., p.m., but D.V.D
    | {_LETTER}\.(?!{_LETTER}|\s+(?-i:{_STARTERS})\b)  # plan B.
    | [+-]?\d*(?:[,.:]\d+)+ | (?<!{_ALNUM})[+-]\d+  # 1,000, 10:35, -5
    | (?-i:[A-Z]+&[A-Z]+)  # R&B
    | (?: (?!n't\b){_LETTER} )+ (?: [.!] (?: (?!n't\b){_LETTER} )+ )+  # road.many, photo.jpg
    | (?: (?!n't\b){_ALNUM} )+ (?: [-_/] (?: (?!n't\b){_ALNUM} )+ )*  # and/or, 10-year-old
    | \.(?:[ ]?\.)+ | [?!]+ | -+ | [*]+ | _+ | @+
    | \S
    """,
    re.IGNORECASE | re.VERBOSE,
)


def ptb_tokenize(captions: list[str]) -> list[list[str]]:
    """Each caption's tokens as CIDEr counts them: lower-cased, clitics apart, without punctuation.

    As in the evaluator they are one text: the next caption's first word decides whether "plan B." keeps its period.
    """
    text = "\n".join(" ".join(caption.split()) for caption in captions)  # one line per caption
    text = _ENTITY.sub(lambda found: _ENTITIES[found[0].lower()], text.translate(_CHARACTERS))
    lines: list[list[str]] = [[]]
    for token in _TOKEN.findall(text):
        if token == "\n":
            lines.append([])
        elif not _DROPPED.fullmatch(token):
            lines[-1].append(_RENAMABLE.sub(lambda found: _RENAMED[found[0]], token.lower()))
    return lines if captions else []
