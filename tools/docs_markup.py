"""What the documentation needs beyond Markdown.

Equations as MathML, so that pages fetch and compute nothing; and a Griffe extension
that turns the reStructuredText of docstrings into Markdown.
"""

import re
from html import escape

import griffe
from latex2mathml.converter import convert

_ROLE = re.compile(r":(\w+):`~?([^`]+)`")
_DIRECTIVE = re.compile(
    r"^\.\. math::(.*\n(?:[ \t]*\n|[ \t]+.*(?:\n|$))*)", re.MULTILINE
)
_TABLE = re.compile(r"^(=+ +=+[= ]*\n(?:.*\n)*?=+ +=+[= ]*)$", re.MULTILINE)
_MARKUP = re.compile(r"[*_`\[\]\\|]")  # of Markdown, between the tags of an equation


# Equations --------------------------------------------------------------------------


def inline_equation(tex: str) -> str:
    """Return an equation within a line."""
    # Within a span: a line that begins with <math> would be a block of its own.
    return f'<span class="math">{_mathml(tex, "inline")}</span>'


def block_equation(tex: str) -> str:
    """Return an equation between paragraphs."""
    return f'\n<div class="math">{_mathml(tex, "block")}</div>\n'


def _mathml(tex: str, display: str) -> str:
    tex = " ".join(tex.split()).replace(r"\arg\min", r"\operatorname{argmin}")
    found = str(convert(tex, display=display))
    return _MARKUP.sub(lambda x: f"&#{ord(x[0])};", found)


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
            return inline_equation(target)
        try:
            path = scope.resolve(target)
        except griffe.NameResolutionError:
            path = target
        name = escape(target.rpartition(".")[2] if "~" in found[0] else target)
        return f'<autoref optional identifier="{path}"><code>{name}</code></autoref>'

    def equation(found: re.Match[str]) -> str:
        return block_equation(found[1]) + "\n"

    text = _DIRECTIVE.sub(equation, text + "\n")
    text = _TABLE.sub(r"```text\n\1\n```", text)
    text = _ROLE.sub(role, text)
    return re.sub(r" ?::$", ":", text, flags=re.MULTILINE).rstrip()
