"""The direction of imports: a file imports from its own room or from rooms below it, and never in a circle."""

import ast
import re
from collections import Counter
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "mslora_cr"
TESTS = PACKAGE.with_name("tests")
ROOMS = (
    "utils",
    "config",
    "distributed",
    "statistics",
    "data",
    "metrics",
    "clinical",
    "models",
    "banks",
    "generation",
    "losses",
    "routing",
    "runs",
    "synthetic",
    "training",
    "methods",
    "stream",
    "evaluation",
    "analysis",
    "release",
    "tuning",
    "reporting",
    "serving",
    "sweep",
    "demo",
    "api",
    "cli",
    "__main__",
)
"""From the ground up. A room is a folder, or a file at the top of the package."""
MOST_LINES = 400
MOST_LOOSE = 8
MOST_MODULES = 20


@cache
def modules() -> dict[str, Path]:
    """By name; a package's own name is its `__init__.py`."""
    found = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in found.items()}


def imported(path: Path) -> set[str]:
    """The package's modules that a file imports, also inside functions."""
    known, names = modules(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mslora_cr":
            module = (node.module or "").removeprefix("mslora_cr").lstrip(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".lstrip(".")
                names.add(inner if inner in known else module or "__init__")
    return names


def external(path: Path) -> set[str]:
    """The top names of everything that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


def room(module: str) -> str:
    return module.partition(".")[0]


def test_every_file_is_in_a_room() -> None:
    assert {room(name) for name in modules()} == {*ROOMS, "__init__"}
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_LOOSE


def test_a_file_imports_only_from_its_own_room_and_those_below() -> None:
    rank = {name: number for number, name in enumerate(("__init__", *ROOMS))}
    wrong = [
        f"{name} imports {other}"
        for name, path in modules().items()
        for other in imported(path)
        if name != "__init__" and rank[room(other)] > rank[room(name)]
    ]
    assert not wrong


def test_no_import_goes_in_a_circle() -> None:
    graph = {name: imported(path) - {name} for name, path in modules().items() if name != "__init__"}
    TopologicalSorter(graph).prepare()


def test_no_file_is_long() -> None:
    long = {
        name: lines for name, path in modules().items() if (lines := len(path.read_text().splitlines())) > MOST_LINES
    }
    assert not long


def test_no_folder_is_crowded() -> None:
    folders = Counter(
        path.parent for root in (PACKAGE, TESTS) for path in root.rglob("*.py") if path.name != "__init__.py"
    )
    assert {folder.name: count for folder, count in folders.items() if count > MOST_MODULES} == {}


def test_only_one_file_imports_deepspeed() -> None:
    importers = [name for name, path in modules().items() if "deepspeed" in external(path)]
    assert importers == ["distributed.deepspeed"]


def test_a_file_reads_files_of_its_own_room_alone() -> None:
    """Whoever climbs out of its room by path escapes the direction of imports."""
    climbers = [
        name
        for name, path in modules().items()
        if re.search(r"__file__\)[.\w()]*\.parent(?:s\[|\.parent)", path.read_text())
    ]
    assert climbers == ["config.methods"]  # it lists the methods that ship, and imports the one that is named


def test_readme_and_the_architecture_page_list_the_rooms_in_this_order() -> None:
    rooms = [room for room in ROOMS if room != "__main__"]
    tree = (PACKAGE.parent / "README.md").read_text(encoding="utf-8").partition("\nmslora_cr/\n")[2]
    assert re.findall(r"^  (\w+)(?:/|\.py) ", tree, re.M) == rooms
    page = (PACKAGE.parent / "docs" / "explanation" / "architecture.md").read_text(encoding="utf-8")
    picture = page.partition("## The rooms")[2].split("```")[1]
    assert picture.split() == rooms
