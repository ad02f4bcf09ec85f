"""Malicious files: none may run code, hang, use unbounded memory, or cause a traceback."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
import struct
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nayer_edge.storage.files import sha256_of, write_json
from nayer_edge.storage.run_folder import MANIFEST, RunFolder

from . import processes
from .kit import Kit, Tally
from .resource_errors import limit_memory

MEMORY = 768 * 2**20
"""bytes that a command may allocate: several times what the run needs"""
SECONDS = 30.0


def read(*command: str | Path) -> processes.Outcome:
    """Runs a command with bounded memory and time."""
    return processes.run(*command, timeout=SECONDS, before=lambda: limit_memory(MEMORY))


class Evil:
    """Executes a call when unpickled."""

    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call, self.arguments


def _evil(canary: Path, number: int) -> object:
    """One of several ways to create a file when unpickled, at one of several places in a state dict."""
    import subprocess

    calls = (
        (os.system, f"touch {canary}"),
        (eval, f"open({str(canary)!r}, 'w')"),
        (exec, f"open({str(canary)!r}, 'w')"),
        (subprocess.check_output, ["touch", str(canary)]),
        (open, str(canary), "w"),
        (os.mkdir, str(canary)),
        (Path(canary).touch,),
        (getattr, __import__("os"), "system"),
    )
    evil = Evil(*calls[number % len(calls)])
    places: tuple[Callable[[], object], ...] = (
        lambda: evil,
        lambda: {"state_dict": evil},
        lambda: {"weight": evil, "bias": np.zeros(3)},
        lambda: [evil, {}],
        lambda: {evil.arguments[0] if evil.arguments else "x": evil},
    )
    return places[number % len(places)]()


def pickles(kit: Kit, tries: int) -> Tally:
    """Teacher weights as pickles that run code: plain, in torch's zip format, and with other file extensions."""
    import torch

    tally = Tally("pickles that run code")
    folder = kit.room()
    folder.mkdir()
    for number in range(tries):
        canary, suffix = folder / f"executed{number}", (".pt", ".pth", ".bin", ".safetensors", ".npz", ".npy")
        path = folder / f"weights{number}{suffix[number % len(suffix)]}"
        try:
            content = pickle.dumps(_evil(canary, number), protocol=number % 6)
        except (pickle.PicklingError, TypeError):
            content = pickle.dumps(Evil(os.system, f"touch {canary}"))
        if number % 3 == 0:
            path.write_bytes(content)
        elif number % 3 == 1:
            torch.save(_simple(canary, number), path, _use_new_zipfile_serialization=number % 2 == 0)
        else:
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("archive/data.pkl", content)
                archive.writestr("archive/version", "3\n")
                archive.writestr("images.npy", content)
        if suffix[number % len(suffix)] in (".npz", ".npy"):
            command = ["validate", kit.copy(), "--data", path]
            outcome = read(*command)
        else:
            outcome = read("run", _teacher(kit, path), "--out", kit.room(), "--until", "teacher")
        wrong = outcome.wrong(2, 4)
        tally.count("code was executed" if canary.exists() else wrong, path.name)
    return tally


def _simple(canary: Path, number: int) -> object:
    evil = Evil(os.system, f"touch {canary}")
    return {"state_dict": evil} if number % 2 else {"conv.weight": evil}


def _teacher(kit: Kit, weights: Path) -> Path:
    """The tiny recipe with a teacher from a file."""
    head, _, rest = kit.recipe.read_text(encoding="utf-8").partition("[teach]")
    _, _, rest = rest.partition("[lte]")
    path = kit.room().with_suffix(".toml")
    model = 'model = "nayer:wrn_10_1"\n'
    path.write_text(head.replace(model, f'{model}weights = "{weights}"\n') + "[lte]" + rest, encoding="utf-8")
    return path


