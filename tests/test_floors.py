"""The walls of the house, read from the source: who may import whom, and how large a room may grow."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "rest_jax").rglob("*.py"))
FILE_LINES, FUNCTION_LINES, ARGUMENTS = 450, 80, 8

FLOORS = {
    "types": 0, "keys": 0, "errors": 0, "files": 0, "processes": 0,
    "objectives": 1,
    "network": 2,
    "data": 3,
    "generation": 4, "rewards": 4, "metrics": 4,
    "training": 5,
    "phases": 6,
    "main": 7, "verbs": 7, "start": 7, "flags": 7, "gin_setup": 7,
    "rest": 7, "report": 7, "interop": 7, "doctor": 7,
}  # fmt: skip

# Who alone may import what.
ALONE = {
    "gin": {"gin_setup.py"},
    "seqio": {"data/tasks.py"},
    "tensorflow": {"data/tasks.py"},
    "tensorflow_datasets": {"data/tasks.py"},
    "tensorflow_text": {"data/tasks.py"},
    "orbax": {"training/checkpoints.py", "interop/t5x.py"},
    "torch": {"interop/huggingface.py"},
    "transformers": {"interop/huggingface.py"},
    "plotly": {f"report/{path.name}" for path in (ROOT / "rest_jax" / "report").glob("*.py")},
}
# Code that runs what it reads, or could.
NEVER = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT / "rest_jax").as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports_of(path: Path) -> Iterator[str]:
    """Full names of all that a module imports, wherever in it the import stands."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import hides the floor"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(name: str) -> str:
    """The room of a module's path ("data/tasks.py") or of a dotted name below rest_jax."""
    return name.removesuffix(".py").replace("/", ".").split(".")[0]


def mathematics() -> list[Path]:
    return sorted((ROOT / "rest_jax" / "objectives").glob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_from_lower_floors_or_its_own_room(path):
    room = room_of(name_of(path))
    if room == "__init__":
        assert not [name for name in imports_of(path) if name.startswith("rest_jax")]
        return
    for name in imports_of(path):
        if not name.startswith("rest_jax."):
            continue
        other = room_of(name.removeprefix("rest_jax."))
        if other in ("__version__", room):
            continue
        assert other in FLOORS, f"{name_of(path)} imports {name}, a room without a floor"
        # The roof is one floor whose rooms know each other; below it, rooms of a floor are strangers.
        limit = FLOORS[room] if FLOORS[room] in (0, 4, 7) else FLOORS[room] - 1
        assert FLOORS[other] <= limit, f"{name_of(path)} (floor {FLOORS[room]}) imports {name}"


def test_every_room_has_a_floor():
    rooms = {room_of(name_of(path)) for path in MODULES} - {"__init__"}
    assert rooms == set(FLOORS)


def test_rooms_of_the_acts_form_no_circle():
    """generation, rewards and metrics share a floor; what one takes from another goes one way."""
    taken = {
        (room_of(name_of(path)), room_of(name.removeprefix("rest_jax.")))
        for path in MODULES
        for name in imports_of(path)
        if name.startswith("rest_jax.")
    }
    acts = {(a, b) for a, b in taken if FLOORS.get(a) == FLOORS.get(b) == 4 and a != b}
    assert not [pair for pair in acts if pair[::-1] in acts]


@pytest.mark.parametrize("package", sorted(ALONE))
def test_one_module_knows_a_framework(package):
    users = {
        name_of(path) for path in MODULES if any(name.split(".")[0] == package for name in imports_of(path))
    }
    assert users <= ALONE[package]


@pytest.mark.parametrize("name", ["policy.py", "reward.py"])
def test_losses_import_only_jax_and_the_ground_floor(name):
    allowed = {"__future__", "typing", "dataclasses", "math", "collections", "jax", "rest_jax"}
    imported = set(imports_of(ROOT / "rest_jax" / "objectives" / name))
    assert {full.split(".")[0] for full in imported} <= allowed
    ours = {full.split(".")[1] for full in imported if full.startswith("rest_jax.")}
    assert ours <= {"types", "errors", "objectives"}


def test_mathematics_knows_no_framework_but_jax():
    allowed = {*sys.stdlib_module_names, "jax", "numpy", "rest_jax"}
    imported = {name.split(".")[0] for path in mathematics() for name in imports_of(path)}
    assert imported <= allowed


def test_the_configuration_is_imported_by_the_program_alone():
    users = {name_of(path) for path in MODULES if any("rest_jax.gin_setup" in n for n in imports_of(path))}
    assert users == {"start.py"}


def calls_of(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_read_is_run(path):
    assert not [name for name in imports_of(path) if name.split(".")[0] in NEVER]
    for name, call in calls_of(path):
        assert name not in ("eval", "exec", "torch.load", "os.system", "yaml.load"), f"{path}:{call.lineno}"
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert keywords.get("shell", "False") == "False", f"{path}:{call.lineno} runs a shell"
        if name in ("np.load", "numpy.load", "np.save", "numpy.save", "np.savez"):
            assert keywords.get("allow_pickle") == "False", f"{path}:{call.lineno} could unpickle"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_rooms_stay_comfortable(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= FILE_LINES
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        assert node.end_lineno is not None
        assert node.end_lineno - node.lineno < FUNCTION_LINES, f"{node.name} is too long"
        given = [a for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls")]
        assert len(given) + len(node.args.kwonlyargs) <= ARGUMENTS, f"{node.name} takes too many arguments"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_what_it_is_and_its_floor_is_true(path):
    text = ast.get_docstring(tree_of(path)) or ""
    if path.name != "__init__.py":
        assert text, f"{name_of(path)} has no docstring"
    for line in text.splitlines():
        if line.startswith("Floor "):
            assert line.split()[1].strip(".,;:") == str(FLOORS[room_of(name_of(path))])


LIGHT = """
import sys
import rest_jax.main, rest_jax.doctor, rest_jax.generation.sampler, rest_jax.generation.scorer
import rest_jax.generation.translator, rest_jax.report.build
import rest_jax.rewards.learned, rest_jax.rewards.overlap
import rest_jax.phases.grow, rest_jax.phases.annotate, rest_jax.phases.improve, rest_jax.phases.evaluate
import rest_jax.phases.translate, rest_jax.phases.pretrain, rest_jax.phases.reward_model, rest_jax.gin_setup
heavy = {"tensorflow", "seqio", "t5", "torch", "tensorflow_datasets"} & set(sys.modules)
sys.exit(f"imported {sorted(heavy)}" if heavy else 0)
"""
HELP = """
import sys
from rest_jax import main
try:
    main.main(["--help"])
except SystemExit as end:
    assert end.code == 0
heavy = {"tensorflow", "seqio", "torch", "jax", "gin", "orbax", "plotly"} & set(sys.modules)
sys.exit(f"imported {sorted(heavy)}" if heavy else 0)
"""


@pytest.mark.parametrize("program", [LIGHT, HELP], ids=["all phases but vocab", "help"])
def test_tensorflow_stays_where_it_is_needed(program):
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
