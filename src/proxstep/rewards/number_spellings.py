"""What stands for what around a number: characters, LaTeX's commands, and words."""

from __future__ import annotations

# U+00AD to U+FF0D: hyphens, dashes and minus signs. Zero-width characters go, spaces become one.
NORMAL = str.maketrans(
    dict.fromkeys("\u00ad\u058a\u05be\u02d7\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u2796", "-")
    | dict.fromkeys("\u2e3a\u2e3b\u30fc\ufe58\ufe63\uff0d", "-")
    | dict.fromkeys("\u200b\u200c\u200d\u200e\u200f\u2060\u2061\u2062\u2063\u2064\ufeff", None)
    | dict.fromkeys("\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008", " ")
    | dict.fromkeys("\u2009\u200a\u202f\u205f\u3000\t\v\f", " ")
    | dict.fromkeys("\r\x85\u2028\u2029", "\n")
    | dict.fromkeys("\u2715\u2a2f\u22c5\u00b7\u2219\u2217", "\u00d7")
    | dict(
        zip(
            "\uff0c\u3001\uff1a\uff1b\uff08\uff09\uff0b\uff0f\uff1d\uff05",
            ",,:;()+/=%",
            strict=True,
        )
    )
    | {"\u3002": ". ", "\u2044": "/", "\u2215": "/", "\u2795": "+", "\u2019": "'", "\u02bc": "'"}
    | dict.fromkeys("\u8d1f\u8ca0", " minus ")
)
_COMMANDS = {
    "*": r"\times \cdot \ast",
    "=": r"\approx \equiv \simeq \cong",
    "operator": r"\div \pm \mp \le \leq \leqslant \ge \geq \geqslant \lt \gt \ne \neq \over \mod "
    r"\bmod \pmod \not \sim \choose \mid \in \cup \cap \to",
    "arrow": r"\rightarrow \Rightarrow \longrightarrow \Longrightarrow \implies \iff",
    "break": r"\therefore \because \item \hline \par \newline \square \blacksquare \checkmark "
    r"\bullet",
    "": r"\left \right \big \Big \bigl \bigr \Bigl \Bigr \bigg \Bigg \text \textbf \textit \textrm "
    r"\textsf \texttt \mathrm \mathbf \mathit \mathsf \mathtt \boldsymbol \bm \mbox \hbox \emph "
    r"\underline \boxed \fbox \bf \rm \it \displaystyle \textstyle \quad \qquad \hfill \phantom "
    r"\pounds \euro \texteuro \textdollar \yen \operatorname \circ \degree \percent \unit \large "
    r"\Large \huge \textsuperscript",
}
COMMAND_KINDS = {name: kind for kind, names in _COMMANDS.items() for name in names.split()}
SCALES = {
    "hundred": 2,
    "thousand": 3,
    "lakh": 5,
    "million": 6,
    "mln": 6,
    "crore": 7,
    "billion": 9,
    "bn": 9,
    "trillion": 12,
}
GLUED_SCALES = {"k": 3, "K": 3, "M": 6, "mn": 6, "B": 9, "b": 9} | SCALES
OPERATORS = ("plus", "times", "over", "mod", "modulo", "choose", "divided", "multiplied")
POSTFIXES = ("squared", "cubed", "factorial", "pi", "half", "halves", "thirds", "quarters")
FUNCTIONS = frozenset(
    [
        *("sqrt", "root", "log", "ln", "lg", "exp", "sin", "cos", "tan", "cot", "sec", "csc"),
        *("arcsin", "arccos", "arctan", "gcd", "lcm", "floor", "ceil", "factorial", "abs"),
    ]
)
WORD_KINDS = (
    dict.fromkeys(("minus", "negative"), "negative")
    | dict.fromkeys(("and", "or", "to", "through", "versus", "vs", "until"), "join")
    | {"percent": "%", "per_cent": "%"}
)


def normalize(text: str) -> str:
    """Return a text with one spelling for each minus sign, space and multiplication sign."""
    return text.translate(NORMAL)
