"""Teachers of a program: their names, and where their networks can be built."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nayer_edge.config import InputSpec
from nayer_edge.errors import UsageError
from nayer_edge.models import in_memory
from nayer_edge.models.load import build_classifier
from nayer_edge.models.names import parse

NAME = "memory:Net@0123456789abcdef"
SPEC = InputSpec(channels=1, height=8, width=8)
CLASSES = ("one", "two")


def test_names() -> None:
    parsed = parse(NAME)
    assert (parsed.source, parsed.name, parsed.revision, parsed.local) == ("memory", "Net", "0123456789abcdef", False)
    assert parsed.whole == NAME
    assert in_memory.name_of(nn.Linear(1, 1), "f" * 64) == f"memory:Linear@{'f' * in_memory.DIGEST_LENGTH}"
    for wrong in ("memory:Net", "memory:Net@1", "memory:@0123456789abcdef", "memory:a/b@0123456789abcdef"):
        with pytest.raises(UsageError, match="no model source"):
            parse(wrong)


@pytest.mark.parametrize("name", ["hf:microsoft/resnet-18@abc", "timm:resnet18@32", "nayer:resnet8", "python:a.b:make"])
def test_the_whole_name_is_what_was_parsed(name: str) -> None:
    assert parse(name).whole == name


def test_a_network_is_built_where_it_is_held_and_as_a_copy() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(UsageError, match="is not available"):
        build_classifier(NAME, SPEC, CLASSES)
    with in_memory.holding(NAME, network):
        built = build_classifier(NAME, SPEC, CLASSES)
        again = build_classifier("memory:Net", SPEC, CLASSES, rebuild=built.rebuild)
        with pytest.raises(UsageError, match=r"nayer_edge\.open"):
            build_classifier("memory:Net@fedcba9876543210", SPEC, CLASSES)
        with torch.device("meta"):
            assert next(build_classifier(NAME, SPEC, CLASSES).parameters()).device.type == "cpu"
    assert built.model == again.model == "memory:Net"
    assert built.backbone is not network
    with torch.no_grad():
        next(built.backbone.parameters()).zero_()
    assert next(again.backbone.parameters()).abs().sum() > 0
    assert next(network.parameters()).abs().sum() > 0
    assert not in_memory.is_held(NAME)
