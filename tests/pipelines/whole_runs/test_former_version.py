"""A run folder that an earlier version wrote: it opens, validates, gates and draws images.

`former_run` was made at commit 9d488fc, by the recipe `digits` with a ResNet-20 as teacher and the sizes of `TINY` in
tests/conftest.py of that commit (20 student steps per epoch).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nayer_edge as ne
from nayer_edge.data.datasets import digits
from nayer_edge.errors import IntegrityError
from nayer_edge.pipelines.actions import recipe_in
from nayer_edge.pipelines.trust.signing import sign
from nayer_edge.storage.files import sha256_of
from nayer_edge.storage.run_folder import MANIFEST, SIGNATURE, RunFolder

FORMER = Path(__file__).parent / "former_run"
Invoke = Callable[..., Any]


@pytest.fixture
def former(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FORMER, tmp_path / "digits"))


def test_it_is_whole_and_its_verdict_is_the_same(former: Path, invoke: Invoke) -> None:
    before = json.loads((former / "gate" / "verdict.json").read_text())
    assert invoke("verify", former).code == 0
    answer = invoke("gate", former, "--json")
    assert (answer.code, before["verdict"]) == (1, "fail")
    found = {(check["name"], check["artifact"]): check for check in json.loads(answer.out)["checks"]}
    for check in before["checks"]:
        now = found[check["name"], check["artifact"]]
        assert (now["verdict"], now["observed"]) == (check["verdict"], check["observed"]), check["name"]


def test_a_verdict_about_other_files_is_not_signed(former: Path, tmp_path: Path) -> None:
    """As after `export --qat`: the files are new, and report and verdict are about the former ones."""
    key = tmp_path / "key.pem"
    run = RunFolder.open(former)
    name = next(name for name in run.manifest.files if name.endswith("int8.cpu.onnx"))
    content = run.path(name).read_bytes() + b"\0"
    run.path(name).write_bytes(content)
    changed = {"sha256": sha256_of(run.path(name)), "bytes": len(content)}
    run.manifest.files[name] = run.manifest.files[name].model_copy(update=changed)
    run.save()
    pytest.importorskip("model_signing", reason="needs the extra 'sign'")
    with pytest.raises(IntegrityError, match="is stale"):
        sign(run, key)
    assert not (former / SIGNATURE).exists()


@pytest.mark.parametrize("distill", [None, [], "x"])
def test_a_damaged_recipe_is_no_bug_of_the_gate(former: Path, invoke: Invoke, distill: Any) -> None:
    values = json.loads((former / MANIFEST).read_text())
    values["recipe"]["distill"] = distill
    (former / MANIFEST).write_text(json.dumps(values))
    assert invoke("gate", former).code == 1, "the verdict does not need it"


def test_a_name_cannot_control_the_terminal(former: Path, invoke: Invoke) -> None:
    pytest.importorskip("cyclonedx", reason="needs the extra 'sbom'")
    values = json.loads((former / MANIFEST).read_text())
    values["recipe"]["name"] = "a\u009b2J\u202e evil"
    (former / MANIFEST).write_text(json.dumps(values))
    answer = invoke("sbom", former)
    assert answer.code == 0, answer.err
    assert not set("\u009b\u202e") & set(answer.out)


def test_it_is_measured_again(former: Path, tmp_path: Path, invoke: Invoke) -> None:
    before = json.loads((former / "validate" / "report.json").read_text())
    kept = digits("holdout", recipe_in(former).teacher.input)
    np.savez(tmp_path / "again.npz", images=kept.images.numpy(), labels=kept.labels.numpy())
    answer = invoke("validate", former, "--data", tmp_path / "again.npz")
    assert answer.code == 0, answer.err
    after = json.loads((former / "validate" / "report.json").read_text())
    assert after["dataset"]["name"] != before["dataset"]["name"]
    for who in ("teacher", "student"):
        assert after[who]["top1"] == pytest.approx(before[who]["top1"], abs=0.005)
    top1 = {each["name"]: each["top1"] for each in after["artifacts"]}
    assert top1 == {each["name"]: pytest.approx(each["top1"], abs=0.02) for each in before["artifacts"]}
    assert invoke("gate", former).code == 1
    assert invoke("verify", former).code == 0


def test_its_generator_draws(former: Path) -> None:
    images, classes = ne.open(former).draw(20)
    assert images.shape == (20, 1, 16, 16)
    assert np.bincount(classes, minlength=10).tolist() == [2] * 10
