"""Properties of the source code: imports point one way, the gate imports nothing heavy, nothing is unpickled."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from nayer_edge.pipelines.recipes.schema import Recipe
from nayer_edge.pipelines.steps import NAMES, STEPS

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"nayer_edge": "nayer_edge", "export": "nayer_edge.export", "pipelines": "nayer_edge.pipelines"}
LAYERS = ("nayer_edge", "export", "pipelines")
BASE_INSTALL = {"typer", "rich", "pydantic", "tomli_w"}
ENTRY_POINTS = {"nayer_edge": "nayer_edge.pipelines.api", "nayer_edge.__main__": "nayer_edge.pipelines.cli"}
"""modules of the core that import the pipelines, inside functions only"""


@dataclass(frozen=True)
class Import:
    """One import statement: the absolute module, and how it was written."""

    module: str
    names: tuple[str, ...]
    level: int
    line: int
    lazy: bool
    """inside a function, or only for type checkers"""
    typing: bool
    """only for type checkers"""


def module_of(path: Path) -> str:
    """The import name of a source file."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[folder], *(part for part in rest if part != "__init__")])


SOURCES = {module_of(path): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}
MODULES = sorted(SOURCES)


@functools.cache
def tree_of(module: str) -> ast.Module:
    """Its parsed source. Not all at the top: every worker collects this file, and few of them run its tests."""
    return ast.parse(SOURCES[module].read_text(encoding="utf-8"), str(SOURCES[module]))


def layer_of(module: str) -> str:
    for layer in ("export", "pipelines"):
        if module == FOLDERS[layer] or module.startswith(FOLDERS[layer] + "."):
            return layer
    return "nayer_edge"


def imports_of(module: str) -> Iterator[Import]:
    package = module if SOURCES[module].name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST, lazy: bool, typing: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, (), 0, child.lineno, lazy, typing)
            elif isinstance(child, ast.ImportFrom):
                base = package.rsplit(".", child.level - 1)[0] if child.level else ""
                name = ".".join(part for part in (base, child.module) if part)
                yield Import(name, tuple(alias.name for alias in child.names), child.level, child.lineno, lazy, typing)
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                checking = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
                yield from visit(child, lazy or function or checking, typing or checking)

    yield from visit(tree_of(module), False, False)


def project_modules(found: Import) -> set[str]:
    """The project's modules that an import loads: the named module, named submodules, and their packages."""
    named = {found.module, *(f"{found.module}.{name}" for name in found.names)} & SOURCES.keys()
    return named | {parent for name in named for parent in parents(name)}


def parents(module: str) -> Iterator[str]:
    while "." in module:
        module = module.rpartition(".")[0]
        yield module


def reached(start: str, *, lazy: bool) -> set[str]:
    """The project's modules that importing one loads transitively, with or without imports inside functions."""
    seen: set[str] = set()
    waiting = {start, *parents(start)}
    while waiting:
        module = waiting.pop()
        seen.add(module)
        for found in imports_of(module):
            # Whoever imports a module of the core does not go through the front door.
            if not found.lazy or (lazy and module != "nayer_edge"):
                waiting |= project_modules(found) - seen
    return seen


def third_party(modules: set[str], *, lazy: bool) -> set[str]:
    tops = {
        found.module.partition(".")[0]
        for module in modules
        for found in imports_of(module)
        if found.level == 0 and (lazy or not found.lazy)
    }
    return tops - set(sys.stdlib_module_names) - {"nayer_edge"}


def test_sources_are_found() -> None:
    assert len(SOURCES) > 40
    assert {layer_of(module) for module in MODULES} == set(LAYERS)


def at(module: str, line: int) -> str:
    """Where something was found, as editors understand it."""
    return f"{SOURCES[module].relative_to(ROOT)}:{line}"


def test_imports_point_one_way() -> None:
    assert not [
        f"{at(module, found.line)} imports {target}"
        for module in MODULES
        if module not in ENTRY_POINTS
        for found in imports_of(module)
        for target in sorted(project_modules(found) - set(parents(module)))
        if LAYERS.index(layer_of(target)) > LAYERS.index(layer_of(module))
    ]


@pytest.mark.parametrize("module", ENTRY_POINTS)
def test_the_entry_points_are_the_only_exceptions(module: str) -> None:
    above = [
        (found, target)
        for found in imports_of(module)
        for target in project_modules(found) - set(parents(module)) - {"nayer_edge.pipelines"}
        if layer_of(target) != "nayer_edge"
    ]
    assert {target for _, target in above} == {ENTRY_POINTS[module]}
    assert all(found.lazy for found, _ in above)


