"""Logs metrics to TensorBoard, in a folder beside the run: event files contain the host name and must not ship."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nayer_edge.distillation import Epoch
from nayer_edge.errors import missing_extra

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Writes one point per epoch to `<run>.tensorboard/`."""

    def __init__(self, run: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise missing_extra("tensorboard", "tracking", 'tracking = "tensorboard"') from error
        run = run.resolve()
        self.folder = run.with_name(f"{run.name}.tensorboard")
        # A continued run logs its earlier epochs again, and one that starts over has others.
        for path in self.folder.glob("events.out.tfevents.*"):
            path.unlink(missing_ok=True)
        self._writer: SummaryWriter = SummaryWriter(str(self.folder))

    def log(self, epoch: Epoch) -> None:
        """Logs every number of an epoch."""
        for name, value in vars(epoch).items():
            if name != "epoch" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, epoch.epoch)

    def close(self) -> None:
        """Writes pending events and closes the file."""
        self._writer.close()
