"""The direction of imports: a file imports only from rows above its own."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "mslora_cr"
ROWS = (
    ("__init__", "errors", "files", "precision", "workers"),
    ("config",),
    ("config_file",),
    ("losses", "evaluation.metrics", "evaluation.matrix", "evaluation.intervals"),
    ("data.records", "data.tokenizer"),
    ("data.images", "data.prompts", "data.catalog", "data.synthetic_images"),
    ("data.features", "data.raw", "data.synthetic"),
    ("data.collator",),
    ("data.pcam", "data.check", "data.download"),
    ("data.annotations",),
    ("data.prepare",),
    ("llava_med",),
    ("banks", "inspection", "tiny_pretraining"),
    ("bank_stack", "tiny_model", "router"),
    ("mixed_banks", "kept_positions", "training.penalties", "training.distributed", "training.ledger"),
    ("training.processes",),
    ("runtime", "training.trainer"),
    ("methods.base",),
    ("methods.zero_shot", "methods.each", "methods.sequential", "methods.incremental"),
    (
        "methods.mslora_cr",
        "methods.olora",
        "methods.lwf",
        "methods.ewc",
        "methods.replay",
        "methods.joint",
        "methods.moe_lora",
    ),
    ("methods",),
    ("chains",),
    ("training.stream",),
    ("evaluation.score", "evaluation.geometry"),
    ("evaluation.generate", "evaluation.plots", "evaluation.record"),
    ("evaluation.heatmaps", "evaluation.evaluate"),
    ("evaluation.compare", "evaluation.routed"),
    ("evaluation.report", "evaluation.analyze"),
    ("demo", "sweep"),
    ("cli",),
    ("__main__",),
)
RANK = {name: number for number, row in enumerate(ROWS) for name in row}


def modules() -> dict[str, Path]:
    """By name; a package's own name is its `__init__.py`, where there is something in it."""
    found = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in found.items() if path.stat().st_size}


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


def test_every_file_has_a_row() -> None:
    assert set(modules()) == set(RANK)


def test_a_file_imports_only_from_rows_above_its_own() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, path in modules().items()
        for other in imported(path)
        if RANK[other] >= RANK[name]
    ]
    assert not wrong


def test_only_distributed_imports_deepspeed() -> None:
    importers = [name for name, path in modules().items() if "import deepspeed" in path.read_text(encoding="utf-8")]
    assert importers == ["training.distributed"]
