"""What the documentation needs beyond Markdown.

A mkdocs hook that adds the pages that lie outside ``docs``, and turns equations into
MathML when the site is built, so that its pages fetch and compute nothing; and a Griffe
extension that turns the reStructuredText of docstrings into Markdown.
"""

import posixpath
import re
from html import escape, unescape
from pathlib import Path

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "baselines/*/README.md")

_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
_MATH = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>',
    re.DOTALL,
)
_ROLE = re.compile(r":(\w+):`~?([^`]+)`")
_DIRECTIVE = re.compile(
    r"^\.\. math::(.*\n(?:[ \t]*\n|[ \t]+.*(?:\n|$))*)", re.MULTILINE
)
_TABLE = re.compile(r"^(=+ +=+[= ]*\n(?:.*\n)*?=+ +=+[= ]*)$", re.MULTILINE)


# Pages ------------------------------------------------------------------------------


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add pages of the repository, with their pictures."""
    found = [path for pattern in OUTSIDE for path in ROOT.glob(pattern)]
    pictures = [p for path in found[2:] for p in path.parent.glob("_static/*.png")]
    for path in [*found, *pictures]:
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Make links between files of the repository those between pages of the site."""
    here = page.file.src_uri
    folder = posixpath.dirname(here if _is_outside(here) else f"docs/{here}")

    def link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, found[1]))
        if not _is_outside(target) and not target.startswith("docs/"):
            return found[0]
        site = target.removeprefix("docs/")
        return posixpath.relpath(site, posixpath.dirname(here))

    return _LINK.sub(link, markdown)


def _is_outside(path: str) -> bool:
    return path in OUTSIDE or path.startswith("baselines/")


# Equations --------------------------------------------------------------------------


def on_page_content(html: str, **_: object) -> str:
    """Write every equation of a page as MathML."""

    def mathml(found: re.Match[str]) -> str:
        display = "block" if found["tag"] == "div" else "inline"
        tex = (
            unescape(found["tex"])
            .strip()
            .replace(r"\arg\min", r"\operatorname{argmin}")
        )
        return str(convert(tex, display=display))

    return _MATH.sub(mathml, html)


# Docstrings -------------------------------------------------------------------------


class Markdown(griffe.Extension):
    """Turns every docstring of a package into Markdown."""

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        """Visit the package once it is loaded."""
        self._visit(pkg)

    def _visit(self, scope: griffe.Object) -> None:
        if scope.docstring:
            scope.docstring.value = to_markdown(scope.docstring.value, scope)
        for member in scope.members.values():
            if isinstance(member, griffe.Object):
                self._visit(member)


def to_markdown(text: str, scope: griffe.Object) -> str:
    """Turn roles, equations, tables and literal blocks into Markdown."""

    def role(found: re.Match[str]) -> str:
        kind, target = found.groups()
        if kind == "math":
            return f"\\({' '.join(target.split())}\\)"
        try:
            path = scope.resolve(target)
        except griffe.NameResolutionError:
            path = target
        name = escape(target.rpartition(".")[2] if "~" in found[0] else target)
        return f'<autoref optional identifier="{path}"><code>{name}</code></autoref>'

    def equation(found: re.Match[str]) -> str:
        return f"\n\\[{' '.join(found[1].split())}\\]\n\n"

    text = _DIRECTIVE.sub(equation, text + "\n")
    text = _TABLE.sub(r"```text\n\1\n```", text)
    text = _ROLE.sub(role, text)
    return re.sub(r" ?::$", ":", text, flags=re.MULTILINE).rstrip()