def wrongly_written(module: str, found: Import) -> str:
    """What is wrong with the form of an import of the project's own; empty where nothing is."""
    within, of_core = layer_of(module), layer_of(module) == "nayer_edge"
    if found.level == 0:
        sibling = project_modules(found) and not of_core and layer_of(found.module) == within
        return "a sibling, write it relatively" if sibling else ""
    if not project_modules(found):
        return f"{found.module} does not exist"
    return "the core, absolutely" if layer_of(found.module) == "nayer_edge" and not of_core else ""


def test_siblings_relatively_and_the_core_absolutely() -> None:
    """The one form that editors and type checkers follow although the folders are mapped."""
    assert not [
        f"{at(module, found.line)}: {wrong}"
        for module in MODULES
        for found in imports_of(module)
        if (wrong := wrongly_written(module, found))
    ]


def test_no_module_imports_itself_in_a_circle() -> None:
    """Not even by imports inside functions; only type checkers may see a circle."""
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path[path.index(module) :], module))
        if module in done:
            return
        for found in imports_of(module):
            # The front door, which every module of the core passes, loads names of pipelines/ when they are asked for.
            if not found.typing and module != "nayer_edge":
                for target in project_modules(found) - set(parents(module)) - {module}:
                    walk(target, (*path, module))
        done.add(module)

    for module in MODULES:
        walk(module, ())


@pytest.mark.parametrize("house", FOLDERS)
def test_no_room_imports_itself_in_a_circle(house: str) -> None:
    """The files of a top folder, and each of its folders as a whole."""

    def room_of(module: str) -> str:
        return SOURCES[module].relative_to(ROOT / house).parts[0]

    inside = {module for module in MODULES if SOURCES[module].is_relative_to(ROOT / house)} - {"nayer_edge"}
    rooms = TopologicalSorter(dict.fromkeys(map(room_of, inside), ()))
    for module in inside:
        for found in imports_of(module):
            named = {found.module, *(f"{found.module}.{name}" for name in found.names)} & inside
            for target in () if found.typing else named:
                if room_of(target) != room_of(module):
                    rooms.add(room_of(module), room_of(target))
    rooms.prepare()


@pytest.mark.parametrize(
    "module",
    [
        "nayer_edge.__main__",
        *(
            f"nayer_edge.pipelines.{name}"
            for name in ("cli", "api", "actions", "gate.verdict", "recipes.loading", "doctor", "steps")
        ),
    ],
)
def test_the_light_path_needs_the_base_install_only(module: str) -> None:
    modules = reached(module, lazy=False)
    assert third_party(modules, lazy=False) <= BASE_INSTALL


def test_the_gate_is_light_to_the_last_function() -> None:
    """No heavy import inside functions either: `gate` runs on CI servers."""
    modules = reached("nayer_edge.pipelines.gate.verdict", lazy=True)
    assert third_party(modules, lazy=True) <= BASE_INSTALL


def test_distillation_takes_no_data_set() -> None:
    modules = reached("nayer_edge.distillation", lazy=True)
    assert "nayer_edge.synthesis" in modules, "the search follows imports"
    readers = {f"nayer_edge.data.{name}" for name in ("datasets", "arrays", "pictures", "stream")}
    assert readers <= SOURCES.keys()
    assert not readers & modules
    assert "nayer_edge.train_teacher" not in modules
    assert not third_party(modules, lazy=True) & {"sklearn", "pyarrow", "PIL", "datasets"}


