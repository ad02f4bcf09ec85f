"""Tensors in files: networks that register a module under two names."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from nayer_edge.storage.tensors import load_tensors, save_tensors


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.layers = nn.Sequential(self.first, nn.ReLU())


def test_a_module_under_two_names(tmp_path: Path) -> None:
    network = Twice()
    weight = torch.arange(12.0).reshape(3, 4)
    tensors = {**network.state_dict(), "part": weight[1], "whole": weight, "empty": weight[:0]}
    save_tensors(tmp_path / "w.safetensors", tensors)
    found = load_tensors(tmp_path / "w.safetensors", "weights")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    network.load_state_dict({name: found[name] for name in network.state_dict()})
