"""Who may know whom: rooms import each other in one direction, from the top of the house to its foundations."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up: a room may import those above it in this list, and itself.
FLOORS = (
    "data",
    "data.sources",
    "data.sequences",
    "data.batches",
    "data.augmentation",
    "trainer.processes.random_state",
    "trainer.surgery.methods",
    "trainer.feed",
    "trainer.options",
    "trainer.config",
    "trainer.recipe",
    "trainer.processes",
    "trainer.model",
    "trainer.objectives",
    "trainer.engine",
    "trainer.surgery",
    "trainer.result",
    "trainer.checkpoint",
    "trainer.evaluation",
    "trainer.run",
    "trainer.export",
    "trainer.step",
    "trainer.metrics",
    "trainer.assembly",
    "trainer.train",
    "slurm",
    "tuning",
    "launch",
    "launch.commands",
    "launch.api",
    "launch.main",
)


def room(module: str) -> str:
    """The room of `minbert.a.b.c`, the most specific that there is."""
    name = module.removeprefix("minbert.")
    return max((floor for floor in FLOORS if name == floor or name.startswith(f"{floor}.")), key=len)


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("minbert."):
            found |= (
                {node.module}
                if (ROOT / _file(node.module)).exists()
                else {f"{node.module}.{name.name}" for name in node.names}
            )
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.startswith("minbert.")}
    return found


def _file(module: str) -> str:
    return module.removeprefix("minbert.").replace(".", "/") + ".py"


FILES = [
    path
    for folder in ("data", "trainer", "slurm", "tuning", "launch")
    for path in (ROOT / folder).rglob("*.py")
    if path != ROOT / "trainer" / "__init__.py"  # which stands above its rooms
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_know_those_below_only(path):
    module = "minbert." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    own = FLOORS.index(room(module))
    above = {other for other in imports(path) if FLOORS.index(room(other)) > own}
    assert not above, f"{module} imports {', '.join(sorted(above))} from above"


def test_every_room_says_what_it_holds():
    for floor in FLOORS:
        folder = ROOT / floor.replace(".", "/")
        if folder.is_dir():
            words = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
            assert words and len(words) > 60, folder
