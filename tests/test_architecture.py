"""What holds the package together: the import rule of CONTRIBUTING.md, small modules, nothing private."""

import ast
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES = 400

# A room (a module or package right under derta_jax) may import from its own layer and from those below it.
LAYERS = [
    {"cli", "arguments", "descriptions"},
    {"training", "evaluation", "planning", "benchmark", "miniature"},
    {"objectives", "data", "interop"},
    {"models"},
    {"config"},
    {"errors", "versions", "waiting"},
]
DEPTH = {room: depth for depth, layer in enumerate(LAYERS) for room in layer}
FORBIDDEN_SIDEWAYS = {
    ("training", "planning"),
    ("training", "miniature"),
    ("training", "evaluation"),
    ("evaluation", "miniature"),
}

PACKAGE_INDEX = r"""https?://[^\s"']*/(?:simple|whl)\b|(?:index-url|find-links)[\s="']+(?:https?:|file:|/)"""
THIS_MACHINE = {ROOT, ROOT.parent, Path.home()} - {Path("/"), Path(tempfile.gettempdir())}
MACHINE_PATH = "|".join([r"/(?:home|Users)/\w", *(rf"{re.escape(str(path))}\b" for path in THIS_MACHINE)])
PRIVATE = re.compile(rf"(?i:{PACKAGE_INDEX})|(?<![\w.~*$)}}/-])(?:{MACHINE_PATH})")


class Import(NamedTuple):
    where: str
    importer: str
    imported: str
    lazy: bool

    def __str__(self) -> str:
        return f"{self.where}: {self.importer} imports {self.imported}"


def room(module: str) -> str:
    """`training` for `derta_jax.training.loop`; empty for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def read_imports(package: Path) -> list[Import]:
    """Every import of one of the package's modules by another, at any depth of the code."""
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return [
        Import(f"{path.relative_to(package.parent)}:{node.lineno}", module, imported, node not in tree.body)
        for module, path in modules.items()
        for tree in [ast.parse(path.read_text(encoding="utf-8"))]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for imported in imported_modules(node, module, path.name == "__init__.py", modules)
        if module != imported
    ]


def imported_modules(
    node: ast.Import | ast.ImportFrom, module: str, is_package: bool, modules: Iterable[str]
) -> Iterator[str]:
    """The package's modules that a statement imports; `from derta_jax import __version__` counts as none."""
    top = module.partition(".")[0]
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == top)
        return
    source = node.module or ""
    if node.level:
        source = ".".join([*module.split(".")[: is_package - node.level or None], source]).rstrip(".")
    if source.partition(".")[0] == top:
        for alias in node.names:
            if f"{source}.{alias.name}" in modules:
                yield f"{source}.{alias.name}"
            elif (source, alias.name) != (top, "__version__"):
                yield source


def complaint(line: Import) -> str | None:
    """Why an import breaks the rule, or None."""
    importer, imported = room(line.importer), room(line.imported)
    if not importer:
        if imported == "interop" and line.lazy:
            return None
        return "the package itself imports from interop only, and only when a function is asked for"
    if not imported:
        return "import from the module that defines it, not from the package"
    unknown = {importer, imported} - DEPTH.keys()
    if unknown:
        return f"no layer holds {', '.join(sorted(unknown))}: find its place in CONTRIBUTING.md and in LAYERS"
    if DEPTH[imported] < DEPTH[importer]:
        return f"{importer} is below {imported}"
    if (importer, imported) in FORBIDDEN_SIDEWAYS:
        return f"{importer} must do without {imported}"
    return None


def find_cycle(imports: Iterable[Import]) -> list[Import]:
    """The imports along one circle of modules, or of rooms; empty if there is none."""
    for name in (str, room):
        edges = {(name(line.importer), name(line.imported)): line for line in imports}
        graph: dict[str, set[str]] = {}
        for importer, imported in edges:
            if importer != imported:
                graph.setdefault(importer, set()).add(imported)
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            circle = error.args[1][::-1]
            return [edges[pair] for pair in pairwise(circle)]
    return []


