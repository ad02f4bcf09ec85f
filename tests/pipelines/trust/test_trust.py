"""`verify`, `sign` and `sbom`: what was altered is found, what was interrupted is continued, and the bill is right."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nayer_edge.errors import IntegrityError, MissingError, UsageError
from nayer_edge.pipelines.steps import CHECKPOINT, STEPS
from nayer_edge.pipelines.trust.signing import PASSWORD_VARIABLE, require_signed, sign
from nayer_edge.pipelines.trust.verification import examine
from nayer_edge.storage.files import sha256_of, write_bytes
from nayer_edge.storage.run_folder import MANIFEST, SIGNATURE, Artifact, RunFolder

Invoke = Callable[..., object]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small run with two finished steps; nothing in it needs torch."""
    run = RunFolder.create(tmp_path / "a run", {"name": "small"}, 3, {"python": "3.12", "torch": "2.11"}, {"cpu": "x"})
    write_bytes(run.path("teacher/teacher.safetensors"), b"teacher")
    teacher = Artifact("teacher", {"teacher": "teacher/teacher.safetensors"}, {})
    run.record(teacher, digest="0" * 64, settings={}, parents=[], seconds=1, finished="2026-01-02T03:04:05+00:00")
    write_bytes(run.path("lte.safetensors"), b"embeddings")
    lte = Artifact("lte", {"lte": "lte.safetensors"}, {})
    run.record(lte, digest="1" * 64, settings={}, parents=[teacher], seconds=1, finished="2026-01-02T03:04:06+00:00")
    return run.root


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys as docs/SECURITY.md has them made: key.pem and key.pub, and a stranger's pair."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("key", "other"):
        openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", folder / f"{name}.pem")
        openssl("ec", "-in", folder / f"{name}.pem", "-pubout", "-out", folder / f"{name}.pub")
    return folder


# ------------------------------------------------------------------ verify


def test_the_manifests_digest_is_what_sha256sum_says(invoke, root: Path) -> None:  # type: ignore[no-untyped-def]
    answer = json.loads(invoke("verify", root, "--json").out)
    said = subprocess.run(["sha256sum", str(root / MANIFEST)], capture_output=True, text=True, check=True).stdout
    assert answer["manifest_sha256"] == said.split()[0]
    assert invoke("verify", root, "--expect", answer["manifest_sha256"].upper()).code == 0
    values = json.loads((root / MANIFEST).read_text())
    values["seed"] = 4
    (root / MANIFEST).write_text(json.dumps(values))
    assert invoke("verify", root).code == 0, "the manifest alone answers for nothing but the files"
    answer = invoke("verify", root, "--expect", answer["manifest_sha256"])
    assert answer.code == 4
    assert "not the expected one" in answer.err


def test_every_byte_counts(root: Path) -> None:
    noted = sha256_of(root / MANIFEST)
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for place in range(len(content)):
            path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            try:
                found = examine(RunFolder.open(root))
            except IntegrityError:
                continue
            assert found.problems or found.manifest_sha256 != noted, (path, place)
        path.write_bytes(content)
    assert examine(RunFolder.open(root)).problems == ()


def test_an_interrupted_run_is_not_called_altered(invoke, root: Path) -> None:  # type: ignore[no-untyped-def]
    for name in (CHECKPOINT, "metrics.jsonl", "student/student.json", "student/.student.json.ab12cd_9.tmp",
                 ".manifest.json.ab12cd_9.tmp"):  # fmt: skip
        write_bytes(root / name, b"half")
    answer = invoke("verify", root)
    assert answer.code == 130
    assert "interrupted in manifest, student" in answer.out
    assert f"type: nayer-edge run '{root}'" in answer.out
    assert "✗" not in answer.out
    found = json.loads(invoke("verify", root, "--json").out)
    assert found["problems"] == []
    assert found["unfinished"] == ["manifest", "student"]
    assert CHECKPOINT in found["left"]


@pytest.mark.parametrize(
    "name",
    ["student/evil.so", "student/deeper/student.json", "teacher/teacher.json",
      "report.html.tmp", ".evil.so.ab12cd_9.tmp",
     "export/x/student.int8.cpu.onnx", "checkpoint.safetensors", "metrics.jsonl/x"],
)  # fmt: skip
def test_what_no_interrupted_step_leaves_is_strange(invoke, root: Path, name: str) -> None:  # type: ignore[no-untyped-def]
    write_bytes(root / name, b"x")
    answer = invoke("verify", root)
    assert answer.code == 4
    assert f"{name} is not in the manifest" in answer.out


