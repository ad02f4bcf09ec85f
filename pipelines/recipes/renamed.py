"""Keys of a recipe that were renamed. The old name is read for one release, with a warning where a user wrote it."""

from __future__ import annotations

import warnings
from typing import Any

from nayer_edge.errors import UsageError

RENAMED = {
    "export.finetune": "export.qat",
    "export.finetune_epochs": "export.qat_epochs",
    "export.finetune_steps": "export.qat_steps",
    "export.finetune_lr": "export.qat_lr",
}
"""old dotted key → new one"""


class RenamedWarning(FutureWarning):
    """Something was called by its old name."""


def warn_renamed(old: str, new: str) -> None:
    """Warns that an old name was used."""
    text = f"{old} is deprecated and will be removed in the next release. Use {new} instead."
    warnings.warn(text, RenamedWarning, stacklevel=2)


def current_key(key: str) -> str:
    """The current name of a dotted key; warns if it was renamed."""
    if key in RENAMED:
        warn_renamed(key, RENAMED[key])
    return RENAMED.get(key, key)


def with_current_keys(values: dict[str, Any], *, warn: bool = False, prefix: str = "") -> dict[str, Any]:
    """A copy of a recipe's values, nested or by dotted key, under the current names of their keys.

    Args:
        warn: someone wrote these values by hand. (The manifest of an older run also holds old keys, and nobody can be
            asked to change those.)
        prefix: dotted path of `values` within the recipe, with a trailing dot.

    Raises:
        UsageError: a key is set under both names.
    """
    found = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        new = RENAMED.get(name, name).removeprefix(prefix)
        if new != key:
            if new in values:
                raise UsageError(f"{name} is the old name of {RENAMED[name]}, and both are set.", fix=f"Remove {name}.")
            if warn:
                warn_renamed(name, RENAMED[name])
        found[new] = with_current_keys(value, warn=warn, prefix=f"{name}.") if isinstance(value, dict) else value
    return found