def safetensors_headers() -> list[tuple[str, bytes]]:
    """Files with absurd headers."""

    def file(header: object, data: bytes = b"\0" * 64, length: int | None = None) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    def tensor(**changes: object) -> dict[str, object]:
        return {"embeddings": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64], **changes}}

    return [
        ("length 2^63", file(tensor(), length=2**63)),
        ("length 2^64 - 1", file(tensor(), length=2**64 - 1)),
        ("length 100 MB, file short", file(tensor(), length=100 * 2**20)),
        ("a header of 100 MB", file(b'{"a":"' + b"x" * (100 * 2**20) + b'"}')),
        ("a header of 20 MB of keys", file({f"k{i}": 0 for i in range(1_500_000)})),
        ("overlapping offsets", file({"a": tensor()["embeddings"], "b": tensor(data_offsets=[32, 96])["embeddings"]})),
        ("offsets beyond the end", file(tensor(data_offsets=[0, 2**40]))),
        ("offsets backwards", file(tensor(data_offsets=[64, 0]))),
        ("negative offsets", file(tensor(data_offsets=[-64, 0]))),
        ("NaN in the shape", file(b'{"embeddings":{"dtype":"F32","shape":[NaN,4],"data_offsets":[0,64]}}')),
        ("negative shape", file(tensor(shape=[-4, -4]))),
        ("shape that overflows", file(tensor(shape=[2**62, 4, 2**62]))),
        ("shape of 2^33 zeros bytes", file(tensor(shape=[0, 2**33], data_offsets=[0, 0]))),
        ("fractional shape", file(tensor(shape=[4.5, 4]))),
        ("shape is text", file(tensor(shape="44"))),
        ("unknown type", file(tensor(dtype="F7"))),
        ("no offsets", file({"embeddings": {"dtype": "F32", "shape": [4, 4]}})),
        ("a list", file([1, 2])),
        ("nested 100,000 deep", file(b'{"a":' * 100_000)),
        ("metadata of numbers", file({**tensor(), "__metadata__": {"labels": 3}})),
        ("metadata of lists", file({**tensor(), "__metadata__": [1]})),
        ("labels that are no JSON", file({**tensor(), "__metadata__": {"labels": "[", "encoder": "x"}})),
        ("labels nested deep", file({**tensor(), "__metadata__": {"labels": "[" * 100_000, "encoder": "x"}})),
        ("labels are a number", file({**tensor(), "__metadata__": dict.fromkeys(LTE_FACTS, "7")})),
        ("not UTF-8", file(b'{"\xff\xfe":0}')),
        ("doubled keys", file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', b"\0" * 4)),
        ("nothing", b""),
        ("seven bytes", b"1234567"),
        ("only a length", struct.pack("<Q", 8)),
        ("tensors without end", file({**tensor(), "b": {"dtype": "F32", "shape": [], "data_offsets": [64, 68]}})),
    ]


LTE_FACTS = ("labels", "encoder", "revision", "prompt")


def safetensors_files(kit: Kit, tries: int) -> Tally:
    """Such files as teacher weights, embeddings, the checkpoint of an interrupted run, and files of a finished run."""
    tally = Tally("safetensors with absurd headers")
    headers = safetensors_headers()
    folder = kit.room()
    folder.mkdir()
    for number in range(tries):
        what, content = headers[number % len(headers)]
        path = folder / "hostile.safetensors"
        path.write_bytes(content)
        place = (number + number // len(headers)) % 4
        if place == 0:
            outcome = read("run", _teacher(kit, path), "--out", kit.room(), "--until", "teacher")
        elif place == 1:
            outcome = read(*kit.run(kit.room()), "--set", f"lte.encoder={path}", "--until", "lte")
        elif place == 2:
            root = _until_student(kit)
            shutil.copy(path, root / "student" / "checkpoint.safetensors")
            outcome = read(*kit.run(root), "--until", "student")
        else:
            root = kit.copy()
            _replace(root, "teacher/teacher.safetensors", content)
            outcome = read("validate", root, "--synthetic")
        # A file that counts as empty but valid is no loss if it has no effect.
        tally.count(outcome.wrong(2, 4), f"{what}, place {place}")
    return tally


def _until_student(kit: Kit) -> Path:
    """A run that was interrupted before its first epoch."""
    root = kit.copy()
    run = RunFolder.open(root)
    for step in list(run.manifest.steps)[2:]:
        forgotten = run.forget(step)
        run.remove_leftovers(forgotten)
    return root


def _replace(root: Path, name: str, content: bytes) -> None:
    """Puts a file into a run, with a matching manifest, as an attacker would."""
    (root / name).write_bytes(content)
    values = json.loads((root / MANIFEST).read_text())
    values["files"][name].update(sha256=sha256_of(root / name), bytes=len(content))
    write_json(root / MANIFEST, values)


def onnx_files(kit: Kit, tries: int) -> Tally:
    """ONNX files that read outside the folder, nest deeply or state absurd sizes, with a matching manifest."""
    import onnx
    from onnx import TensorProto

    tally = Tally("ONNX that reads outside, or lies about sizes")
    good = (kit.finished / "export" / "student.fp32.onnx").read_bytes()
    secret = kit.folder / "secret.bin"
    secret.write_bytes(os.urandom(4096))

    def external(location: str, **more: str) -> bytes:
        model = onnx.load_model_from_string(good)
        tensor = next(t for t in model.graph.initializer if t.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, **more}.items():
            tensor.external_data.add(key=key, value=value)
        return model.SerializeToString()

    def deep() -> bytes:
        """A graph in a node's attribute in a graph …, written by hand, because protobuf's writer refuses this depth."""

        def field(number: int, content: bytes) -> bytes:
            size, head = len(content), bytes([number << 3 | 2])
            while size > 127:
                head += bytes([size & 127 | 128])
                size >>= 7
            return head + bytes([size]) + content

        graph = field(1, b"")
        for _ in range(2000):
            # GraphProto.node = 1, NodeProto.attribute = 5, AttributeProto.g = 6
            graph = field(1, field(5, field(6, graph)))
        # ModelProto.graph = 7
        return field(7, graph)

    def sized(dims: list[int]) -> bytes:
        model = onnx.load_model_from_string(good)
        tensor = next(t for t in model.graph.initializer if t.raw_data)
        del tensor.dims[:]
        tensor.dims.extend(dims)
        return model.SerializeToString()

    files: list[tuple[str, Callable[[], bytes]]] = [
        ("external data, absolute", lambda: external(str(secret))),
        ("external data, ../", lambda: external("../../../secret.bin")),
        ("external data, through a link", lambda: external("link.bin")),
        ("external data, /proc", lambda: external("/proc/self/environ")),
        ("external data, an endless device", lambda: external("/dev/zero", length=str(2**40))),
        ("external data, offset 2^62", lambda: external("student.fp32.onnx", offset=str(2**62))),
        ("external data, negative length", lambda: external("student.fp32.onnx", length="-5")),
        ("external data, no location", lambda: external("")),
        ("graphs in graphs", deep),
        ("a tensor of 2^60 elements", lambda: sized([2**30, 2**30])),
        ("a tensor of negative size", lambda: sized([-1, 2**40])),
        ("cut short", lambda: good[: len(good) // 2]),
        ("no ONNX", lambda: b"\x00" * 4096),
        ("nothing", lambda: b""),
    ]
    for number in range(tries):
        what, make = files[number % len(files)]
        root = kit.copy()
        (root / "export" / "link.bin").symlink_to(secret)
        _replace(root, "export/student.fp32.onnx", make())
        command = (
            ["validate", root, "--synthetic"],
            ["bench", root, "--runs", "2"],
            ["run", kit.recipe, "--out", root, "--until", "int8", "--set", "export.calibration_images=10"],
        )[(number // len(files) + number) % 3]
        tally.count(read(*command).wrong(4, 2), f"{what}, {command[0]}")
        shutil.rmtree(root)
    return tally


def _npy(shape: tuple[int, ...], dtype: str, data: bytes) -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def bombs(kit: Kit, tries: int) -> Tally:
    """Labelled images that unpack to far more than their file size, or state absurd sizes."""
    tally = Tally("zip bombs and images without end")
    folder = kit.room()
    folder.mkdir()
    labels = _npy((5,), "<i8", bytes(40))
    gigabytes = 3 * 2**30

    def packed(member: str, make: Callable[[Any], None]) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
                with archive.open(member, "w", force_zip64=True) as file:
                    make(file)
                archive.writestr("labels.npy", labels)

        return write

    def zeros(file: Any) -> None:
        header = _npy((gigabytes // 64, 8, 8), "|u1", b"")
        file.write(header)
        block = bytes(2**24)
        for _ in range(gigabytes // len(block)):
            file.write(block)

    def bitmap(width: int, height: int) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            from PIL import Image

            Image.MAX_IMAGE_PIXELS = None
            picture = path.with_suffix("") / "zero" / "a.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            Image.new("1", (width, height)).save(picture, "PNG")

        return write

    files: list[tuple[str, Callable[[Path], None]]] = [
        ("3 GiB of zeros", packed("images.npy", zeros)),
        ("a header of 2^60 images", packed("images.npy", lambda f: f.write(_npy((2**60, 8, 8), "|u1", b"")))),
        ("a shape that overflows", packed("images.npy", lambda f: f.write(_npy((2**40, 2**40, 8), "|u1", b"")))),
        ("negative shape", packed("images.npy", lambda f: f.write(_npy((-5, 8, 8), "|u1", bytes(320))))),
        ("objects", packed("images.npy", lambda f: f.write(_npy((5,), "|O", pickle.dumps([1]))))),
        ("a header of 60,000 brackets", packed("images.npy", lambda f: f.write(_npy((5,), "[" * 60_000, b"")))),
        ("an archive in itself", packed("images.npy", lambda f: f.write(b"PK\x03\x04" * 1000))),
        ("a picture of 400 million pixels", bitmap(20_000, 20_000)),
        ("a picture of 150 million pixels", bitmap(15_000, 10_000)),
    ]
    for number in range(tries):
        what, make = files[number % len(files)]
        path = folder / f"{number % len(files)}.npz"
        if not path.exists() and not path.with_suffix("").exists():
            make(path)
        data = path if path.exists() else path.with_suffix("")
        root = kit.copy()
        outcome = read("validate", root, "--data", data)
        tally.count(outcome.wrong(2) or kit.differs(root, whole=True), what)
        shutil.rmtree(root)
    return tally


NASTY = (
    "<script>alert(1)</script>", "\x1b[2J\x1b]0;owned\x07", "]]>&xxe;", "\"><img src=x onerror=alert(1)>", "../../../x",
    "::error title=x::y", "\u202egpj", "{{ 7*7 }}", "javascript:alert(1)", "\r\n::add-mask::x", "'; DROP TABLE x; --",
    "a\nb", "🎱", "$(touch owned)", "`touch owned`", "</title><svg onload=alert(1)>", "%s%n", "\x9b31m",
)  # fmt: skip


ACTING = re.compile(
    r"<script>alert|<img src=x|<svg onload|(?:href|src|action|data)\s*=\s*[\"']?\s*javascript:|\]\(javascript:"
)
"""active content in a page or in Markdown, which may appear there only as text"""


def class_names(kit: Kit, tries: int) -> Tally:
    """HTML, escape sequences, workflow commands and paths as class names: in the page, the terminal and JUnit."""
    tally, chance = Tally("HTML and escapes in class names"), kit.random("names")
    for _ in range(tries):
        names = chance.sample(NASTY, 3)
        recipe = kit.room().with_suffix(".toml")
        text = kit.recipe.read_text(encoding="utf-8")
        recipe.write_text(
            text.replace('["zero", "one", "two"]', json.dumps(names, ensure_ascii=False))
            + "\n[gate.per_class]\nmax_drop = 0.0\n"
            "advisory = false\n",
            encoding="utf-8",
        )
        root = kit.room()
        outcome = processes.run("run", recipe, "--out", root)
        wrong = outcome.wrong(0, 1) or _acts(outcome.out + outcome.err)
        if not wrong:
            wrong = _shown(kit, root, recipe)
        tally.count(wrong, repr(names))
        shutil.rmtree(root, ignore_errors=True)
    return tally


def _shown(kit: Kit, root: Path, recipe: Path) -> str:
    junit, summary, data = kit.room(), kit.room(), kit.room()
    with processes.environment(GITHUB_ACTIONS="true"):
        answers = [
            processes.run("gate", root, "--junit", junit, "--summary", summary),
            processes.run("lte", "show", recipe),
            processes.run("verify", root),
            processes.run("sbom", root),
            processes.run("calibration-data", root, "-n", "3", "--format", "png", "--out", data),
        ]
    for answer in answers:
        if wrong := answer.wrong(0, 1) or _acts(answer.out + answer.err):
            return wrong
    try:
        ET.parse(junit)
    except (ET.ParseError, OSError) as error:
        return f"JUnit: {error}"
    if found := [path for path in data.rglob("*") if not path.resolve().is_relative_to(data.resolve())]:
        return f"{found[0]} lies outside"
    page = (root / "report.html").read_text(encoding="utf-8")
    for text in (page, summary.read_text(encoding="utf-8")):
        if acting := ACTING.search(text):
            return f"{acting[0]} in the page"
    return _acts(page, page=True)


def _acts(text: str, *, page: bool = False) -> str:
    """The parts of a text that a terminal or a CI server would interpret."""
    for character in "\x1b\x07\x9b\u202e\x00":
        if character in text:
            return f"{character!r} is shown as it is"
    lines = [] if page else [line for line in text.splitlines() if line.startswith("::")]
    known = ("::error title=nayer-edge gate", "::warning title=nayer-edge gate")
    return next((f"a workflow command: {line}" for line in lines if not line.startswith(known)), "")


def random_values(chance: random.Random) -> object:
    """A random JSON value, a few levels deep, with numbers and texts that are difficult for readers."""
    leaves = (0, -1, 2**63, 1e308, -0.0, "", "\0", "\u202e", "x" * 500, True, None, [], {}, "..", "NaN", 1e-320)
    if chance.random() < 0.7:
        return chance.choice(leaves)
    if chance.random() < 0.5:
        return [random_values(chance) for _ in range(chance.randrange(4))]
    return {str(chance.choice(leaves)): random_values(chance) for _ in range(chance.randrange(4))}


def mutated_json(kit: Kit, tries: int) -> Tally:
    """Every JSON file of a run with values replaced and a matching manifest; readers must report it."""
    tally, chance = Tally("JSON files of a run with other values"), kit.random("json")
    names = [n for n in sorted(RunFolder.open(kit.finished).manifest.files) if n.endswith(".json")]
    for _ in range(tries):
        root, name = kit.copy(), chance.choice([*names, MANIFEST, "metrics.jsonl"])
        path = root / name
        if name == "metrics.jsonl":
            lines = path.read_text().splitlines()
            lines[chance.randrange(len(lines))] = json.dumps(random_values(chance))
            content = "\n".join(lines).encode()
        else:
            values = json.loads(path.read_text())
            _replace_somewhere(values, chance)
            content = json.dumps(values).encode()
        if name == MANIFEST:
            path.write_bytes(content)
        else:
            _replace(root, name, content)
        for command in (["verify", root], ["gate", root], ["sbom", root], ["report", root]):
            outcome = processes.run(*command, timeout=SECONDS)
            if wrong := outcome.wrong(0, 1, 2, 4, 130):
                break
        tally.count(wrong, f"{command[0]} of {name}")
        shutil.rmtree(root)
    return tally


def _replace_somewhere(values: Any, chance: random.Random) -> None:
    """Replaces one nested value."""
    place = values
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = chance.choice(keys)
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or chance.random() < 0.2:
            place[key] = random_values(chance)
            return
        place = inner
