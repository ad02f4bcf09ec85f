"""The command line. A command parses its arguments, calls functions of the pipelines, prints, and exits. Heavy
modules are imported inside the commands, so that `--help` and `gate` need neither torch nor ONNX Runtime."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import traceback
import warnings
from typing import Annotated, Any, NoReturn, TextIO

import typer
from rich.console import Console
from rich.text import Text

from nayer_edge import __version__
from nayer_edge.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_UNEXPECTED,
    EXIT_USAGE,
    NayerEdgeError,
    UsageError,
    understood,
    unexpected,
)
from nayer_edge.runtime.process import launched
from nayer_edge.text import inert

from ..recipes.renamed import RenamedWarning

# Importing a module registers its commands; the order is that of the help.
from . import training, sweeping, deployment, judging, trust, setup, starting, embeddings  # noqa: F401  isort:skip
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
    _open_streams()
    if not sys.stdout.isatty():
        # Typer colours its help on CI servers even without a terminal.
        os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    warnings.showwarning = _show_warning
    # ONNX Runtime also logs the tracebacks of the errors that it raises.
    logging.getLogger("onnxruntime").addHandler(logging.NullHandler())
    logging.getLogger("onnxruntime").propagate = bool(os.environ.get("NAYER_EDGE_DEBUG"))
    try:
        try:
            app(args=arguments, prog_name="nayer-edge", standalone_mode=True)
        finally:
            sys.stdout.flush()
    except (Interrupted, KeyboardInterrupt) as end:
        _interrupted(end)
    except SystemExit as end:
        sys.exit(_exit_code(end))
    except Exception as error:  # noqa: BLE001  tracebacks are only shown with --debug
        if isinstance(error, OSError):
            # What standard output did not take must not fail once more at exit.
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
        _fail(understood(error, "This command") or unexpected(error))
    sys.exit(EXIT_OK)


def _exit_code(end: SystemExit) -> int:
    """The exit code of a command that ended. Code 1 is the gate's, which raises `typer.Exit`; Typer also has it for
    errors of its own, and code of a model may call sys.exit."""
    cause = end.__context__
    if isinstance(cause, typer.Abort):
        return EXIT_INTERRUPTED
    if isinstance(cause, typer.Exit) or end.code in (None, EXIT_OK):
        return end.code if isinstance(end.code, int) else EXIT_OK
    if cause is not None and hasattr(cause, "exit_code"):
        # Typer has printed it.
        return EXIT_USAGE
    if isinstance(end.code, int) and end.code not in (EXIT_OK, EXIT_FAILED):
        return end.code
    print(f"Error: code run by this command called sys.exit({end.code!r}).", file=sys.stderr)  # noqa: T201
    return EXIT_UNEXPECTED


class _Pipe(io.FileIO):
    """A stream whose reader may go away (`nayer-edge … | head`): the command goes on, and its exit code holds."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            return len(data)


def _open_streams() -> None:
    """Makes the standard streams usable: closed ones (`>&-`) lead nowhere, characters that their encoding lacks are
    replaced, and a reader that goes away is no error."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            # Before any other file, which would get the number of a standard stream.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="nayer-edge")
            if stream is getattr(sys, f"__{name}__"):
                stream.flush()
                file = io.BufferedWriter(_Pipe(stream.fileno(), "w", closefd=False))
                piped = io.TextIOWrapper(
                    file, stream.encoding, "nayer-edge", line_buffering=stream.line_buffering or name == "stderr"
                )
                setattr(sys, name, piped)


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


def _interrupted(end: BaseException) -> NoReturn:
    """Prints how to continue: what the command noted, or else the advice to repeat it."""
    if not _helps():
        ways = getattr(end, "__notes__", [])
        told = "." if ways else "; run the same command to continue (without --fresh)."
        print("\n".join([f"\nInterrupted. Finished work is kept{told}", *ways]), file=sys.stderr)  # noqa: T201
    sys.exit(EXIT_INTERRUPTED)
