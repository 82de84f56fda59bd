"""Every sentence with which a program ends has its row in docs/troubleshooting.md.

A sentence that is put together from variables alone (`raise ValueError(message)`) is not seen here.
"""

import ast
import re

import pytest
from conftest import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
SOURCES = [*sorted((ROOT / "neoflix").glob("*.py")), ROOT / "train.py", ROOT / "generate.py", ROOT / "launch.sh"]
ENDS = {"ValueError", "StoppedEarly", "DeadProcessError"}  # and a module's classes that derive from one of them
FILLED_IN = None
NEVER_SEEN = {"no texts"}  # raised for a caller of ours, which catches it


def plain(text: str) -> str:
    """Without Markdown's marks and line breaks."""
    return " ".join(re.sub(r"[`\\]", "", text).split())


def first_cells(page: str) -> list[str]:
    """What each table row of a page has in its first column."""
    return [plain(re.split(r"(?<!\\)\|", line)[1]) for line in page.splitlines() if line.startswith("| ")]


def pieces(node: ast.AST) -> list[str | None]:
    """A sentence's constant pieces and, between them, FILLED_IN."""
    if isinstance(node, ast.Constant):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return [value.value if isinstance(value, ast.Constant) else FILLED_IN for value in node.values]
    if isinstance(node, ast.BinOp):  # what is added at a sentence's end is a way out
        return pieces(node.left)
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.List):  # "\n".join([sentence, ...])
        return pieces(node.args[0].elts[0])
    return []


def fault_of(sentence: list[str | None]) -> list[str | None]:
    """A sentence up to its first semicolon: behind it stands the way out, which the page may say in other words. Where
    nothing else is constant, the way out too."""
    fault = []
    for piece in sentence:
        fault.append(piece and piece.split(";")[0])
        if piece and ";" in piece:
            break
    return fault if has_words(fault) else sentence


def has_words(sentence: list[str | None]) -> bool:
    return any(piece and len(piece.split()) > 1 for piece in sentence)


def find_sentences(source: str) -> list[list[str | None]]:
    """What a module raises, and what it warns of."""
    nodes = list(ast.walk(ast.parse(source)))
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    ends = ENDS | {node.name for node in classes if ENDS & {ast.unparse(base) for base in node.bases}}
    raised = [node.exc for node in nodes if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    found = [pieces(call.args[0]) for call in raised if call.args and ast.unparse(call.func) in ends]
    said = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) in ("say", "_say")]
    found += [words for call in said if str((words := pieces(call.args[0]))[:1]).startswith("['warning: ")]
    return [fault for fault in map(fault_of, found) if has_words(fault) and not NEVER_SEEN & set(fault)]


def find_shell_sentences(source: str) -> list[list[str | None]]:
    """What launch.sh's `fail` says."""
    sentences = [re.split(r"(\$\{?\w+\}?)", words) for words in re.findall(r'\bfail "(.*?)"', source)]
    return [fault_of([FILLED_IN if piece.startswith("$") else piece for piece in words]) for words in sentences]


def find_missing(sentences: list[list[str | None]], cells: list[str]) -> list[str]:
    """Those that no cell has, constant piece after constant piece; as the page would show them."""
    missing = []
    for sentence in sentences:
        pattern = ".*?".join(re.escape(plain(piece)) for piece in sentence if piece and plain(piece))
        if not any(re.search(pattern, cell) for cell in cells):
            missing.append(plain("".join("…" if piece is FILLED_IN else piece for piece in sentence)))
    return missing


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_sentence_has_its_row(path):
    find = find_shell_sentences if path.suffix == ".sh" else find_sentences
    missing = find_missing(find(path.read_text(encoding="utf-8")), first_cells(PAGE.read_text(encoding="utf-8")))
    rows = "\n".join("| `" + sentence.replace("|", "\\|") + "` | why | what to do |" for sentence in missing)
    assert not missing, f"docs/troubleshooting.md lacks what {path.name} says; add to the tables there:\n{rows}"


def test_what_is_looked_for_is_found():
    """The search itself: each form in which the sources raise, and a page that lacks one."""
    source = """
class Odd(ValueError):
    pass
def check(path, names):
    raise ValueError(f"--config {path}: cannot be read ({names}); name another")
    raise Odd("two words")
    raise ValueError("\\n".join(["none of them", *names]))
    raise ValueError(explain(names) + "or another")
    raise ValueError("one" + f"{names}")
    raise ValueError(f"--template {path}: {names}; a brace is written twice")
    raise RuntimeError("never looked at")
    say(f"warning: {path} is full")
    say("no warning at all")
"""
    sentences = find_sentences(source)
    page = "| `--config …: cannot be read (…)` | why |\n| `two words` | |\n|---|---|\n`none of them`\n"
    assert find_missing(sentences, first_cells(page)) == [
        "none of them",
        "--template …: …; a brace is written twice",
        "warning: … is full",
    ]
    shell = find_shell_sentences('[[ -f "$X" ]] || fail "X=$X: no such file; it has a line"\n')
    assert find_missing(shell, ["X=…: no such file"]) == []
    assert find_missing(shell, ["no such file"]) == ["X=…: no such file"]
