"""The command line. A command parses its arguments, calls one function of the pipelines, prints, and exits. Heavy
modules are imported inside the commands, so that `--help` and `gate` need neither torch nor ONNX Runtime."""

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
    understood,
)
from nayer_edge.runtime.process import launched
from nayer_edge.text import inert

from ..recipes.renamed import RenamedWarning

# Importing a module registers its commands; the order is that of the help.
from . import training, deployment, judging, trust, setup, starting, embeddings  # noqa: F401  isort:skip
from .shared import app


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
            f"Only `distill` can run in several processes, but torchrun started {size}.",
            fix=f"Without torchrun, type: nayer-edge {context.invoked_subcommand} …",
        )


def _fail(error: NayerEdgeError) -> NoReturn:
    """Prints an error and exits with its code; called while an exception is handled."""
    if os.environ.get("NAYER_EDGE_DEBUG"):
        traceback.print_exc()
    console = Console(stderr=True, force_terminal=sys.stderr.isatty(), soft_wrap=True)
    if _helps():
        # The first rank prints the full message; this line is for errors that only occur on this rank.
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
        # Typer colours its help on CI servers even without a terminal.
        os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    warnings.showwarning = _show_warning
    # ONNX Runtime also logs the tracebacks of the errors that it raises.
    logging.getLogger("onnxruntime").addHandler(logging.NullHandler())
    logging.getLogger("onnxruntime").propagate = bool(os.environ.get("NAYER_EDGE_DEBUG"))
    try:
        app(args=arguments, prog_name="nayer-edge", standalone_mode=True)
    except (Interrupted, KeyboardInterrupt):
        _interrupted()
    except Exception as error:  # noqa: BLE001  tracebacks are only shown with --debug
        _fail(understood(error, "This command") or _unexpected(error))
    sys.exit(EXIT_OK)


def _unexpected(error: Exception) -> NayerEdgeError:
    return NayerEdgeError(
        "Unexpected internal error.",
        why=f"{type(error).__name__}: {error}",
        fix="Repeat the command with `nayer-edge --debug …` for a traceback, and please report it.",
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
    """Whether torchrun started this process and it is not rank 0, the only one that prints."""
    return "LOCAL_RANK" in os.environ and os.environ.get("RANK", "0") != "0"


class Interrupted(BaseException):
    """SIGINT or SIGTERM. Not KeyboardInterrupt, for which Typer would exit with code 1."""


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise Interrupted


def _interrupted() -> NoReturn:
    if not _helps():
        print("\nInterrupted. Finished work is kept; run the same command to continue.", file=sys.stderr)  # noqa: T201
    sys.exit(EXIT_INTERRUPTED)
