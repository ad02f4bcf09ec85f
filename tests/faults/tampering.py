"""An attacker alters the run: every change is found, including changes of the manifest itself if there is a signature
or a recorded digest."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

from nayer_edge.errors import IntegrityError, NayerEdgeError
from nayer_edge.pipelines.trust.verification import examine, require_expected
from nayer_edge.storage.files import sha256_of, write_bytes
from nayer_edge.storage.run_folder import MANIFEST, SIGNATURE, Artifact, RunFolder

from . import processes
from .kit import Kit, Tally, files_of


def every_byte(kit: Kit, tries: int) -> Tally:
    """Flips every byte of every file of a small run in turn, including the manifest (against a recorded digest)."""
    tally, chance = Tally("one flipped byte"), kit.random("byte")
    run = _small_run(kit.room())
    noted = sha256_of(run.root / MANIFEST)
    places = [(path, place) for path in files_of(run.root) for place in range(path.stat().st_size)]
    chosen = places if tries >= len(places) else chance.sample(places, tries)
    for path, place in chosen:
        content = path.read_bytes()
        altered = bytearray(content)
        altered[place] ^= 1 << chance.randrange(8)
        path.write_bytes(bytes(altered))
        tally.count(_accepted(run.root, noted), f"{path.name}, byte {place}")
        path.write_bytes(content)
    tally.note = f"all {len(places)} bytes" if len(chosen) == len(places) else f"of {len(places)}"
    return tally


def _small_run(root: Path) -> RunFolder:
    run = RunFolder.create(root, {"name": "small"}, 3, {"python": "3"}, {"cpu": "x"})
    write_bytes(run.path("a/first.bin"), bytes(range(64)))
    write_bytes(run.path("empty"), b"")
    first = Artifact("teacher", {"teacher": "a/first.bin", "nothing": "empty"}, {"parameters": 3})
    run.record(first, digest="0" * 64, settings={}, parents=[], seconds=1, finished="now")
    write_bytes(run.path("b/second.bin"), b"second" * 9)
    second = Artifact("lte", {"lte": "b/second.bin"}, {})
    run.record(second, digest="1" * 64, settings={}, parents=[first], seconds=1, finished="now")
    return run


def _accepted(root: Path, noted: str) -> str:
    try:
        found = examine(RunFolder.open(root))
        require_expected(found, noted)
    except NayerEdgeError:
        return ""
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return "" if found.problems else "it was accepted"


def altered_folder(kit: Kit, tries: int) -> Tally:
    """Files altered, cut, extended, emptied, swapped, removed, added or replaced by links; `verify` and `gate`."""
    tally, chance = Tally("an altered, missing or added file"), kit.random("altered")
    root = kit.copy()
    for _ in range(tries):
        what, undo = _alter(root, chance)
        answers = [processes.run("verify", root)]
        if not what.startswith(("added", "named")):
            answers.append(processes.run("gate", root))
        tally.count(next((wrong for answer in answers if (wrong := answer.wrong(4))), ""), what)
        undo()
    tally.count(processes.run("verify", root).wrong(0), "undone")
    return tally


def _alter(root: Path, chance: random.Random):
    """Alters a run; returns a description, and a function that undoes it."""
    names = sorted(RunFolder.open(root).manifest.files)
    name = chance.choice(names)
    path = root / name
    content = path.read_bytes()

    def write_back() -> None:
        if path.is_symlink():
            path.unlink()
        path.write_bytes(content)

    how = chance.choice(("flipped", "cut", "longer", "empty", "missing", "swapped", "link", "added", "named", "folder"))
    if how == "flipped":
        altered = bytearray(content)
        altered[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(bytes(altered))
    elif how == "cut":
        path.write_bytes(content[: chance.randrange(len(content))])
    elif how == "longer":
        path.write_bytes(content + b"\0")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "missing":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()
        return f"{how} {name}", lambda: (path.rmdir(), write_back())
    elif how == "swapped":
        other = root / chance.choice([n for n in names if n != name])
        path.write_bytes(other.read_bytes())
    elif how == "link":
        # To a file with the same bytes outside the folder.
        elsewhere = root.parent / "elsewhere"
        elsewhere.write_bytes(content)
        path.unlink()
        path.symlink_to(elsewhere)
    else:
        added = root / chance.choice(
            ("extra.onnx", "export/extra.so", "student/.hidden", "validate/x\ny", "gate/\x1b[2J", "a/b/c")
        )
        if how == "named":
            # With the name of an unfinished write, in a place where there are none.
            added = root / "export" / ".evil.so.ab12cd34.tmp"
        added.parent.mkdir(exist_ok=True, parents=True)
        added.write_bytes(b"x")

        def remove() -> None:
            added.unlink()
            for folder in (added.parent, added.parent.parent):
                if folder != root and not any(folder.iterdir()):
                    folder.rmdir()

        return f"{how} {added.name!r}", remove
    return f"{how} {name}", write_back


def signatures(kit: Kit, tries: int) -> Tally:
    """Another key, an altered or missing signature, and altered files with a matching manifest."""
    tally, chance = Tally("a signed run, altered with its manifest"), kit.random("signature")
    root, keys = kit.copy(), kit.room()
    keys.mkdir()
    mine, other = make_keys(keys, "mine"), make_keys(keys, "other")
    tally.count(processes.run("sign", root, "--key", mine[0]).wrong(0), "signing")
    tally.count(processes.run("verify", root, "--key", mine[1]).wrong(0), "the right key")
    tally.count(processes.run("verify", root, "--key", other[1]).wrong(4), "another key")
    signature = (root / SIGNATURE).read_bytes()
    manifest = (root / MANIFEST).read_bytes()
    for number in range(tries):
        what, key = "", mine[1]
        if number % 4 == 0:
            altered = bytearray(signature)
            # In the bundle's content: changing JSON white space has no effect.
            place = chance.choice([i for i, byte in enumerate(altered) if chr(byte).isalnum()])
            altered[place] = ord(chance.choice([c for c in "abcdefXYZ0123" if ord(c) != altered[place]]))
            (root / SIGNATURE).write_bytes(bytes(altered))
            what = f"byte {place} of the signature"
        elif number % 4 == 1:
            (root / SIGNATURE).unlink()
            what = "no signature"
        elif number % 4 == 2:
            what = _alter_and_record(root, chance)
        else:
            values = json.loads(manifest)
            values["seed"] = chance.randrange(1, 2**31)
            (root / MANIFEST).write_text(json.dumps(values, indent=2))
            what = "another seed in the manifest"
        kept = {path: path.read_bytes() for path in files_of(kit.finished)}
        tally.count(_holds(root, key), what)
        for path, content in kept.items():
            (root / path.relative_to(kit.finished)).write_bytes(content)
        (root / MANIFEST).write_bytes(manifest)
        (root / SIGNATURE).write_bytes(signature)
    tally.count(processes.run("verify", root, "--key", mine[1]).wrong(0), "undone")
    return tally


def _holds(root: Path, key: Path) -> str:
    """In this process: whether a signature is valid although something was altered."""
    from nayer_edge.pipelines.trust.signing import require_signed

    try:
        run = RunFolder.open(root)
        if examine(run).problems:
            return ""
        require_signed(run, key)
    except IntegrityError:
        return ""
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return "it was accepted"


def _alter_and_record(root: Path, chance: random.Random) -> str:
    """Alters a file and its manifest entry, as an attacker would; only a signature reveals it."""
    values = json.loads((root / MANIFEST).read_text())
    name = chance.choice(sorted(values["files"]))
    path = root / name
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1
    path.write_bytes(bytes(content))
    values["files"][name]["sha256"] = sha256_of(path)
    (root / MANIFEST).write_text(json.dumps(values, indent=2))
    return f"{name} and the manifest"


def make_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """A pair of elliptic-curve keys in the format of `openssl`: private, public."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(form.Encoding.PEM, form.PrivateFormat.TraditionalOpenSSL, form.NoEncryption())
    )
    public.write_bytes(key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo))
    return private, public


