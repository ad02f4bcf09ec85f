"""Signs and verifies a whole run folder with OpenSSF model signing and a local key; no network access.

The signature (a Sigstore bundle, `model.sig`) covers name and SHA-256 of every file of the run, including the manifest;
`model_signing verify key` can verify it, too.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nayer_edge.errors import IntegrityError, UsageError, missing_extra
from nayer_edge.storage.files import write_bytes
from nayer_edge.storage.run_folder import LOCK, SIGNATURE, RunFolder

from ..gate.verdict import load_report
from ..measurements import REPORT_PATH
from .verification import continuation, examine

if TYPE_CHECKING:
    from model_signing import hashing

PASSWORD_VARIABLE = "NAYER_EDGE_KEY_PASSWORD"  # noqa: S105 - the name of a variable
MAX_SIGNATURE_BYTES = 64 * 2**20
MAKE_KEYS = "openssl ecparam -name prime256v1 -genkey -noout -out key.pem; openssl ec -in key.pem -pubout -out key.pub"


def sign(run: RunFolder, private_key: Path) -> Path:
    """Signs a finished, intact run with an elliptic-curve key (NIST P-256, P-384 or P-521, PEM).

    Args:
        private_key: PEM file; if it is encrypted, the password comes from `NAYER_EDGE_KEY_PASSWORD`.

    Returns:
        The signature's path in the run folder.

    Raises:
        UsageError: the key cannot be used, or the run is unfinished.
        IntegrityError: the run does not match its manifest, or its files were made anew after they were validated.
        MissingError: the signing library is not installed.
    """
    signing = _library("signing")
    with run.locked():
        found = examine(run)
        if found.problems:
            raise IntegrityError(
                f"{run.root} does not match its manifest and was not signed.", "; ".join(found.problems) + "."
            )
        if found.left:
            raise UsageError(
                f"{run.root} was interrupted, is unfinished and was not signed.",
                why="Not yet in the manifest: " + ", ".join(found.left) + ".",
                fix=f"Type: {continuation(run)}",
            )
        if REPORT_PATH in run.manifest.files:
            # A verdict about other files must not be signed.
            load_report(run)
        config = signing.Config().set_hashing_config(_hashing())
        password = os.environ.get(PASSWORD_VARIABLE)
        try:
            config.use_elliptic_key_signer(
                private_key=private_key, password=password.encode() if password is not None else None
            )
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{private_key} is not a usable private key.",
                why=_reason(error),
                fix=f"For an encrypted key, set {PASSWORD_VARIABLE}. To make a key pair, type: {MAKE_KEYS}",
            ) from error
        with tempfile.TemporaryDirectory(prefix="nayer-edge-") as folder:
            made = Path(folder) / SIGNATURE
            with _quiet():
                config.sign(run.root, made)
            write_bytes(run.root / SIGNATURE, made.read_bytes())
    return run.root / SIGNATURE


def require_signed(run: RunFolder, public_key: Path) -> None:
    """Checks the signature of a run, and that the folder holds exactly the files that were signed.

    Raises:
        UsageError: the key cannot be used.
        IntegrityError: the signature is missing, altered or from another key, or the folder has changed since.
        MissingError: the signing library is not installed.
    """
    verifying = _library("verifying")
    signature = run.root / SIGNATURE
    config = verifying.Config()
    try:
        config.use_elliptic_key_verifier(public_key=public_key)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{public_key} is not a usable public key.",
            why=_reason(error),
            fix="Pass the public key (key.pub) of the pair that signed the run.",
        ) from error
    if signature.is_symlink() or not signature.is_file() or signature.stat().st_size > MAX_SIGNATURE_BYTES:
        raise IntegrityError(
            f"{run.root} is not signed.",
            why=f"It holds no {SIGNATURE}.",
            fix="Fetch the folder again with its signature, or sign it where it was made: nayer-edge sign RUN --key F",
        )
    try:
        with _quiet():
            config.set_hashing_config(_hashing()).verify(run.root, signature)
    except Exception as error:  # a hostile bundle fails in many ways in the libraries below, and each means the same
        raise IntegrityError(
            f"The signature of {run.root} is invalid.",
            why=_reason(error) or "It was made with another key, or it was altered.",
            fix="Do not use this folder: fetch it again from where it was made. If it was run again after signing, "
            "sign it again: nayer-edge sign RUN --key F",
        ) from error


def _hashing() -> hashing.Config:
    """Hashes every file with SHA-256, including git's own, except the lock and the signature itself."""
    config = _library("hashing").Config().use_file_serialization(hashing_algorithm="sha256")
    return config.set_ignored_paths(paths=[LOCK, SIGNATURE], ignore_git_paths=False)


def _library(module: str) -> Any:
    try:
        import model_signing
    except ImportError as error:
        raise missing_extra(error.name or "model-signing", "sign", "Signing, and checking a signature,") from error
    return getattr(model_signing, module)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the library, which prints to standard output."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _reason(error: BaseException) -> str:
    return f"{error}".strip().splitlines()[0] if f"{error}".strip() else ""