@pytest.mark.slow
def test_distillation_runs_where_no_data_set_can_be_loaded(tiny_run: Path) -> None:
    program = """
import sys
from pathlib import Path

BLOCKED = (
    *("nayer_edge.data.datasets", "nayer_edge.train_teacher", "nayer_edge.pipelines"),
    *("sklearn", "torchvision", "pyarrow", "PIL", "datasets"),
)

sys.modules.update(dict.fromkeys(BLOCKED))  # importing any of them fails
root = Path(sys.argv[1])
opened = set()
sys.addaudithook(lambda event, args: opened.add(str(args[0])) if event == "open" else None)

from nayer_edge.labels import embeddings as lte
from nayer_edge.runtime import compute
from nayer_edge.storage.run_folder import RunFolder
from nayer_edge.runtime.compute import random_stream, seeded
from nayer_edge.config import Distill, Generator, Synthesis
from nayer_edge.distillation import Distillation, Settings, distill
from nayer_edge.models.load import build_classifier, load_classifier

recipe = RunFolder.open(root).manifest.recipe
teacher = load_classifier(root / "teacher" / "teacher.safetensors")
embeddings = lte.load(root / "lte.safetensors")
with seeded(random_stream(recipe["seed"], "student").initial_seed()):
    student = build_classifier(recipe["student"]["model"], teacher.spec, teacher.classes)
parts = [kind.model_validate(recipe[kind.__name__.lower()]) for kind in (Generator, Synthesis, Distill)]
settings = Settings(*parts, recipe["seed"])
made = distill(Distillation(teacher, embeddings, student, settings, compute.choose("cpu", recipe["precision"])))
wanted = load_classifier(root / "student" / "student.safetensors").state_dict()
assert all((value == made.state_dict()[name]).all() for name, value in wanted.items()), "another student"
inside = {name for name in opened if name.startswith(str(root))}
allowed = ("manifest.json", "teacher.safetensors", "teacher.json", "lte.safetensors", "student.safetensors",
           "student.json")
assert all(name.endswith(allowed) for name in inside), inside
print("done")
"""
    done = subprocess.run([sys.executable, "-c", program, str(tiny_run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
    done = subprocess.run(
        [sys.executable, "-c", program.split("root =")[0] + "import nayer_edge.data.datasets"],
        text=True,
        capture_output=True,
    )
    assert "ModuleNotFoundError" in done.stderr, "the import block works"


# The step table


def test_the_step_table_is_consistent() -> None:
    keys = {field.alias or name for name, field in Recipe.model_fields.items()}
    for number, step in enumerate(STEPS):
        assert set(step.inputs) <= set(NAMES[:number]), step.name
        module, _, function = step.function.partition(":")
        tree = tree_of(f"nayer_edge.pipelines.{module}")
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, step.function
        assert {key.split(".")[0] for key in step.settings} <= keys, step.name


# Forbidden calls


def calls(module: str) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keywords(call: ast.Call) -> dict[str, str]:
    return {keyword.arg or "**": ast.unparse(keyword.value) for keyword in call.keywords}


FORBIDDEN = {"eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "yaml.load", "joblib.load"}
PICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


def unsafe(name: str, call: ast.Call) -> bool:
    """Whether a call runs what it reads, or hands it to a shell."""
    given = keywords(call)
    return (
        name in FORBIDDEN
        or (name == "torch.load" and given.get("weights_only") != "True")
        or ((name.endswith("np.load") or name == "numpy.load") and given.get("allow_pickle") != "False")
        or any(given.get(key, "False") != "False" for key in ("shell", "trust_remote_code", "allow_pickle"))
        or given.get("weights_only", "True") != "True"
    )


def test_nothing_is_unpickled_or_handed_to_a_shell() -> None:
    assert not [
        f"{at(module, call.lineno)}: {ast.unparse(call)[:80]}"
        for module in MODULES
        for name, call in calls(module)
        if unsafe(name, call)
    ]
    assert not [
        f"{at(module, found.line)} imports {found.module}"
        for module in MODULES
        for found in imports_of(module)
        if found.module.partition(".")[0] in PICKLING
    ]


@pytest.mark.parametrize(
    "line",
    [
        "eval(text)",
        "pickle.load(file)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(command, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=trusted)",
    ],
)
def test_the_audit_sees_an_unsafe_call(line: str) -> None:
    call = ast.parse(line, mode="eval").body
    assert isinstance(call, ast.Call)
    assert unsafe(ast.unparse(call.func), call)


def test_options_in_dictionaries_trust_no_remote_code() -> None:
    assert not [
        f"{at(module, node.lineno)}: {key.value} = {ast.unparse(value)}"
        for module in MODULES
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant)
        and key.value in ("trust_remote_code", "shell", "allow_pickle")
        and ast.unparse(value) != "False"
    ]


def test_every_module_says_what_it_is() -> None:
    """It begins with a docstring whose first paragraph is a sentence."""
    assert not [
        at(module, 1)
        for module in MODULES
        if (tree_of(module).body or SOURCES[module].name != "__init__.py")
        and not (ast.get_docstring(tree_of(module)) or "").split("\n\n")[0].rstrip().endswith((".", ":"))
    ]


def test_public_functions_have_docstrings() -> None:
    assert not [
        f"{at(module, node.lineno)}: {node.name}"
        for module in MODULES
        for node in tree_of(module).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]


def test_no_vague_module_names() -> None:
    assert not {"utils", "util", "helpers", "misc", "common"} & {module.rpartition(".")[2] for module in MODULES}


def test_no_folder_is_crowded() -> None:
    """About fifteen files at one level are what a reader takes in at a glance."""
    folders = [ROOT / name for name in (*FOLDERS, "tests")]
    inner = (path for folder in folders for path in folder.rglob("*") if path.is_dir())
    folders = [*folders, *(path for path in inner if path.name != "__pycache__")]
    files = {folder: [path for path in folder.iterdir() if path.is_file()] for folder in folders}
    assert not {folder: len(found) for folder, found in files.items() if len(found) > 17}
