"""Start a strategy: ``make new-strategy NAME=my_idea``.

Copies ``tools/template``, a small strategy that works, under the new name: the strategy
with its client half, its tests, its page; and lists them where the others are listed,
with a row in the table of all methods.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEMPLATE = Path(__file__).parent / "template"
TABLE = Path("tests", "strategies", "test_every_method.py")
NEXT = """
Next: put your own sum and its equation in the place of the template's, tests first.
Its row in tests/strategies/test_every_method.py says with which options it runs, with
which it is FedAvg, and what a mechanism refuses: all that holds for every method is
tested there. Then a row in README.md, docs/strategies.md and CHANGELOG.md.
"""


def new_strategy(name: str, root: Path = ROOT) -> list[Path]:
    """Write the files of a strategy; return those that are new.

    Parameters
    ----------
    name : str
        Of the module, such as ``my_idea``; the class is then ``MyIdea``.
    root : Path
        The checkout.

    Raises
    ------
    ValueError
        If the name is no module name, or taken.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise ValueError(f"NAME={name!r} must be a module name such as my_idea")
    copies = {
        "strategy.py": root / "strategies" / f"{name}.py",
        "test_strategy.py": root / "tests" / "strategies" / f"test_{name}.py",
        "page.md": root / "docs" / "strategies" / f"{name}.md",
    }
    if taken := [path for path in copies.values() if path.exists()]:
        raise ValueError(f"NAME={name} is taken: {taken[0]} exists")
    title = "".join(word.capitalize() for word in name.split("_"))
    for source, path in copies.items():
        text = (TEMPLATE / source).read_text("utf-8")
        # In keys of records words are joined by hyphens.
        text = text.replace('"template', f'"{name.replace("_", "-")}')
        text = text.replace("template", name).replace("Template", title)
        path.write_text(text, "utf-8")
    _list(root, name, title)
    changed = [*copies.values(), root / "strategies" / "__init__.py", root / TABLE]
    code = [str(path) for path in changed if path.suffix == ".py"]
    # Names of another length wrap and sort otherwise; RUF022 sorts __all__.
    for command in (
        "check --quiet --fix --exit-zero --extend-select RUF022",
        "format --quiet",
    ):
        ruff = [sys.executable, "-m", "ruff", *command.split()]
        subprocess.run([*ruff, *code], cwd=root, check=True)
    return [*copies.values()]


def _list(root: Path, name: str, title: str) -> None:
    """Export the classes; put row, page and reference where the others are."""
    init = root / "strategies" / "__init__.py"
    module = f"flower_ext.strategies.{name}"
    text = init.read_text("utf-8")
    text = text.replace(
        "\n__all__ = [",
        f"from {module} import {title}, {title}Client\n\n__all__ = [\n"
        f'    "{title}",\n    "{title}Client",',
        1,
    )
    init.write_text(text, "utf-8")
    row = (TEMPLATE / "row.txt").read_text("utf-8").replace("Template", title)
    text = (root / TABLE).read_text("utf-8")
    start, rest = text.split("\nMETHODS = {\n", 1)
    rest = rest.replace("\n}\n", f"\n{row}}}\n", 1)
    added = f"from {module} import {title}, {title}Client\n"
    last = "from flower_ext.testing import"
    start = start.replace(last, added + last, 1)
    (root / TABLE).write_text(f"{start}\nMETHODS = {{\n{rest}", "utf-8")
    reference = root / "docs" / "reference" / "strategies.md"
    with reference.open("a", encoding="utf-8") as file:
        file.write(f"\n::: {module}\n")
    site = root / "mkdocs.yml"
    text = site.read_text("utf-8")
    last = "      - own_strategy.md\n"
    text = text.replace(last, f"      - strategies/{name}.md\n{last}", 1)
    site.write_text(text, "utf-8")


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Start a strategy from the template.")
    parser.add_argument("name", help="module name, such as my_idea")
    try:
        for path in new_strategy(parser.parse_args().name):
            print(path.relative_to(ROOT))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(NEXT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
