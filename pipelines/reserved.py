"""Which of the images that distillation reserves serve which purpose."""

from __future__ import annotations

from collections.abc import Mapping

PERIOD = 4
SHARES = {"calibration": (0,), "calibration hold-out": (2,), "validate": (1, 3)}
"""which of every four reserved rounds serves which purpose"""


def rounds_for(purpose: str, reserved: int) -> list[int]:
    """The reserved rounds, counted from 0, that serve a purpose.

    Args:
        reserved: number of rounds that are reserved in all.
    """
    return [number for number in range(reserved) if number % PERIOD in SHARES.get(purpose, ())]


def wanted_images(calibration: int, holdout: int) -> dict[str, int]:
    """Purpose → number of images.

    Args:
        calibration: images for calibration; as many serve to choose its method.
        holdout: synthetic images for validation; 0 if there are real ones.
    """
    return {"calibration": calibration, "calibration hold-out": calibration, "validate": holdout}


def missing_rounds(wanted: Mapping[str, int], reserved: int, batch: int) -> int:
    """Rounds that must be drawn after distillation, because too few are reserved.

    Args:
        wanted: purpose → number of images.
        reserved: number of rounds that are reserved in all.
        batch: images per round.
    """
    return sum(max(0, -(-count // batch) - len(rounds_for(purpose, reserved))) for purpose, count in wanted.items())
