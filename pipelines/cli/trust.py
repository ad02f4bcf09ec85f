"""The commands for integrity and provenance: verify, sign, sbom."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from nayer_edge.errors import EXIT_INTEGRITY, EXIT_INTERRUPTED
from nayer_edge.text import inert

from ..actions import open_run
from .shared import Json, Run, app, example, print_json, stdout


@app.command(epilog=example("nayer-edge verify runs/digits", "nayer-edge verify runs/digits --key key.pub"))
def verify(
    run_folder: Run,
    key: Annotated[Path | None, typer.Option("--key", help="Public key (PEM): check the signature, too.")] = None,
    expect: Annotated[
        str | None,
        typer.Option("--expect", metavar="SHA256", help="Expected digest of manifest.json, as printed by `verify`."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Hashes the files of a run and reports altered, missing and added ones.

    With --key or --expect it also detects changes to the manifest itself.

    Exit code 4: verification failed. 130: the run was interrupted and is unfinished.
    """
    from ..trust.verification import continuation, examine, require_expected

    opened = open_run(run_folder)
    found = examine(opened)
    if not found.problems:
        if expect is not None:
            require_expected(found, expect)
        if key is not None:
            from ..trust.signing import require_signed

            require_signed(opened, key)
    fix = f"nayer-edge verify {shlex.quote(str(run_folder))} --key KEY.pub"
    if as_json:
        print_json(
            {
                "run": str(run_folder),
                "files": found.files,
                "manifest_sha256": found.manifest_sha256,
                "signature": "checked" if key and not found.problems else "not checked" if found.signed else None,
                "problems": list(found.problems),
                "unfinished": list(found.unfinished),
                "left": list(found.left),
            }
        )
    elif found.problems:
        for problem in found.problems:
            stdout().print(Text(f"✗ {inert(problem)}", style="red"))
    else:
        stdout().print(f"✓ {found.files} files match the manifest of {inert(str(run_folder))}", highlight=False)
        stdout().print(f"  manifest SHA-256 {found.manifest_sha256}", highlight=False, soft_wrap=True)
        if key is not None:
            stdout().print("✓ the signature is valid and covers every file")
        elif found.signed:
            stdout().print(Text(f"· signature not checked; to check it, type: {inert(fix)}"), soft_wrap=True)
        if found.left:
            steps = ", ".join(found.unfinished)
            stdout().print(
                Text(f"· interrupted in {steps}; not yet in the manifest: {inert(', '.join(found.left))}"),
                soft_wrap=True,
            )
            stdout().print(Text(f"  to continue, type: {inert(continuation(opened))}", style="bold"), soft_wrap=True)
    if found.problems:
        raise typer.Exit(EXIT_INTEGRITY)
    if found.left:
        raise typer.Exit(EXIT_INTERRUPTED)


@app.command(epilog=example("nayer-edge sign runs/digits --key key.pem"))
def sign(
    run_folder: Run,
    key: Annotated[Path, typer.Option("--key", help="Private key (PEM, NIST P-256, P-384 or P-521).")],
    as_json: Json = False,
) -> None:
    """Signs a finished run with a local key, without network access. `verify --key` checks it.

    The signature (model.sig in the run folder) covers all files of the run. For keys, see docs/SECURITY.md.
    """
    from ..trust.signing import sign as sign_run
    from ..trust.verification import examine

    opened = open_run(run_folder)
    path = sign_run(opened, key)
    found = examine(opened)
    if as_json:
        print_json({"run": str(run_folder), "signature": str(path), "manifest_sha256": found.manifest_sha256})
    else:
        stdout().print(f"✓ signed {found.files} files and the manifest: {inert(str(path))}", highlight=False)


@app.command(epilog=example("nayer-edge sbom runs/digits --out bom.json"))
def sbom(
    run_folder: Run,
    out: Annotated[Path | None, typer.Option("--out", help="Output file.", show_default="standard output")] = None,
    as_json: Json = False,
) -> None:
    """Writes a bill of materials (CycloneDX ML-BOM): networks, files, hashes, lineage, data provenance, software."""
    import json

    from nayer_edge.storage.files import write_bytes

    from ..gate.verdict import require_outputs
    from ..trust.sbom import make_sbom

    require_outputs(run_folder, {"--out": out})
    text = make_sbom(open_run(run_folder))
    if out is None:
        print(text, end="")  # noqa: T201
        return
    write_bytes(out, text.encode())
    if as_json:
        values = json.loads(text)
        facts = {"serial_number": values["serialNumber"], "components": len(values["components"])}
        print_json({"run": str(run_folder), "out": str(out), **facts})
    else:
        stdout().print(f"✓ {inert(str(out))}", highlight=False)
