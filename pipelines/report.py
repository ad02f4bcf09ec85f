"""`report.html`: one self-contained page about a run, light and dark, no network."""

from __future__ import annotations

import base64
import json
from importlib import resources
from pathlib import Path
from typing import Any

from nayer_edge import __version__
from nayer_edge.artefacts import Artifact, RunFolder, write_bytes
from nayer_edge.config import Recipe
from nayer_edge.errors import IntegrityError, missing_extra
from nayer_edge.progress import Progress
from nayer_edge.text import inert

from .distill import METRICS, PICTURE
from .gate import VERDICT_PATH, load_report
from .plots import curves

PAGE = "report.html"
TEMPLATE = "report.html.jinja"


def make_page(
    student: Artifact,
    int8: Artifact,
    validate: Artifact,
    gate: Artifact,
    *,
    config: Recipe,
    out: RunFolder,
    progress: Progress,
) -> Artifact:
    """Writes the page from what the other steps recorded."""
    del student, int8, validate, gate, progress
    write_bytes(out.path(PAGE), render(config, out).encode())
    return Artifact("report", {"page": PAGE}, {"bytes": out.path(PAGE).stat().st_size})


def render(config: Recipe, run: RunFolder) -> str:
    """The page as HTML; every text in it is escaped."""
    try:
        import jinja2
    except ImportError as error:
        raise missing_extra("jinja2", "cpu", "Writing the report") from error
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["percent"] = _percent
    environment.filters["inert"] = lambda value: inert(str(value))
    template = (resources.files("nayer_edge.pipelines") / TEMPLATE).read_text(encoding="utf-8")
    metrics = _metrics(run)
    return environment.from_string(template).render(
        config=config,
        report=load_report(run),
        verdict=json.loads(run.path(VERDICT_PATH).read_text(encoding="utf-8")),
        manifest=run.manifest,
        picture=_data_uri(run.path(PICTURE)),
        curves=curves(metrics),
        version=__version__,
    )


def _metrics(run: RunFolder) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in run.path(METRICS).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{run.path(METRICS)} is not readable as metrics.", why=f"{error}") from error


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.2f} %"
