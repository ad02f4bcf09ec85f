"""Every write of the product goes through `write_atomic`: temporary file, fsync, rename."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for folder in ("nayer_edge", "export", "pipelines") for path in (ROOT / folder).rglob("*.py"))

SANCTIONED = {
    # The only place that passes a temporary file to `write`.
    ("nayer_edge/storage/files.py", "write_bytes"): "`temporary.write_bytes`, inside write_atomic",
    ("nayer_edge/storage/files.py", "write_atomic"): "opens the temporary file to fsync it",
    ("nayer_edge/storage/files.py", "link_or_copy"): "a further name of a file that is complete",
    ("nayer_edge/storage/run_folder.py", "lock_folder"): "the lock, which holds nothing",
    ("nayer_edge/labels/embeddings.py", "_locked"): "the lock of the cache, which holds nothing",
    ("nayer_edge/storage/tensors.py", "_sort_header"): "of the temporary file, inside write_atomic",
    ("export/to_int8.py", "prepared"): "in a folder for temporary files",
    ("export/runtimes/edge_file.py", "quiet"): "standard error, which is no file of a run",
    ("pipelines/sweep/workers.py", "_started"): "what a process prints, in a folder for temporary files",
    ("pipelines/cli/__init__.py", "main"): "standard output that nobody reads any more goes to os.devnull",
    ("pipelines/gate/verdict.py", "append_summary"): "GitHub's summary is added to, as its contract says",
}
"""(file, function) → why it may write; functions with a parameter `temporary` are called by write_atomic"""

METHODS = {"write_text", "write_bytes", "savez", "savez_compressed", "save_file", "savefig", "tofile", "to_parquet"}
FUNCTIONS = {"np.save", "onnx.save", "onnx.save_model", "torch.save", "json.dump", "shutil.copy", "shutil.copyfile",
             "shutil.copytree", "shutil.move", "os.link", "os.rename", "os.replace", "os.open",
             "os.fdopen"}  # fmt: skip


def functions(tree: ast.AST, inside: tuple[ast.AST, ...] = ()) -> Iterator[tuple[ast.Call, tuple[ast.AST, ...]]]:
    """Every call, with its enclosing functions, innermost last."""
    for child in ast.iter_child_nodes(tree):
        around = (*inside, child) if isinstance(child, ast.FunctionDef | ast.Lambda) else inside
        if isinstance(child, ast.Call):
            yield child, around
        yield from functions(child, around)


def writes(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    last = name.rpartition(".")[2]
    if last == "open":
        mode = next((k.value for k in call.keywords if k.arg == "mode"), None)
        positional = call.args[1:2] if name == "open" else call.args[:1]
        chosen = mode or (positional[0] if positional else None)
        return (
            isinstance(chosen, ast.Constant) and isinstance(chosen.value, str) and bool(set("wax+") & set(chosen.value))
        )
    # The project's own write_bytes(path, data) is atomic.
    own = isinstance(call.func, ast.Name) and last == "write_bytes"
    return (
        (last in METHODS and not own)
        or name in FUNCTIONS
        or (name.startswith("zipfile.ZipFile") and len(call.args) > 1)
    )


def into_memory_or_temporary(call: ast.Call, around: tuple[ast.AST, ...]) -> bool:
    """Whether the target is a buffer, or the temporary file from write_atomic."""
    names = {node.id for node in ast.walk(call) if isinstance(node, ast.Name)}
    parameters = {a.arg for f in around if isinstance(f, ast.FunctionDef | ast.Lambda) for a in f.args.args}
    return "buffer" in names or ("temporary" in parameters)


def unsanctioned(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for call, around in functions(tree):
        outer = next((f.name for f in around if isinstance(f, ast.FunctionDef)), "")
        where = path.relative_to(ROOT).as_posix(), outer
        scratch = any(
            isinstance(node, ast.With) and "TemporaryDirectory" in ast.unparse(node.items[0].context_expr)
            for f in around
            for node in ast.walk(f)
        )
        if writes(call) and where not in SANCTIONED and not scratch and not into_memory_or_temporary(call, around):
            found.append(f"{where[0]}:{call.lineno}: {ast.unparse(call)[:90]}")
    return found


def test_every_write_is_atomic() -> None:
    assert len(SOURCES) > 40
    assert not [write for path in SOURCES for write in unsanctioned(path)]


@pytest.mark.parametrize(
    "line",
    [
        "open(p, 'w').write(x)",
        "p.open('wb').write(x)",
        "p.open(mode='a')",
        "p.write_text('x')",
        "p.write_bytes(b'x')",
        "np.save(p, x)",
        "onnx.save(m, p)",
        "save_file(t, p)",
        "shutil.copy(a, b)",
        "figure.savefig(p)",
    ],
)
def test_the_audit_sees_a_write(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "module.py"
    path.write_text(f"def f(p, x, a, b, m, t, figure):\n    {line}\n")
    assert len(unsanctioned(path)) == 1


def test_sanctioned_functions_exist() -> None:
    for file, function in SANCTIONED:
        names = {n.name for n in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(n, ast.FunctionDef)}
        assert function in names
