"""Names are nouns: no variable, argument, attribute, function or class is named by a pronoun or a participle.

Not covered: names that are imported, and names made of several words.
"""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "both", "each", "every", "few", "given", "going", "here", "kept", "many", "one", "ones", "others", "own", "rest",
    "said", "some", "there", "told", "what", "who",  # codespell:ignore told
}  # fmt: skip


def test_no_name_is_a_pronoun_or_a_participle() -> None:
    offences = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in tracked_python_files()
        for line, name in sorted(defined_names(ast.parse(path.read_text(encoding="utf-8"))))
        if name.strip("_").lower() in FORBIDDEN
    ]

    assert not offences, "name these after what they hold:\n" + "\n".join(offences)


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("x = y.z = 1", {"x", "z"}),
        ("x: int", {"x"}),
        ("for x, *y in z: pass", {"x", "y"}),
        ("[x for x in y if (z := x)]", {"x", "z"}),
        ("with a as x, b as (y, z): pass", {"x", "y", "z"}),
        ("def f(a, /, b, *c, d=1, **e): pass", {"f", "a", "b", "c", "d", "e"}),
        ("async def f(): pass", {"f"}),
        ("lambda x: y", {"x"}),
        ("class A(B): pass", {"A"}),
        ("try: pass\nexcept E as x: pass", {"x"}),
        ("match a:\n case [x, *y]: pass\n case {'b': z, **w}: pass\n case C(d=v) as u: pass", set("xyzwvu")),
        ("import a\nfrom b import c\nimport d as x", {"x"}),
        ("print(x.y, x[z], f(w=1))", set()),
    ],
)
def test_every_kind_of_definition_is_found(code: str, names: set[str]) -> None:
    assert {name for _, name in defined_names(ast.parse(code))} == names


def tracked_python_files() -> list[Path]:
    """The Python files under version control that exist; skips outside a git checkout."""
    process = subprocess.run(["git", "ls-files", "-z", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in process.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def defined_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of everything that a module names itself."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield node.lineno, name
            case (
                ast.ExceptHandler(name=str(name))
                | ast.MatchAs(name=str(name))
                | ast.MatchStar(name=str(name))
                | ast.MatchMapping(rest=str(name))
            ):
                yield node.lineno, name
            case ast.alias(asname=str(name)):
                yield node.lineno, name
