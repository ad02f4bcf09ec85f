"""Entry point of `python -m nayer_edge` and `nayer-edge`: starts the command line of the pipelines."""

from __future__ import annotations


def main() -> None:
    """Runs the CLI, whose commands import heavy modules only when they run."""
    from nayer_edge.pipelines.cli import main as cli_main

    cli_main()


if __name__ == "__main__":
    main()
