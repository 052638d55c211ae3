"""docs/troubleshooting.md: every message there is one that the code can print."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
CELLS = re.findall(r"^\| (`.*?) \|", PAGE, flags=re.MULTILINE)
MESSAGES = [message for cell in CELLS for message in re.findall(r"`([^`]+)`", cell)]


def texts(node: ast.AST) -> Iterator[str]:
    """The constant parts of every string in a tree, adjoining literals as one."""
    for child in ast.walk(node):
        if isinstance(child, ast.JoinedStr):
            yield "\0".join(str(part.value) for part in child.values if isinstance(part, ast.Constant))
        elif isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child.value


@pytest.fixture(scope="module")
def printed() -> str:
    """All strings of the package and of `tpu/`."""
    files = [*(ROOT / "derta_jax").rglob("*.py"), *(ROOT / "tpu").rglob("*.py")]
    return "\n".join(text for file in files for text in texts(ast.parse(file.read_text(encoding="utf-8"))))


def test_there_are_some() -> None:
    assert len(MESSAGES) > 25


@pytest.mark.parametrize("message", MESSAGES)
def test_the_code_can_print_it(message: str, printed: str) -> None:
    for part in message.split("…"):
        assert part.strip() in printed, part


def test_the_pages_it_links_exist() -> None:
    assert all((ROOT / "docs" / page).is_file() for page in re.findall(r"\]\((\w+\.md)\)", PAGE))
