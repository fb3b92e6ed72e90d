"""Write the pages of the site, as plain Markdown that any generator builds.

``build/docs`` gets the pages of ``docs`` and those of the repository that belong to
them (contributing, changes, baselines with their pictures). Links between files of the
repository become links between pages, and equations MathML, so that a page fetches and
computes nothing.
"""

import posixpath
import re
import shutil
import sys
from pathlib import Path

from docs_markup import block_equation, inline_equation

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "build" / "docs"
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "baselines/*/README.md")

_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
# What is code stays as it is: fences, indented blocks, spans.
_CODE_OR_MATH = re.compile(
    r"(?P<code>^(?P<fence>```+|~~~+).*?^(?P=fence)`*$|^ {4,}\S[^\n]*$"
    r"|(?P<tick>`+).+?(?P=tick))"
    r"|^\$\$\s*(?P<block>.+?)\s*\$\$"
    r"|(?<!\\)\$(?P<inline>[^\s$](?:[^$]*?[^\s$])?)\$",
    re.DOTALL | re.MULTILINE,
)


def pages() -> dict[str, Path]:
    """Return the files of the site, by their place in it."""
    docs = ROOT / "docs"
    inside = {p.relative_to(docs).as_posix(): p for p in docs.rglob("*") if p.is_file()}
    found = [path for pattern in OUTSIDE for path in ROOT.glob(pattern)]
    pictures = [p for path in found for p in path.parent.glob("_static/*.png")]
    return inside | {p.relative_to(ROOT).as_posix(): p for p in [*found, *pictures]}


def page_of(text: str, place: str) -> str:
    """Return a page as it is in the site."""
    folder = posixpath.dirname(place if _is_outside(place) else f"docs/{place}")

    def link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, found[1]))
        if not _is_outside(target) and not target.startswith("docs/"):
            return found[0]
        site = target.removeprefix("docs/")
        return posixpath.relpath(site, posixpath.dirname(place))

    def equation(found: re.Match[str]) -> str:
        if found["code"]:
            return found[0]
        if found["block"]:
            return block_equation(found["block"])
        return inline_equation(found["inline"])

    return _CODE_OR_MATH.sub(equation, _LINK.sub(link, text))


def _is_outside(path: str) -> bool:
    return path in OUTSIDE or path.startswith("baselines/")


def main(target: Path = TARGET) -> None:
    """Write all pages anew."""
    shutil.rmtree(target, ignore_errors=True)
    for place, path in pages().items():
        written = target / place
        written.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            written.write_text(page_of(path.read_text("utf-8"), place), "utf-8")
        else:
            shutil.copy(path, written)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
