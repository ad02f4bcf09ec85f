"""Deprecated: `nayer_edge.models.state_dicts` by its former name, for one release."""

from __future__ import annotations

import warnings

from nayer_edge.models.state_dicts import read_state_dict

__all__ = ["read_state_dict"]

warnings.warn("nayer_edge.state_dicts is now nayer_edge.models.state_dicts", DeprecationWarning, stacklevel=2)
