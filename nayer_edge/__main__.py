"""`python -m nayer_edge` and the `nayer-edge` command. The one module of the core that imports the pipelines."""

from __future__ import annotations


def main() -> None:
    """Runs the command line; heavy modules are imported inside its commands."""
    from nayer_edge.pipelines.cli import main as cli_main

    cli_main()


if __name__ == "__main__":
    main()