def test_links_are_strange_whatever_their_names(root: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"x")
    for name in ("metrics.jsonl", ".lock", SIGNATURE):
        (root / name).symlink_to(tmp_path / "elsewhere")
    assert {problem.split()[0] for problem in examine(RunFolder.open(root)).problems} == {
        "metrics.jsonl", ".lock", SIGNATURE
    }  # fmt: skip
    (root / "lte.safetensors").rename(root.parent / "lte")
    (root / "lte.safetensors").symlink_to(root.parent / "lte")
    with pytest.raises(IntegrityError, match="outside"):
        examine(RunFolder.open(root))


def test_a_manifest_that_is_a_link_is_refused(root: Path, tmp_path: Path) -> None:
    (root / MANIFEST).rename(tmp_path / "m.json")
    (root / MANIFEST).symlink_to(tmp_path / "m.json")
    with pytest.raises(IntegrityError, match="is a link"):
        RunFolder.open(root)


def test_a_lock_is_never_made_through_a_link(root: Path, tmp_path: Path) -> None:
    (root / ".lock").unlink(missing_ok=True)
    (root / ".lock").symlink_to(tmp_path / "made outside")
    with pytest.raises(UsageError, match="Cannot write"), RunFolder.open(root).locked():
        pass
    assert not (tmp_path / "made outside").exists()


def test_the_table_knows_every_file_that_a_step_writes(tiny_run: Path) -> None:
    from fnmatch import fnmatchcase

    written = {step.name: step.writes for step in STEPS}
    for name, record in RunFolder.open(tiny_run).manifest.files.items():
        assert any(fnmatchcase(name, pattern) for pattern in written[record.step]), name
    assert CHECKPOINT in next(step.scratch for step in STEPS if step.name == "student")


# ------------------------------------------------------------------ signatures


def test_signed_and_verified(invoke, root: Path, keys: Path) -> None:  # type: ignore[no-untyped-def]
    assert "not signed" in invoke("verify", root, "--key", keys / "key.pub").err
    answer = invoke("sign", root, "--key", keys / "key.pem")
    assert answer.code == 0, answer.err
    assert "✓ signed 2 files" in answer.out
    answer = invoke("verify", root, "--key", keys / "key.pub")
    assert answer.code == 0, answer.err
    assert "the signature is valid" in answer.out
    assert "not checked" in invoke("verify", root).out
    assert json.loads(invoke("verify", root, "--key", keys / "key.pub", "--json").out)["signature"] == "checked"
    # Signed again, and with a lock beside it, it still holds.
    assert invoke("sign", root, "--key", keys / "key.pem", "--json").code == 0
    assert (root / ".lock").exists()
    assert invoke("verify", root, "--key", keys / "key.pub").code == 0


