"""The house rules of STYLE.md (those marked with a gear) as a test: sizes, imports, names, banned calls."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "excimer"

LAYERS = (
    {"base"},
    {"pgformat", "wire"},
    {"consensus", "storage.format", "storage.plan"},
    {"io"},
    {"postgres"},
    {"storage.engine", "service"},
    {"pageserver", "safekeeper", "broker", "compute", "controller", "proxy", "console", "scrubber"},
    {"compute_node"},
    {"export", "verify"},
    {"supervisor"},
    {"cli"},
)
SERVICES = LAYERS[-5]
PURE = {"base", "pgformat", "wire", "consensus", "storage.format", "storage.plan"}
IMPURE_MODULES = {"asyncio", "os", "socket", "time", "random", "threading", "subprocess"}
BANNED_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}

MODULE_LINES_MAX = 600
TEST_LINES_MAX = 800
FUNCTION_LINES_MAX = 70


def sources(*roots: Path) -> list[Path]:
    return sorted(
        path for root in roots for path in root.rglob("*") if path.suffix in (".py", ".pyx", ".c", ".h")
    )


def tracked_sources() -> list[Path]:
    generated = {path.with_suffix(".c") for path in SOURCE.rglob("*.pyx")}
    return [
        path
        for path in sources(SOURCE, ROOT / "csrc", ROOT / "bench", ROOT / "tools")
        if path not in generated
    ]


def package_of(dotted: str) -> str | None:
    """`excimer.storage.plan.gc_plan` -> `storage.plan`; None for native modules and the top."""
    parts = dotted.split(".")[1:]
    if not parts or parts[0] == "_native":
        return None
    if parts[0] == "storage":
        return ".".join(parts[:2]) if len(parts) > 1 else None
    return parts[0]


def layer_of(package: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if package in layer)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(SOURCE.rglob("*.py")):
        dotted = ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts)
        yield dotted.removesuffix(".__init__"), path


def test_files_are_small() -> None:
    limits = [(path, MODULE_LINES_MAX) for path in tracked_sources()]
    limits += [(path, TEST_LINES_MAX) for path in sources(ROOT / "tests")]
    too_long = [
        f"{path.relative_to(ROOT)}: {lines} lines, at most {limit}"
        for path, limit in limits
        if (lines := len(path.read_text().splitlines())) > limit
    ]
    assert not too_long, "\n".join(too_long)


def test_functions_are_small() -> None:
    too_long = []
    for path in sources(SOURCE, ROOT / "tests", ROOT / "bench", ROOT / "tools"):
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES_MAX:
                    too_long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines} lines")
    assert not too_long, "\n".join(too_long)


def test_imports_go_one_way() -> None:
    wrong = []
    for dotted, path in modules():
        importer = package_of(dotted)
        if importer is None:
            continue
        for imported in imports(path):
            package = package_of(imported) if imported.startswith("excimer.") else None
            if package is None or package == importer or not any(package in layer for layer in LAYERS):
                continue
            if importer in SERVICES and package in SERVICES:
                wrong.append(f"{dotted} imports {imported}: services never import each other")
            elif layer_of(package) > layer_of(importer):
                wrong.append(f"{dotted} imports {imported}: imports go from later layers to earlier ones")
    assert not wrong, "\n".join(wrong)


def test_pure_packages_do_no_io() -> None:
    wrong = [
        f"{dotted} imports {imported}"
        for dotted, path in modules()
        if package_of(dotted) in PURE
        for imported in imports(path)
        if imported.split(".")[0] in IMPURE_MODULES
    ]
    assert not wrong, "\n".join(wrong)


def test_names_say_what_a_module_is() -> None:
    assert not [str(path) for path in tracked_sources() if path.stem in BANNED_NAMES]


def test_every_module_begins_with_a_docstring() -> None:
    missing = [
        dotted
        for dotted, path in modules()
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize(
    ("pattern", "allowed", "why"),
    [
        (
            r"except Exception\b|except BaseException\b|except:",
            "service/tasks.py",
            "only service/tasks.py catches everything",
        ),
        (r"\bcreate_task\(", "service/tasks.py", "tasks live in a group, named"),
        (r"\b(TODO|FIXME|XXX|HACK)\b", "", "finish it or file it"),
    ],
)
def test_banned_text(pattern: str, allowed: str, why: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked_sources()
        if path.suffix in (".py", ".pyx")
        and str(path.relative_to(SOURCE.parent.parent)) != f"src/excimer/{allowed}"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line) and "group.create_task" not in line
    ]
    assert not found, f"{why}: {', '.join(found)}"


def test_no_merge_was_left_halfway() -> None:
    """Docs have nothing else that would notice."""
    roots = (SOURCE, ROOT / "csrc", ROOT / "bench", ROOT / "tools", ROOT / "tests", ROOT / "docs")
    documents = [path for root in roots for path in root.rglob("*.md")] + sorted(ROOT.glob("*.md"))
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in [*sources(*roots), *documents]
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.match(r"(<<<<<<<|>>>>>>>)( |$)", line) or (path.suffix == ".md" and line == "=" * 7)
    ]
    assert not found, f"conflict markers: {', '.join(found)}"


def test_the_one_page_architecture_names_what_exists() -> None:
    """Every path in it is there, and every package and C library of ours is in its map."""
    page = (ROOT / "ARCHITECTURE.md").read_text()
    for name in re.findall(r"`([\w./]+/[\w./]*)`", page):
        places = [root / f"{name}{suffix}" for root in (ROOT, SOURCE) for suffix in ("", ".py", ".pyx")]
        assert any(path.exists() for path in places), f"ARCHITECTURE.md names {name}, which is not there"
    code_map = page.partition("## Map of the code")[2]
    packages = {path.parent for path in SOURCE.glob("*/__init__.py")} | {*(ROOT / "csrc").iterdir()}
    missing = sorted(path.name for path in packages if not re.search(rf"\b{path.name}\b", code_map))
    assert not missing, f"the map of the code in ARCHITECTURE.md lacks {missing}"
