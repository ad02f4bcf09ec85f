"""`report.html`: one self-contained page about a run, light and dark, no network, no scripts.

It shows files of the run folder whose hashes were checked, and says what the run did not measure.
"""

from __future__ import annotations

import base64
from importlib import resources
from typing import Any

from nayer_edge import __version__
from nayer_edge.errors import IntegrityError, NayerEdgeError, missing_extra
from nayer_edge.runtime.progress import Progress
from nayer_edge.storage.files import read_json, write_bytes
from nayer_edge.storage.run_folder import Artifact, RunFolder
from nayer_edge.text import inert

from ..deploy import ENGINES, QUANTIZATION, RUNTIMES
from ..distill import TEACHER, card_of, metrics_of
from ..gate import wording
from ..gate.verdict import VERDICT_PATH, load_report, read_verdict
from ..recipes.as_toml import to_toml
from ..recipes.loading import without_local_paths
from ..recipes.schema import Recipe
from ..trust.lineage import chain, files_by_step
from . import charts
from .report_data import (
    calibrations,
    comparison,
    drops,
    focus_of,
    headline,
    label_embeddings,
    predictions_of,
    synthetic_images,
)

PAGE = "report.html"
TEMPLATE = "report.html.jinja"


def make_page(
    teacher: Artifact,
    lte: Artifact,
    student: Artifact,
    onnx: Artifact,
    int8: Artifact,
    engine: Artifact,
    validate: Artifact,
    gate: Artifact,
    *,
    config: Recipe,
    out: RunFolder,
    progress: Progress,
) -> Artifact:
    """Writes the page from the files of the other steps, whose hashes were checked before."""
    del teacher, lte, student, onnx, int8, engine, validate, gate, progress
    try:
        page = render(config, out)
    except NayerEdgeError:
        raise
    except Exception as error:  # whatever a template or a chart fails on came from a file of the run
        raise IntegrityError(
            f"The files of {out.root} cannot be shown as a report.",
            why=f"{type(error).__name__}: {error}",
            fix="Copy the folder again from where it was made.",
        ) from error
    write_bytes(out.path(PAGE), page.encode())
    return Artifact("report", {"page": PAGE}, {"bytes": out.path(PAGE).stat().st_size})


def render(config: Recipe, run: RunFolder) -> str:
    """The page as HTML; every text in it is escaped and inert. Equal files give equal pages.

    Raises:
        MissingError: jinja2 is not installed.
        IntegrityError: a file is damaged or stale.
    """
    report = load_report(run)
    verdict = read_verdict(run.path(VERDICT_PATH))
    metrics = metrics_of(run.root)
    focus = focus_of(config, report)
    values, beside = without_local_paths(config, run.root)
    recipe = to_toml(values)
    return template(TEMPLATE).render(
        config=config,
        report=report,
        synthetic=report.dataset.kind == "synthetic",
        verdict=verdict,
        reason=wording.reason(verdict),
        notes=[*dict.fromkeys((*wording.promise(report.dataset), *verdict.notes))],
        headline=headline(config, report),
        drops=drops(config, report),
        confidence=f"{100 * config.gate.accuracy.confidence:.6g} %",
        manifest=run.manifest,
        card=read_json(run.path(card_of(TEACHER)), "the teacher's card"),
        focus=focus,
        chains=[(a.name, chain(run.manifest, a)) for a in report.artifacts if a.name in config.gate.artifacts],
        steps=files_by_step(run.manifest, but="report"),
        comparison=comparison(report),
        strips=synthetic_images(config, run),
        losses=charts.losses(metrics),
        agreement=charts.agreement(metrics),
        epochs=metrics[-1] if metrics else None,
        lte=label_embeddings(run),
        predictions=predictions_of(run, config, report, focus),
        calibrations=calibrations(read_json(run.path(QUANTIZATION), "the record of quantization"), focus),
        engines=read_json(run.path(ENGINES), "the list of engines"),
        runtimes=read_json(run.path(RUNTIMES), "the list of runtimes' files") if RUNTIMES in run.manifest.files else [],
        recipe=recipe,
        recipe_link="data:application/toml;base64," + base64.b64encode(recipe.encode()).decode(),
        beside=beside,
        models={name: values[name]["model"] for name in ("teacher", "student")},
        version=__version__,
    )


def template(name: str, package: str = "nayer_edge.pipelines.report") -> Any:
    """A template for a page, with the filters of the report; it may include the report's own files.

    Args:
        package: where it lies.

    Raises:
        MissingError: jinja2 is not installed.
    """
    try:
        import jinja2
        import markupsafe
    except ImportError as error:
        raise missing_extra("jinja2", "cpu", "Writing the report") from error

    def source(name: str) -> str | None:
        folders = dict.fromkeys((package, "nayer_edge.pipelines.report"))
        paths = [resources.files(folder) / name for folder in folders]
        return next((path.read_text(encoding="utf-8") for path in paths if path.is_file()), None)

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(source),
        autoescape=True,
        # Every text on the page is made inert here, so that no place can forget it. (Escaping comes after.)
        finalize=lambda value: inert(value) if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": wording.percent,
        "difference": wording.difference,
        "size": wording.size,
        "milliseconds": wording.milliseconds,
        "title_of": wording.title,
        "qualifiers_of": wording.qualifiers,
        "figures_of": wording.figures,
        # For the one text that keeps its line breaks.
        "lines": lambda text: markupsafe.Markup("\n").join(inert(line) for line in text.split("\n")),
    }
    return environment.get_template(name)
