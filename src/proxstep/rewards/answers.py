r"""The answer in a completion: its last box, or its final number, read as data and never evaluated.

Which places are looked at, and what is one number there, is the table in docs/tasks.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from proxstep.rewards.number_grammar import Run, find_runs
from proxstep.rewards.number_spellings import normalize
from proxstep.rewards.number_tokens import Token, tokenize

# A completion is hostile input: only its end is read, and every pattern takes linear time.
MAX_CHARACTERS = 20_000

_MARKER = re.compile("####+")
_PHRASE = re.compile(r"answer[*_ ]{0,4}(?:is\b|:|=)", re.IGNORECASE)
_NOT = re.compile(r"[*_ ]{0,4}(?:not|never)\b", re.IGNORECASE)
_TAKEN_BACK = re.compile(r"\b(?:wait|actually|correction|oops|sorry|mistake)\b", re.IGNORECASE)
# Right after an answer: "5? No, it is 7", "5 is wrong", "9 wait, no: 7".
_REJECTED = re.compile(
    r"[\s$*.,:;!?)\]}\\-]{0,6}(?:wait[\s,.:-]{1,3})?no(?:[,.:;!]|\s*\Z)", re.IGNORECASE
)
_IS_WRONG = re.compile(
    r"[\s$*.,]{0,6}(?:it |that |this |which )?(?:is|was) "
    r"(?:wrong|incorrect|false|not (?:the|my|right|correct|it)\b)",
    re.IGNORECASE,
)
MAX_NAME_WORDS = 4
_MAY_HOLD_A_NUMBER = re.compile(r"[0-9]|[^\x00-\x7f]")

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is a character, not a group
_MINUS_BEFORE_BOX = re.compile(r"(?:(?:[=$(]|\A|\s)-|[=$(] ?- |\b(?:minus|negative) )[$({]{0,3}\Z")
_SCALE_AFTER_BOX = re.compile(r"\}?[$)]? ?(?:hundred|thousand|million|billion|trillion)s?\b")


def boxed_answer(text: str) -> str | None:
    r"""Return what the last `\boxed{...}` or `\fbox{...}` holds, in time linear in the text.

    Without braces, as some of MATH's solutions have it, the box holds what follows up to the end
    of the formula or of the line. A minus sign right before the box belongs to it. Empty boxes do
    not count.

    Args:
        text: Any text at all.

    Returns:
        The content without outer white space. None where there is no box, or where the last one
        stays open, as in a completion that was cut off.

    >>> boxed_answer(r"First \boxed{1}, so it is \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> boxed_answer(r"so $\boxed 7$ of them, or $-\boxed{7}$")
    '-7'
    >>> boxed_answer(r"so \boxed{\frac{1}{2}") is None
    True
    """
    boxes = _boxes(text)
    return boxes[0][0] if boxes else None


def boxed_list(text: str) -> str | None:
    r"""Return what the last boxes hold, with commas, where only "and", "or" or a comma parts them.

    >>> boxed_list(r"$x=\boxed{1}$: no. $x = \boxed{2}$ or $x = \boxed{3}$.")
    '2, 3'
    """
    boxes = _boxes(text, several=True)
    return ", ".join(content for content, _, _ in reversed(boxes)) or None


def is_taken_back(text: str) -> bool:
    r"""Whether a text rejects its last box: "\boxed{9} Wait, no: 7".

    >>> is_taken_back(r"$\boxed{9}$ Wait, no: 7"), is_taken_back(r"\boxed{9} No more.")
    (True, False)
    """
    boxes = _boxes(text)
    return bool(boxes) and _REJECTED.match(text, boxes[0][2]) is not None


_BETWEEN_BOXES = re.compile(
    r"[\s$\\,;.]{0,6}(?:and|or|,|;|\\text\{ ?(?:and|or) ?\})?[\s$\\,;]{0,6}"
    r"(?:[A-Za-z]{1,2}(?:_[0-9])? ?= ?)?"
)


def _boxes(text: str, *, several: bool = False) -> list[tuple[str, int, int]]:
    """Return the last box that is not empty, or also those it is in one list with, last first."""
    found: list[tuple[str, int, int]] = []
    for start in reversed(list(_BOX.finditer(text))):
        box = _content(text, start.end())
        if box is None:
            break
        content, end = box
        if found and (end > found[-1][1] or not _BETWEEN_BOXES.fullmatch(text[end : found[-1][1]])):
            break
        if content:
            found.append((_signed(text, start.start(), content), start.start(), end))
        if found and not several:
            break
    return found


def _content(text: str, start: int) -> tuple[str, int] | None:
    """Return what a box holds and where it ends; None where it stays open."""
    if not text.startswith("{", start):
        content = re.split(r"[$\n]", text[start:], maxsplit=1)[0]
        return content.strip(), start + len(content)
    depth = 0
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start + 1 : brace.start()].strip(), brace.end()
    return None


def _signed(text: str, start: int, content: str) -> str:
    """Return a box's content with the minus sign that stands before the box."""
    if not _MINUS_BEFORE_BOX.search(normalize(text[max(0, start - 20) : start])):
        return content
    return f"-{content}" if re.fullmatch(r"[0-9.,]+|\\[dt]?frac.*", content) else f"-({content})"


def final_number(text: str, *, truncated: bool = False) -> Fraction | None:
    r"""Return the final numeric answer of a completion, exactly.

    The first of these places that holds a number decides, and where what it holds is not one number
    (an expression, a range, a list), the completion has no answer:

    1. after the last `####` (the convention of GSM8K) before whose number no letter stands;
    2. in the last `\boxed{...}` that is not empty;
    3. after the last "answer is" or "answer:", in upper or lower case;
    4. the last number of the text, unless it was cut off.

    Args:
        text: A completion; any text at all. Only its last `MAX_CHARACTERS` characters are read.
        truncated: Whether the completion was cut off at the length limit. A number then counts only
            in a closed box, or after 1 or 3 where something after it shows that it had ended.

    Returns:
        The number. None where there is none, or where it has more than 100 digits or 3 in an
        exponent.

    >>> final_number("5 apples at $3.50 cost $17.50. #### 17.50")
    Fraction(35, 2)
    >>> final_number(r"so x = \boxed{\frac{1}{2}} of the 10 apples")
    Fraction(1, 2)
    >>> final_number("The **answer is**: 540 * 2 = $1,080 after 2 years.")
    Fraction(1080, 1)
    >>> final_number("20 - 11") is None, final_number("#### 15", truncated=True) is None
    (True, True)
    """
    text = _end(text)
    run = (
        _after_marker(text, truncated)
        or _in_box(text)
        or _after_phrase(text, truncated)
        or (None if truncated else _last_run(text))
    )
    return run.value if run else None


def reference_number(reference: Any) -> Fraction | None:
    r"""Return the number that a reference answer is; None where it is not one number.

    Args:
        reference: A number, or a text: one number with its unit, alone or after "####" or
            "answer is", as in a whole GSM8K solution.

    >>> reference_number("2 1/2 cups"), reference_number(0.1), reference_number("9.\n#### 18")
    (Fraction(5, 2), Fraction(1, 10), Fraction(18, 1))
    >>> reference_number("[3, 4]") is None, reference_number("3:30") is None
    (True, True)
    """
    try:
        text = normalize(str(reference))
    except ValueError:  # an integer of thousands of digits
        return None
    if len(text) > MAX_CHARACTERS:
        return None
    for marker in (_MARKER, _PHRASE):
        *_, text = marker.split(text)
    tokens = tokenize(text.strip())
    runs = list(find_runs(tokens, alone=True))
    if len(runs) != 1:
        return None
    [run] = runs
    before, after = tokens[: run.start], tokens[run.end :]
    if after and after[-1].text == ".":
        after.pop()
    is_name = (
        run.is_equation and len(before) < MAX_NAME_WORDS and all(t.kind == "word" for t in before)
    )
    is_unit = all(token.kind in ("word", "/") for token in after)
    return run.value if is_unit and (is_name or not before) else None


def _end(text: str) -> str:
    """Return the normalized end of a text, without what the cut may have left of a number."""
    if len(text) > MAX_CHARACTERS:
        text = re.sub(r"\A[^A-Za-z\n]*", "", text[-MAX_CHARACTERS:])
    return normalize(text)


def _after_marker(text: str, truncated: bool) -> Run | None:
    """Return the number after the last marker that has one before any letter."""
    for piece, is_last in _pieces(text, _MARKER):
        tokens = tokenize(piece)
        run = next(find_runs(tokens, alone=True), None)
        if run is None or not _is_first(run, tokens):
            continue
        if not (truncated and is_last) or _has_ended(run, tokens, piece):
            return _kept(run, tokens, piece)
    return None


def _after_phrase(text: str, truncated: bool) -> Run | None:
    """Return the number after the last "answer is" that has one."""
    for piece, is_last in _pieces(text, _PHRASE):
        tokens = tokenize(piece)
        run = next(find_runs(tokens, alone=True), None)
        if run is None or (truncated and is_last and not _has_ended(run, tokens, piece)):
            continue
        return run._replace(value=None) if _NOT.match(piece) else _kept(run, tokens, piece)
    return None


def _is_first(run: Run, tokens: list[Token]) -> bool:
    """Whether nothing but a name stands before a number: "Total = 5"."""
    words = [token for token in tokens[: run.start] if token.kind in ("word", "join", "break")]
    names = all(token.kind == "word" for token in words) and len(words) < MAX_NAME_WORDS
    return not any(token.kind != "break" for token in words) or (
        names and tokens[run.start].kind == "="
    )


def _kept(run: Run, tokens: list[Token], piece: str) -> Run:
    """Return the run, without its value where the text takes it back: "5. Wait, no: 7"."""
    if not run.end:
        return run
    end = tokens[run.end - 1].end
    taken_back = (
        _TAKEN_BACK.search(piece, end) or _REJECTED.match(piece, end) or _IS_WRONG.match(piece, end)
    )
    return run._replace(value=None) if taken_back else run


def _pieces(text: str, marker: re.Pattern[str]) -> Iterator[tuple[str, bool]]:
    """Yield what follows each marker up to the next one, last first, and whether it is the last."""
    end = len(text)
    for match in reversed(list(marker.finditer(text))):
        yield text[match.end() : end], end == len(text)
        end = match.start()


def _has_ended(run: Run, tokens: list[Token], text: str) -> bool:
    """Whether no continuation of a text can change its number: "15 of", but not "15" or "15 m"."""
    if run.end >= len(tokens):
        return False
    following = tokens[run.end]
    return following.text == "\n" or following.end < len(text)


def _in_box(text: str) -> Run | None:
    """Return the number in the last box, no number where it holds something else."""
    boxes = _boxes(text)
    if not boxes:
        return None
    content, _, end = boxes[0]
    if is_taken_back(text):
        return Run(None, 0, 0, is_equation=False, is_listed=False)
    if scale := _SCALE_AFTER_BOX.match(text, end):
        content += scale[0]
    tokens = tokenize(content)
    run = next(find_runs(tokens, alone=True), None)
    if run is None or any(token.text == "!" for token in tokens) or _others(tokens, run):
        return Run(None, 0, 0, is_equation=False, is_listed=False)
    return run


def _others(tokens: list[Token], run: Run) -> bool:
    r"""Whether another line of a box holds a number: "5 \\ 7"."""
    rest = tokens[run.end :]
    return bool(rest) and rest[0].kind == "break" and any(token.value is not None for token in rest)


def _last_run(text: str) -> Run | None:
    """Return the last number of the last line that has one."""
    lines = text.split("\n")
    for index in range(len(lines) - 1, -1, -1):
        if not _MAY_HOLD_A_NUMBER.search(lines[index]):
            continue
        before = lines[index - 1].rstrip() if index else ""
        ends_with_minus = before.endswith("-") and not before.endswith("--")
        line = f"-\n{lines[index]}" if ends_with_minus else lines[index]
        runs = list(find_runs(tokenize(line, starts_line=index > 0), alone=False))
        if runs:
            return runs[-1]
    return None