def test_the_librarys_own_command_agrees(
    root: Path, keys: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python -m model_signing verify key`, in this process."""
    sign(RunFolder.open(root), keys / "key.pem")
    command = ["model_signing", "verify", "key", str(root), "--signature", str(root / SIGNATURE)]
    command += ["--public_key", str(keys / "key.pub"), "--ignore-paths", str(root / SIGNATURE)]
    command += ["--ignore-paths", str(root / ".lock"), "--no-ignore-git-paths"]
    monkeypatch.setattr(sys, "argv", command)

    def verified() -> object:
        """Its exit code."""
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("model_signing", run_name="__main__", alter_sys=True)
        return ended.value.code

    assert verified() == 0, capsys.readouterr()
    (root / "lte.safetensors").write_bytes(b"embeddingz")
    assert verified() not in (0, None)
    assert "mismatch" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change", ["other key", "manifest", "manifest and file", "signature", "no JSON", "removed", "added", "git", "cut"]
)
def test_what_a_stranger_can_do_shows(invoke, root: Path, keys: Path, change: str) -> None:  # type: ignore[no-untyped-def]
    sign(RunFolder.open(root), keys / "key.pem")
    key, signature = keys / "key.pub", root / SIGNATURE
    values = json.loads((root / MANIFEST).read_text())
    if change == "other key":
        key = keys / "other.pub"
    elif change == "manifest":
        values["recipe"]["description"] = "another"
    elif change == "manifest and file":
        (root / "lte.safetensors").write_bytes(b"embeddingz")
        values["files"]["lte.safetensors"]["sha256"] = sha256_of(root / "lte.safetensors")
    elif change == "signature":
        bundle = json.loads(signature.read_text())
        held = bundle["dsseEnvelope"]["signatures"][0]["sig"]
        bundle["dsseEnvelope"]["signatures"][0]["sig"] = held[:20] + ("A" if held[20] != "A" else "B") + held[21:]
        signature.write_text(json.dumps(bundle))
    elif change == "no JSON":
        signature.write_text("[" * 100_000)
    elif change == "removed":
        signature.unlink()
    elif change == "added":
        # With a manifest that knows it.
        write_bytes(root / "extra.bin", b"x")
        values["files"]["extra.bin"] = {**values["files"]["lte.safetensors"], "sha256": sha256_of(root / "extra.bin"),
                                        "bytes": 1}  # fmt: skip
    elif change == "git":
        write_bytes(root / ".gitattributes", b"x")
    else:
        signature.write_bytes(signature.read_bytes()[:-40])
    if values != json.loads((root / MANIFEST).read_text()):
        (root / MANIFEST).write_text(json.dumps(values))
    answer = invoke("verify", root, "--key", key)
    assert answer.code == 4, answer.out + answer.err
    assert "Traceback" not in answer.err
    assert "✓ the signature" not in answer.out


def test_a_run_that_went_on_says_that_the_signature_is_of_an_earlier_state(root: Path, keys: Path) -> None:
    run = RunFolder.open(root)
    sign(run, keys / "key.pem")
    write_bytes(run.path("lte.safetensors"), b"made again")
    run.record(Artifact("lte", {"lte": "lte.safetensors"}, {}), digest="2" * 64, settings={}, parents=[],
               seconds=1, finished="2026-01-02T03:04:07+00:00")  # fmt: skip
    with pytest.raises(IntegrityError) as caught:
        require_signed(RunFolder.open(root), keys / "key.pub")
    assert "lte.safetensors" in caught.value.why
    assert "sign it again" in caught.value.fix


def test_a_step_that_failed_leaves_the_signature_in_force(root: Path, keys: Path) -> None:
    run = RunFolder.open(root)
    sign(run, keys / "key.pem")
    assert run.restore(run.forget("teacher"))
    require_signed(RunFolder.open(root), keys / "key.pub")


def test_what_is_altered_or_unfinished_is_not_signed(root: Path, keys: Path) -> None:
    write_bytes(root / CHECKPOINT, b"half")
    with pytest.raises(UsageError, match="interrupted"):
        sign(RunFolder.open(root), keys / "key.pem")
    write_bytes(root / "evil.so", b"x")
    with pytest.raises(IntegrityError, match="not signed"):
        sign(RunFolder.open(root), keys / "key.pem")
    assert not (root / SIGNATURE).exists()


def test_keys_that_are_none(root: Path, keys: Path, tmp_path: Path) -> None:
    run = RunFolder.open(root)
    (tmp_path / "noise").write_bytes(b"\x00noise")
    openssl("genpkey", "-algorithm", "ed25519", "-out", tmp_path / "ed.pem")
    for bad in (tmp_path / "noise", tmp_path / "nowhere", keys / "key.pub", tmp_path, tmp_path / "ed.pem"):
        with pytest.raises(UsageError, match="not a usable private key"):
            sign(run, bad)
    sign(run, keys / "key.pem")
    for bad in (tmp_path / "noise", tmp_path / "nowhere", keys / "key.pem", tmp_path):
        with pytest.raises(UsageError, match="not a usable public key"):
            require_signed(run, bad)


def test_an_encrypted_key(root: Path, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = tmp_path / "locked.pem"
    openssl("pkcs8", "-topk8", "-in", keys / "key.pem", "-out", locked, "-passout", "pass:sesame")
    with pytest.raises(UsageError, match="not a usable private key") as caught:
        sign(RunFolder.open(root), locked)
    assert PASSWORD_VARIABLE in caught.value.fix
    monkeypatch.setenv(PASSWORD_VARIABLE, "sesame")
    sign(RunFolder.open(root), locked)
    require_signed(RunFolder.open(root), keys / "key.pub")


def test_without_the_libraries(  # type: ignore[no-untyped-def]
    invoke, root: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = ("model_signing", "cyclonedx")
    # Their modules, too, which an earlier test of this process may have imported.
    for name in {*absent, *(name for name in sys.modules if name.partition(".")[0] in absent)}:
        monkeypatch.setitem(sys.modules, name, None)
    assert invoke("verify", root).code == 0
    for arguments, extra in (
        (["sign", root, "--key", keys / "key.pem"], "sign"),
        (["verify", root, "--key", keys / "key.pub"], "sign"),
        (["sbom", root], "sbom"),
    ):
        answer = invoke(*arguments)
        assert answer.code == 3
        assert f"pip install '.[{extra}]'" in answer.err
    assert MissingError.exit_code == 3


# ------------------------------------------------------------------ bill of materials


def valid(text: str) -> bool:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None


def test_the_bill_of_a_run(invoke, finished: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    answer = invoke("sbom", finished)
    assert answer.code == 0, answer.err
    assert valid(answer.out)
    bill = json.loads(answer.out)
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    held = RunFolder.open(finished).manifest
    parts = {part["name"]: part for part in bill["components"]}
    for name, record in held.files.items():
        assert parts[name]["hashes"] == [{"alg": "SHA-256", "content": record.sha256}], name
    for name in ("torch", "onnxruntime", "numpy"):
        assert parts[name]["version"] == held.versions[name]
        assert parts[name]["purl"] == f"pkg:pypi/{name}@{held.versions[name]}"
    networks = {name for name, part in parts.items() if part["type"] == "machine-learning-model"}
    assert networks == {f"{n}/{n}.safetensors" for n in ("teacher", "student", "generator")} | {
        "export/student.fp32.onnx", "export/student.int8.cpu.onnx"
    }  # fmt: skip
    assert all("modelCard" in parts[name] for name in networks)
    student = parts["student/student.safetensors"]["modelCard"]
    assert "No training data was used" in student["modelParameters"]["datasets"][0]["description"]
    assert student["modelParameters"]["modelArchitecture"] == held.recipe["student"]["model"]
    report = json.loads((finished / "validate" / "report.json").read_text())
    (top1,) = [m for m in student["quantitativeAnalysis"]["performanceMetrics"] if m["type"] == "top-1 accuracy"]
    assert float(top1["value"]) == pytest.approx(report["student"]["top1"], abs=1e-6)
    assert "digits" in parts["teacher/teacher.safetensors"]["modelCard"]["modelParameters"]["datasets"][0]["name"]
    # Lineage: what a file was made from, by the manifest's parents.
    lineage = {entry["ref"]: set(entry.get("dependsOn", [])) for entry in bill["dependencies"]}
    int8 = parts["export/student.int8.cpu.onnx"]["bom-ref"]
    assert parts["export/student.fp32.onnx"]["bom-ref"] in lineage[int8]
    # The same run, the same bill, and nothing of this machine in it.
    out = tmp_path / "bom.json"
    assert json.loads(invoke("sbom", finished, "--out", out, "--json").out)["components"] == len(bill["components"])
    assert out.read_text(encoding="utf-8") == answer.out
    assert str(finished) not in answer.out


def test_the_bill_of_a_continued_run_names_both_versions(root: Path) -> None:
    from nayer_edge.pipelines.trust.sbom import make_sbom

    values = json.loads((root / MANIFEST).read_text())
    values["versions"] |= {"torch": "2.11.0", "python": "3.11.7"}
    last = list(values["steps"].values())[-1]
    last["versions"] = {"torch": "2.15.0", "python": "3.12.1"}
    (root / MANIFEST).write_text(json.dumps(values))
    text = make_sbom(RunFolder.open(root))
    assert valid(text)
    bill = json.loads(text)
    for name, wanted in (("torch", {"2.11.0", "2.15.0"}), ("Python", {"3.11.7", "3.12.1"})):
        parts = [part for part in bill["components"] if part["name"] == name]
        assert {part["version"] for part in parts} == wanted
        assert len({part["bom-ref"] for part in parts}) == 2


def test_the_bill_of_an_altered_run_is_refused(invoke, root: Path) -> None:  # type: ignore[no-untyped-def]
    (root / "lte.safetensors").write_bytes(b"x")
    assert invoke("sbom", root).code == 4


def test_a_bill_in_other_words_is_valid_too(root: Path, tmp_path: Path) -> None:
    """Names that are no ASCII, or would act, and a run whose teacher came from elsewhere."""
    from nayer_edge.pipelines.trust.sbom import make_sbom

    values = json.loads((root / MANIFEST).read_text())
    values["recipe"] = {"name": "zwölf", "description": "\x1b[2J<script>"}
    values["versions"]["weird pkg"] = "1 \x07"
    shutil.move(root / "lte.safetensors", root / "été 猫.safetensors")
    values["files"]["été 猫.safetensors"] = values["files"].pop("lte.safetensors")
    (root / MANIFEST).write_text(json.dumps(values))
    text = make_sbom(RunFolder.open(root))
    assert valid(text)
    assert "\x1b" not in text
    assert "\\u001b" not in text
    assert "trained before this run" in text
