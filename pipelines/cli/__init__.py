"""The command line. A command parses, calls one function of the pipelines, prints, and exits; heavy modules are
imported inside the commands, so `--help` and `gate` need neither torch nor ONNX Runtime."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import traceback
import warnings
from typing import Annotated, NoReturn, TextIO

import typer
from rich.console import Console
from rich.text import Text

from nayer_edge import __version__
from nayer_edge.errors import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_USAGE,
    NayerEdgeError,
    UsageError,
    hidden_memory_error,
    missing_extra,
    resource_error,
)
from nayer_edge.runtime.process import launched
from nayer_edge.text import inert

from ..recipes.renamed import RenamedWarning

# Importing a module registers its commands, in the order of the help.
from . import training, deployment, judging, trust, setup, starting, embeddings  # noqa: F401  isort:skip
from .shared import app

EXTRA_OF = {
    "numpy": "cpu",
    "torch": "cpu",
    "torchvision": "cpu",
    "transformers": "cpu",
    "safetensors": "cpu",
    "jaxtyping": "cpu",
    "onnx": "cpu",
    "onnxscript": "cpu",
    "onnxruntime": "cpu",
    "sklearn": "cpu",
    "matplotlib": "cpu",
    "jinja2": "cpu",
    "pyarrow": "cpu",
    "PIL": "cpu",
}
"""top-level module → the extra that installs it"""


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)  # noqa: T201
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    del version
    if debug:
        os.environ["NAYER_EDGE_DEBUG"] = "1"
    rank, size = launched()
    if size > 1 and context.invoked_subcommand != "distill":
        if rank > 0:
            raise typer.Exit(EXIT_USAGE)
        raise UsageError(
            f"Only `distill` runs as several processes, and torchrun started {size}.",
            fix=f"Type: nayer-edge {context.invoked_subcommand} …   without torchrun",
        )


def _fail(error: NayerEdgeError) -> NoReturn:
    """Says what is wrong and ends with the error's exit code; called while an exception is handled."""
    if os.environ.get("NAYER_EDGE_DEBUG"):
        traceback.print_exc()
    console = Console(stderr=True, force_terminal=sys.stderr.isatty(), soft_wrap=True)
    if _helps():
        # The first rank says everything; were a reason its own, it stands here.
        print(f"Rank {os.environ['RANK']}: {inert(error.what)} {inert(error.why)}".rstrip(), file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)
    lines = [[inert(line) for line in part.splitlines()] for part in (error.what, error.why, error.fix)]
    what, why, fix = lines
    console.print(Text("Error: ", style="bold red").append("\n".join(what), style="default"))
    if why:
        console.print(Text("\n".join(why)))
    if fix:
        console.print(Text("\n".join(fix), style="bold"))
    sys.exit(error.exit_code)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command line and exits with the codes of `nayer_edge.errors`."""
    if not sys.stdout.isatty():
        # Typer colours its help on CI servers, where it is read as text.
        os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    warnings.showwarning = _show_warning
    # Libraries log tracebacks of errors that they raise as well.
    logging.getLogger("onnxruntime").addHandler(logging.NullHandler())
    logging.getLogger("onnxruntime").propagate = bool(os.environ.get("NAYER_EDGE_DEBUG"))
    try:
        app(args=arguments, prog_name="nayer-edge", standalone_mode=True)
    except NayerEdgeError as error:
        _fail(hidden_memory_error(error) or error)
    except ModuleNotFoundError as error:
        top = (error.name or "").partition(".")[0]
        _fail(missing_extra(top, EXTRA_OF[top], "This command") if top in EXTRA_OF else _unexpected(error))
    except (Interrupted, KeyboardInterrupt):
        _interrupted()
    except Exception as error:  # noqa: BLE001  tracebacks are for those who ask for them
        _fail(resource_error(error) or _unexpected(error))
    sys.exit(EXIT_OK)


def _unexpected(error: Exception) -> NayerEdgeError:
    return NayerEdgeError(
        "Something happened that nayer-edge does not expect.",
        why=f"{type(error).__name__}: {error}",
        fix="Repeat with `nayer-edge --debug …` to see where, and please report it.",
    )


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """As Python shows warnings, without the line of source for those that are meant for the user."""
    own = issubclass(category, RenamedWarning)
    text = f"Warning: {message}\n" if own else warnings.formatwarning(message, category, filename, lineno, line)
    (file or sys.stderr).write(text)


def _helps() -> bool:
    """This is a process of torchrun's, and not the one that prints."""
    return "LOCAL_RANK" in os.environ and os.environ.get("RANK", "0") != "0"


class Interrupted(BaseException):
    """SIGINT or SIGTERM. Not KeyboardInterrupt, which the command-line library would answer with exit code 1."""


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise Interrupted


def _interrupted() -> NoReturn:
    if not _helps():
        print("\nInterrupted. What was finished is kept; the same command continues.", file=sys.stderr)  # noqa: T201
    sys.exit(EXIT_INTERRUPTED)
