"""The bill of materials of a run: CycloneDX 1.6, with a model card for each network (ML-BOM).

Built only from the manifest, the cards and the report, so the same run gives the same bytes. The library does not
support model cards yet: they are added to its output, and its validator then checks the result against CycloneDX's JSON
Schema.
"""

# The library's serializing decorator hides the constructors and attributes of its classes from type checkers.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import datetime
import json
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nayer_edge.errors import IntegrityError, missing_extra
from nayer_edge.export.targets import FILE_SUFFIXES
from nayer_edge.storage.files import read_json, sha256_of
from nayer_edge.storage.run_folder import MANIFEST, FileRecord, RunFolder
from nayer_edge.text import inert

from ..gate.verdict import load_report
from ..measurements import REPORT_PATH, ArtifactReport, Network, Report
from ..shared_bank import read_source
from ..steps import SOURCE

if TYPE_CHECKING:
    from cyclonedx.model.component import Component

NO_DATA = (
    "No training data was used. The student was trained only on synthetic images, which this run made from the "
    "teacher's weights and class names or, with the procedural prior, from random numbers and the teacher's weights."
)
NETWORKS = ("teacher", "student", "generator")
DATA = ("bank", "lte", "predictions", "metrics")


def make_sbom(run: RunFolder) -> str:
    """The bill of materials as JSON: networks and other files with hashes and lineage, and the software used.

    Raises:
        IntegrityError: a file does not match the manifest.
        MissingError: the CycloneDX library is not installed.
    """
    try:
        from cyclonedx.model.bom import Bom, BomMetaData
        from cyclonedx.model.component import Component, ComponentType
        from cyclonedx.model.dependency import Dependency
        from cyclonedx.output.json import JsonV1Dot6
        from cyclonedx.schema import SchemaVersion
        from cyclonedx.validation.json import JsonStrictValidator
    except ImportError as error:
        raise missing_extra("cyclonedx-python-lib", "sbom", "Writing a bill of materials") from error
    run.require_intact()
    held = run.manifest
    digest = sha256_of(run.root / MANIFEST)
    files = {name: _file(name, record) for name, record in sorted(held.files.items())}
    # A continued run may have used several versions of a package.
    used = {*held.versions.items(), *(pair for step in held.steps.values() for pair in step.versions.items())}
    software = [_software(name, version, held.versions.get(name) == version) for name, version in sorted(used)]
    whole = Component(
        name=inert(str(held.recipe.get("name"))),
        type=ComponentType.MACHINE_LEARNING_MODEL,
        version=digest[:12],
        bom_ref="run",
        description=inert(str(held.recipe.get("description", ""))) or None,
        properties=[_property("seed", str(held.seed)), _property("training data of the student", "none")],
    )
    by_hash: dict[str, Component] = {held.files[name].sha256: part for name, part in files.items()}
    # Files of the run that this one started from, except those that are the same here (teacher and embeddings).
    source = read_source(run) if SOURCE in held.files else None
    others = (
        {
            entry["sha256"]: _file(name, FileRecord(**entry, step="student"), run=source.run)
            for name, entry in source.files.items()
            if entry["sha256"] not in by_hash
        }
        if source
        else {}
    )
    by_hash |= others
    lineage = [
        Dependency(
            ref=files[name].bom_ref,
            dependencies=[
                Dependency(ref=by_hash[parent].bom_ref)
                for parent in dict.fromkeys(record.parents)
                if parent in by_hash and by_hash[parent] is not files[name]
            ],
        )
        for name, record in sorted(held.files.items())
    ]
    lineage.append(
        Dependency(
            ref=whole.bom_ref,
            dependencies=[Dependency(ref=part.bom_ref) for part in (*files.values(), *others.values(), *software)],
        )
    )
    bom = Bom(
        components=[*files.values(), *others.values(), *software],
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"urn:nayer-edge:{digest}"),
        metadata=BomMetaData(component=whole, timestamp=_finished(run)),
        dependencies=lineage,
    )
    values = json.loads(JsonV1Dot6(bom).output_as_string())
    _add_cards(values, run)
    text = json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    if wrong := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        raise IntegrityError(
            "The bill of materials does not conform to CycloneDX's schema.",
            why=str(wrong).splitlines()[0],
            fix="This is a bug: please report it, with manifest.json.",
        )
    return text


def _file(name: str, record: FileRecord, run: str | None = None) -> Component:
    """A file as a component; `run`: of another run, from which this one started."""
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.component import Component, ComponentType

    if record.kind in NETWORKS or name.endswith(FILE_SUFFIXES):
        kind = ComponentType.MACHINE_LEARNING_MODEL
    else:
        kind = ComponentType.DATA if record.kind in DATA else ComponentType.FILE
    where = [] if run is None else [_property("run", run)]
    return Component(
        name=inert(name if run is None else f"{run}: {name}"),
        type=kind,
        version=record.sha256[:12],
        bom_ref=f"{'file' if run is None else 'source'}:{record.sha256[:16]}:{inert(name)}",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=record.sha256)],
        properties=[
            _property("kind", record.kind),
            _property("step", record.step),
            _property("bytes", str(record.bytes)),
            *where,
        ],
    )


