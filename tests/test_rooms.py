"""The layer rule: a file imports only from its own folder or from folders earlier in the alphabet. The commands come
last, and they alone import the files beside the folders."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import memreason

ROOT = Path(memreason.__file__).parent


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("memreason"):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("memreason")}
    return found


def test_rooms_import_only_from_earlier_rooms() -> None:
    broken = []
    for path in ROOT.glob("*/**/*.py"):
        room = path.relative_to(ROOT).parts[0]
        for module in imports(path):
            parts = module.split(".")
            beside = len(parts) < 2 or (ROOT / f"{parts[1]}.py").is_file()
            wrong = room != "verbs" if beside else parts[1] > room
            if wrong:
                broken.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not broken


def test_help_imports_no_torch() -> None:
    code = (
        "import sys, memreason.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_early_rooms_import_no_torch() -> None:
    code = "import sys, memreason.core.recipe, memreason.data.tasks; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_what_may_bring_numba_is_imported_where_it_is_used() -> None:
    """Ahead of it vLLM 0.32 does not start (tests/test_engines_soak.py)."""
    early = re.compile(r"(?m)^(?:import|from) (?:bm25s|numba|sklearn|umap)\b")
    found = {str(path.relative_to(ROOT)) for path in ROOT.glob("**/*.py") if early.search(path.read_text())}
    assert found == {"retrieve/bm25.py"}, "retrieval is the local engine's alone"


def test_public_names_exist() -> None:
    for name in memreason.__all__:
        assert callable(getattr(memreason, name))  # a room of the same name would hide it
