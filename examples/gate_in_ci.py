"""The gate as a script for CI: `python examples/gate_in_ci.py runs/digits` after `make quickstart`.

It needs only the base install, and exits like `nayer-edge gate`: 0 pass, 1 fail or inconclusive, 2 usage error,
4 tampered or stale.
"""

from __future__ import annotations

import os
import sys

import nayer_edge as ne


def main(folder: str) -> int:
    """Gates a run folder; returns the exit code."""
    try:
        run = ne.open(folder)
        verdict = run.gate(
            # Overrides of the recipe's policy. To use a policy file: policy="policy.toml".
            max_drop_vs_fp32=0.015,
            max_drop_vs_teacher=0.04,
            size={"max_bytes": 500_000},
            junit="junit.xml",
            summary=os.environ.get("GITHUB_STEP_SUMMARY"),
        )
    except ne.NayerEdgeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    for check in verdict.checks:
        print(f"{check.verdict:<13}{check.artifact:<10} {check.detail}")
    print(f"gate: {verdict.verdict}")
    return 0 if verdict.verdict == "pass" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "runs/digits"))