NAMES = (
    "../outside", "a/../../outside", "/etc/hostname", "//etc/hostname", "student/../../../etc/hostname", "a\0b",
    "..\\outside", "C:\\x", "x" * 300, "/".join(["d"] * 3000), "\ud800", "", ".", "..", "a\nb", "\x1b[2Jx",
    "~/.bashrc", "$HOME/x", "con\u202egpj.exe", "x/" * 500 + "y", "%2e%2e/outside", "file:///etc/hostname",
)  # fmt: skip


def hostile_paths(kit: Kit, tries: int) -> Tally:
    """Manifests with paths outside the folder, and folders that contain links, pipes or sockets."""
    tally, chance = Tally("paths and links that lead outside"), kit.random("paths")
    canary = kit.folder / "outside"
    for number in range(tries):
        root = kit.copy()
        canary.write_text("mine")
        files = json.loads((root / MANIFEST).read_text())
        old = chance.choice(sorted(files["files"]))
        if number % 2 == 0:
            name = NAMES[(number // 2) % len(NAMES)]
            files["files"][name] = files["files"].pop(old)
            (root / MANIFEST).write_text(json.dumps(files))
            what = f"{old} named {name[:40]!r}"
        else:
            what = _divert(root, canary, chance)
        commands = [["verify", root], ["gate", root], ["report", root], ["run", kit.recipe, "--out", root]]
        command = commands[(number // 2) % len(commands)] if number % 3 else commands[0]
        outcome = processes.run(*command, timeout=30)
        # The gate only reads, and takes no lock.
        wrong = outcome.wrong(4, 2, *((0, 1) if (command[0], what) == ("gate", "lock") else ()))
        if not wrong and canary.read_text() != "mine":
            wrong = "a file outside was changed"
        if not wrong and (kit.folder / "made outside").exists():
            wrong = "a file outside was made"
        tally.count(wrong, f"{command[0]}, {what}")
        shutil.rmtree(root, ignore_errors=True)
    return tally


def _divert(root: Path, canary: Path, chance: random.Random) -> str:
    """Replaces a part of a run folder by something that points elsewhere or never ends."""
    how = chance.choice(("file", "folder", "pipe", "lock", "manifest", "circle", "device"))
    path = root / "student" / "student.safetensors"
    if how == "folder":
        shutil.move(root / "student", root.parent / "student")
        (root / "student").symlink_to(root.parent / "student")
    elif how == "lock":
        # A missing lock file is created; through a link it would be created outside.
        (root / ".lock").unlink(missing_ok=True)
        (root / ".lock").symlink_to(canary.parent / "made outside")
    elif how == "manifest":
        shutil.move(root / MANIFEST, root.parent / MANIFEST)
        (root / MANIFEST).symlink_to(root.parent / MANIFEST)
    else:
        path.unlink()
        if how == "file":
            path.symlink_to(canary)
        elif how == "pipe":
            os.mkfifo(path)
        elif how == "circle":
            path.symlink_to(path.name)
        else:
            path.symlink_to("/dev/zero")
    return how
