"""Imports that were documented before modules moved still work, for one release."""

from __future__ import annotations

import importlib
import sys

import pytest

from nayer_edge import data, labels
from nayer_edge.data import datasets
from nayer_edge.labels import class_names
from nayer_edge.models import state_dicts


def test_functions_are_found_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(FutureWarning, match=r"Use nayer_edge\.data\.datasets\.digits"):
        assert data.digits is datasets.digits
    assert labels.read_labels is class_names.read_labels
    monkeypatch.delitem(sys.modules, "nayer_edge.state_dicts", raising=False)
    with pytest.warns(DeprecationWarning, match=r"nayer_edge\.models\.state_dicts"):
        assert importlib.import_module("nayer_edge.state_dicts").read_state_dict is state_dicts.read_state_dict


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="no attribute 'letters'"):
        _ = data.letters