def _software(name: str, version: str, at_first: bool) -> Component:
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    reference = f"software:{inert(name)}" if at_first else f"software:{inert(name)}@{inert(version)}"
    if name == "python":
        return Component(name="Python", type=ComponentType.PLATFORM, version=inert(version), bom_ref=reference)
    return Component(
        name=inert(name),
        type=ComponentType.LIBRARY,
        version=inert(version),
        bom_ref=reference,
        purl=PackageURL("pypi", name=name.lower().replace("_", "-"), version=version),
    )


def _property(name: str, value: str) -> Any:
    from cyclonedx.model import Property

    return Property(name=f"nayer-edge:{name}", value=inert(value))


def _finished(run: RunFolder) -> datetime.datetime:
    """When the last step of the run ended; not the current time, so that the output is reproducible."""
    ends = []
    for record in run.manifest.steps.values():
        try:
            ends.append(datetime.datetime.fromisoformat(record.finished))
        except ValueError:
            continue
    aware = [end if end.tzinfo else end.replace(tzinfo=datetime.UTC) for end in ends]
    return max(aware, default=datetime.datetime.fromtimestamp(0, datetime.UTC))


def _add_cards(values: dict[str, Any], run: RunFolder) -> None:
    """Adds a model card to every network, built from the run's own cards and report."""
    report = load_report(run) if REPORT_PATH in run.manifest.files else None
    by_name = {inert(name): (name, record) for name, record in run.manifest.files.items()}
    for component in values["components"]:
        if component["type"] == "machine-learning-model" and component["name"] in by_name:
            component["modelCard"] = _card(*by_name[component["name"]], run, report)
    values["metadata"]["component"]["modelCard"] = {
        "modelParameters": {"task": "image classification", "datasets": [_no_data()]}
    }


def _card(name: str, record: FileRecord, run: RunFolder, report: Report | None) -> dict[str, Any]:
    role = record.kind if record.kind in NETWORKS else "student"
    cards = [n for n, f in run.manifest.files.items() if f.kind == f"{role} card"]
    facts = read_json(run.path(cards[0]), "a model card") if cards else {}
    if not isinstance(facts, dict):
        raise IntegrityError(f"{run.path(cards[0])} is not a model card.")
    parameters: dict[str, Any] = {
        "task": "image generation" if role == "generator" else "image classification",
        "datasets": [_teachers_data(facts) if role == "teacher" else _no_data()],
    }
    if isinstance(facts.get("model"), str):
        parameters["modelArchitecture"] = inert(facts["model"])
    if isinstance(facts.get("input"), dict) and role != "generator":
        shape = "×".join(str(facts["input"].get(key)) for key in ("channels", "height", "width"))
        parameters["inputs"] = [{"format": inert(f"image, {shape}, values in [0, 1]")}]
        classes = facts.get("classes")
        count = len(classes) if isinstance(classes, list) else "unknown"
        parameters["outputs"] = [{"format": f"logits, classes: {count}"}]
    card: dict[str, Any] = {"modelParameters": parameters}
    if metrics := _metrics(name, role, report):
        card["quantitativeAnalysis"] = {"performanceMetrics": metrics}
    return card


def _no_data() -> dict[str, Any]:
    return {"type": "dataset", "name": "synthetic images", "description": NO_DATA}


def _teachers_data(facts: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(facts.get("trained_on"), str):
        return {"type": "dataset", "name": inert(facts["trained_on"]), "description": "The teacher's training data."}
    return {
        "type": "dataset",
        "name": "unknown",
        "description": "The teacher was trained before this run, and only its weights were provided.",
    }


def _metrics(name: str, role: str, report: Report | None) -> list[dict[str, str]]:
    """Top-1 accuracy and agreement from the report; the slice names the kind of images."""
    if report is None or role == "generator":
        return []
    if name.endswith(FILE_SUFFIXES):
        found: Network | ArtifactReport | None = next((a for a in report.artifacts if a.file == name), None)
    else:
        found = report.teacher if role == "teacher" else report.student
    images = f"{report.dataset.n} {'synthetic' if report.dataset.kind == 'synthetic' else 'held-out'} images"
    return [
        {"type": what, "value": f"{value:.6g}", "slice": images}
        for key, what in (("top1", "top-1 accuracy"), ("agreement", "agreement with the teacher"))
        if (value := getattr(found, key, None)) is not None
    ]
