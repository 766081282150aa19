# SPDX-License-Identifier: Apache-2.0
"""Count the lines of docstrings, comments, messages and docs that break the rules for prose, and print each.

Usage: python tools/check_prose.py [FILE...]. Without files: all that git knows. The exit code is 1 if there are any.

Rules (CONTRIBUTING.md, "Prose"):

- opener: a unit begins with a word that needs the line above it ("Of", "That", "Which", ...). A unit is a docstring's
  first line, a paragraph, a list item, the description of an argument, a comment, a heading, a table cell or a message.
- verb: the docstring of a function in src or tools begins with an imperative ("Return"); of a class, module, property
  or field with that or with a noun that names the thing. None begins with "Returns".
- word: one word for one thing, the field's: see `WORDS`.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

OPENERS = re.compile(r"(as of|of|that|which|what|likewise|has|those|by which)\b", re.IGNORECASE)
WORDS = {
    r"\banew\b": "again, from scratch",
    r"\bghosts?\b(?! batch)": "dummy",
    r"\b(?:go|goes|going|went|gone) on\b": "continue",
    r"\b(?:tell|tells|told|telling) of\b": "report",
    r"\bcomes? and goe?s?\b": "arrive and leave",
    r"\blikewise\b": "say it",
    r"\b(?:has|have) (?:it|them|(?:a|the|each|every) \w+) (?:do|make|run|write|print|wait|tell)\b": "makes X do",
}
# First words of functions' docstrings. A new one is added here, so that each is seen to be a verb.
VERBS = frozenset(
    """
    abandon accept add agree allocate allow answer append apply arrange ask assign await become begin bind block
    bring broadcast build call cancel catch change check choose clear clip close collect combine commit compare
    complete compress compute configure connect continue convert copy count create cut decide decode decorate delete
    deliver describe detach divide do draw drop encode end ensure enter estimate evaluate exchange exit expect
    explain extend fail fetch fill find finish fit flush follow forget format gather get give group handle hash hold
    hook ignore import include initialize inspect install interpret interrupt issue iterate join keep kill launch
    lay leave let list load lock log look make map mark match measure meet merge move multiply name note open order
    parse pass pick place plan post prepare print produce profile put quote raise read receive record recover reduce
    refuse register release remember remove rename repeat replace replay report require reserve reset resolve
    restart restore resume retry return revoke rewrite round run sample save say scale scatter search seed select
    send serve set share show shuffle shut sign skip sleep sort split spread stage start stop store submit
    substitute subtract sum surround swap switch synchronize take test time train translate try turn undo unpack
    update use validate verify view wait wake walk warn watch wrap write yield zero
    """.split()
)
SECTIONS = re.compile(r"(Args|Attributes|Raises|Returns|Yields|Example|Examples|Note|Usage|References):$")
MESSAGE_CALLS = {"warn", "warning", "error", "info", "debug", "exception", "print"}


class Unit(NamedTuple):
    """Text that a reader may see without the line above it."""

    line: int
    kind: str
    text: str


def units_of_text(text: str, line: int, kind: str) -> Iterator[Unit]:
    """Yield the paragraphs, list items and argument descriptions of a docstring or a page in Markdown."""
    starts, fenced = True, False
    for number, raw in enumerate(text.splitlines(), line):
        content = raw.strip()
        if content.startswith("```"):
            fenced = not fenced
        if fenced or not content or content.startswith("```") or SECTIONS.match(content):
            starts = True
            continue
        if content.startswith("|"):
            yield from (Unit(number, kind, cell.strip()) for cell in content.strip("|").split("|"))
            continue
        item = re.match(r"(?:[-*+]|\d+\.|#+|//|>) +(.*)", content)
        argument = (
            re.match(r"[*\w, .()\[\]`]{1,60}: +(.*)", content) if kind == "docstring" and raw.startswith(" ") else None
        )
        if found := item or argument:
            yield Unit(number, kind, found.group(1))
        elif starts:
            yield Unit(number, kind, content)
        starts = False


def docstrings(tree: ast.AST) -> Iterator[tuple[ast.AST, int, str]]:
    """Yield each docstring, as (owner, line, text). The owner of a string behind a field is the assignment."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        for before, statement in zip([node, *body], body, strict=False):
            match statement:
                case ast.Expr(value=ast.Constant(value=str(text), lineno=line)):
                    yield before, line, text