def broken_rules(package: Path) -> list[str]:
    """What is wrong with the package's imports, a line each."""
    imports = read_imports(package)
    problems = [f"{line} ({reason})" for line in imports if (reason := complaint(line))]
    if circle := find_cycle(imports):
        problems.append("\n    ".join(["imports in a circle:", *map(str, circle)]))
    return problems


def repository_files() -> list[Path]:
    """What is tracked, or would be after `git add`."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def private_lines(text: str) -> list[tuple[int, str]]:
    """The numbered lines that name a package index or a path of this machine."""
    lines = enumerate(text.splitlines(), start=1)
    return [(number, line.strip()) for number, line in lines if PRIVATE.search(line)]


def fail_if_any(problems: list[str], heading: str) -> None:
    if problems:
        pytest.fail("\n".join([heading, *problems]), pytrace=False)


def test_imports_follow_the_layers():
    fail_if_any(broken_rules(ROOT / "derta_jax"), "imports that break the rule of CONTRIBUTING.md:")


def test_modules_stay_small():
    problems = [
        f"{path.relative_to(ROOT)}: {lines} lines"
        for path in sorted((ROOT / "derta_jax").rglob("*.py"))
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    ]
    fail_if_any(problems, f"longer than {MAX_LINES} lines, to be split by what they do:")


def test_the_repository_names_no_package_index_and_no_path_of_this_machine():
    problems = [
        f"{path.relative_to(ROOT)}:{number}: {line}"
        for path in repository_files()
        for number, line in private_lines(path.read_text(encoding="utf-8", errors="ignore"))
    ]
    fail_if_any(problems, "lines that name a package index or a path of this machine:")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cli.py": "from derta_jax import __version__, config", "config.py": ""}, None),
        ({"models/a.py": "from . import b\nfrom .b import c", "models/b.py": ""}, None),
        ({"miniature/a.py": "import derta_jax.training.loop"}, None),
        ({"config.py": "from derta_jax.errors import UserError"}, None),
        ({"__init__.py": "def f():\n    from derta_jax.interop.load import g"}, None),
        ({"__init__.py": "from derta_jax.interop.load import g"}, "only when a function is asked for"),
        ({"models/a.py": "def f():\n    import derta_jax.data"}, r"derta_jax/models/a\.py:2: .*below data"),
        ({"models/a.py": "from ..data.b import c"}, "models is below data"),
        ({"models/__init__.py": "from ..data import b", "data/b.py": ""}, r"imports derta_jax\.data\.b "),
        ({"errors.py": "from derta_jax.config import RunConfig"}, "errors is below config"),
        ({"evaluation/a.py": "from derta_jax.training import b"}, None),
        ({"training/a.py": "from derta_jax.evaluation import b"}, "training must do without evaluation"),
        ({"data/a.py": "from derta_jax import load_pretrained"}, "from the module that defines it"),
        ({"extras.py": "import derta_jax.models"}, "no layer holds extras"),
        ({"data/a.py": "from . import b", "data/b.py": "from . import a"}, "(?s)circle:.*data/b.py:1"),
        ({"data/a.py": "from ..interop import c", "interop/d.py": "from ..data import e"}, "circle:"),
    ],
)
def test_the_import_rule_itself(tmp_path, files, expected):
    for name, text in files.items():
        path = tmp_path / "derta_jax" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    problems = "\n".join(broken_rules(tmp_path / "derta_jax"))
    if expected is None:
        assert not problems
    else:
        assert re.search(expected, problems)


@pytest.mark.parametrize(
    ("line", "is_private"),
    [
        ("https://pypi.example.org" + "/simple/torch", True),
        ("--find-links" + " /wheels", True),
        ("see " + str(ROOT / "README.md"), True),
        ("/home" + "/ada/model", True),
        ("uv pip compile --no-emit-index-url --no-emit-find-links", False),
        ("https://example.org" + "/papers/simple_parsing", False),
        ("gs://bucket/home/model and ~/model and $HOME/model", False),
    ],
)
def test_what_counts_as_private(line, is_private):
    assert bool(private_lines(line)) == is_private
