"""What an export does before and behind torch's exporter: the same graph as the exporter's own, in less time."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from onnxscript import optimizer, rewriter
from torch import Tensor, nn

import qzoo
from qzoo.export import passes
from qzoo.runtimes import load


class Network(nn.Module):
    """What rules exist for: a BatchNorm, a Pad, reshapes, transpositions, clips one behind another, a product."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.depthwise, self.fc = nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(F.pad(x, (0, 1, 0, 1)))).relu().clamp(0, 6)
        first, second = x.chunk(2, 1)
        x = torch.cat([second * 1.0, first + 0.0], 1)
        x = self.depthwise(x).flatten(2).transpose(1, 2).permute(0, 2, 1)
        x = x.reshape(x.shape[0], 4, 2, -1).reshape(x.shape[0], 8, -1).transpose(1, 2)
        return self.fc(((x @ x.transpose(1, 2)).softmax(-1).to(torch.float32) @ x).mean(1))


def test_simplify_is_the_exporters_optimization() -> None:
    torch.manual_seed(0)
    program = torch.onnx.export(
        Network().eval(),
        (torch.randn(2, 3, 8, 8),),
        dynamo=True,
        dynamic_shapes=({0: "batch"},),
        verbose=False,
        optimize=False,
    )
    assert program is not None
    own, theirs = (ir.from_proto(program.model_proto) for _ in range(2))
    before = len(own.graph)
    passes.simplify(own)
    optimizer.optimize(theirs)
    assert len(own.graph) < before
    assert ir.to_proto(own).SerializeToString(deterministic=True) == ir.to_proto(theirs).SerializeToString(
        deterministic=True
    )


def test_the_rule_that_is_left_out_exists() -> None:
    """Else its time comes back under another name."""
    assert [rule.name for rule in rewriter._DEFAULT_REWRITE_RULES].count("SlicesSplit") == 1
    slow = [r.name for r in rewriter._DEFAULT_REWRITE_RULES if not r._target_pattern.has_single_output_node]
    assert slow == ["SlicesSplit"]


def test_an_onnxscript_without_that_list_of_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list has a private name; without it the exporter's own optimization runs whole."""
    model, seen = ir.Model(ir.Graph([], [], nodes=[]), ir_version=10), []
    monkeypatch.delattr(rewriter, "_DEFAULT_REWRITE_RULES")
    monkeypatch.setattr(optimizer, "optimize", seen.append)
    passes.simplify(model)
    assert seen == [model]


class OldName(nn.Module):
    """Overwrites a tensor, and reads it on under its old name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.Hardswish(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.act(x)
        return x.mean((2, 3))


class NewName(OldName):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x)).mean((2, 3))


@pytest.mark.parametrize("kind", [OldName, NewName])
def test_hard_swish_in_place(kind: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, image = kind().eval(), torch.randn(2, 3, 8, 8)
    path = qzoo.export_onnx(model, tmp_path / "model.onnx", example=image)
    with torch.no_grad():
        torch.testing.assert_close(load(path, "onnxruntime")(image), model(image), rtol=1e-5, atol=1e-6)
    assert model.get_submodule("act").inplace