def units_of_python(source: str, is_strict: bool) -> Iterator[Unit]:
    """Yield what a Python file says to its readers and users; `is_strict`: functions begin with an imperative."""
    tree = ast.parse(source)
    for owner, line, text in docstrings(tree):
        kind = "docstring"
        if isinstance(owner, ast.FunctionDef | ast.AsyncFunctionDef):
            names = {getattr(node, "attr", getattr(node, "id", "")) for node in owner.decorator_list}
            is_value = any("property" in name or name == "fixture" for name in names)
            kind = "value" if is_value or not is_strict else "function"
            kind = "test" if owner.name.startswith("test_") else kind
        elif isinstance(owner, ast.Module | ast.ClassDef | ast.Assign | ast.AnnAssign):
            kind = "value"
        first, *rest = units_of_text(text, line, "docstring")
        yield first._replace(kind=kind)
        yield from rest
    for node in ast.walk(tree):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call) or not call.args:
            continue
        if isinstance(node, ast.Raise) or (isinstance(call.func, ast.Attribute) and call.func.attr in MESSAGE_CALLS):
            first_part = call.args[0].values[0] if isinstance(call.args[0], ast.JoinedStr) else call.args[0]
            if isinstance(first_part, ast.Constant) and isinstance(first_part.value, str):
                yield Unit(call.lineno, "message", first_part.value.strip())
    last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text, number = token.string.lstrip("#:! "), token.start[0]
            is_line = token.line.lstrip().startswith("#")
            if not (is_line and last == number - 1) or re.match(r"[-*] |\d+\. ", text):
                yield Unit(number, "comment", re.sub(r"^(?:[-*]|\d+\.) ", "", text))
            last = number if is_line else -1


def units_of_cpp(source: str) -> Iterator[Unit]:
    """Yield the comments of a C++ file."""
    last = -1
    for number, line in enumerate(source.splitlines(), 1):
        match = re.search(r'(?:^|[^:"])//+ ?(.*)', line)
        if match is None:
            continue
        is_line, text = line.lstrip().startswith("//"), match.group(1).strip()
        item = re.match(r"(?:[-*]|\d+\.) (.*)", text)
        if item or not (is_line and last == number - 1):
            yield Unit(number, "comment", item.group(1) if item else text)
        last = number if is_line and text else -1


def faults(unit: Unit) -> Iterator[str]:
    """Yield the rules that a unit breaks."""
    text = unit.text.lstrip("*_`\"' ")
    word = re.match(r"[A-Za-z]*", text).group().lower()  # type: ignore[union-attr]  # matches nothing as well
    if OPENERS.match(text) and not unit.text.startswith("`"):
        yield f'opener: "{word}"'
    if unit.kind == "function" and word not in VERBS:
        yield f'verb: "{word}" is no imperative (or add it to VERBS)'
    elif unit.kind == "value" and word in VERBS_OF_THIRD_PERSON:
        yield f'verb: "{word}": say it with an imperative or a noun'


NOUNS = frozenset(
    """
    calls copies counts groups lists loads locks logs maps marks matches messages names orders parts places plans
    records reports results samples scales seeds sets shares signs splits stages stores sums tests times uses views
    """.split()
)
VERBS_OF_THIRD_PERSON = {form for verb in VERBS for form in (verb + "s", verb + "es", verb[:-1] + "ies")} - NOUNS


def check(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (line, fault, text) for each fault of a file."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        units = list(units_of_python(source, path.parts[0] in ("src", "tools")))
    elif path.suffix in (".cpp", ".hpp"):
        units = list(units_of_cpp(source))
    else:
        units = list(units_of_text(source, 1, "markdown"))
    for unit in units:
        yield from ((unit.line, fault, unit.text) for fault in faults(unit))
    for number, line in enumerate(source.splitlines(), 1):
        for pattern, instead in WORDS.items():
            if match := re.search(pattern, line, re.IGNORECASE):
                yield number, f'word: "{match.group()}", say: {instead}', line.strip()


def main(arguments: list[str]) -> int:
    """Print the faults of the files, then how many there are of each kind; return 1 if there are any."""
    names = arguments or subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.split()
    paths = [Path(name) for name in names if name.endswith((".py", ".cpp", ".hpp", ".md"))]
    counts: Counter[str] = Counter()
    for path in paths:
        if path.name == Path(__file__).name:
            continue
        for line, fault, text in sorted(check(path)):
            counts[fault.partition(":")[0]] += 1
            print(f"{path}:{line}: {fault}: {text[:90]}")
    print(f"prose: {sum(counts.values())} faults in {len(paths)} files {dict(counts) or ''}")
    return 1 if counts else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
