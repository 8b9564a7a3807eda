"""What every family is tested for: torchvision's or timm's outputs, int8 kernels of two runtimes, and exactness."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import timm
import torch
import torchvision
from exact import make_exact_, on_levels
from qdq_graphs import read_precision
from references import mini, quantizers, random_state
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

import qzoo
from qzoo.accuracy import Fidelity
from qzoo.export import export_onnx, lint
from qzoo.quant.nn import QuantConv2d, QuantLinear
from qzoo.registry import architecture
from qzoo.runtimes.ort import OnnxRuntimeRunner
from qzoo.runtimes.ov import OpenVinoRunner
from qzoo.scheme import Scheme

RUNNERS = (("onnxruntime", OnnxRuntimeRunner), ("openvino", OpenVinoRunner))
LAYERS_OF_OPENVINO = ("Convolution", "FullyConnected", "MatMul")


def images(size: int, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def off(model: nn.Module) -> nn.Module:
    """The model with every quantizer off."""
    for quantizer in quantizers(model).values():
        quantizer.disable()
    return model


def _reference(arch: str) -> nn.Module:
    """torchvision's network, or else timm's."""
    if arch.endswith("_mini"):
        return mini(arch)
    if arch.endswith("_reparam"):
        return reparameterize_model(timm.create_model(arch.removesuffix("_reparam")))
    names = [arch, *architecture(arch).aliases]
    known = [name for name in names if name in torchvision.models.list_models()]
    if not known:
        model = timm.create_model(next(name for name in names if timm.is_model(name)))
        for module in model.modules():
            if hasattr(module, "fused_attn"):  # whose kernel rounds in its own way
                module.fused_attn = False
        return model
    inception = {"aux_logits": False, "init_weights": False}
    options = inception if arch in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(known[0], weights=None, **options)


def three(arch: str, theirs: nn.Module | None = None) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The reference, ours, and ours with quantizers that are off: the same weights, each its own."""
    entry = architecture(arch)
    # RegNet computes its widths with tensors; timm's LeViT has numbers that are not in its state.
    with torch.device("cpu" if arch.startswith(("regnet", "levit")) else "meta"):
        theirs = theirs or _reference(arch)
    with torch.device("meta"):
        models = theirs, entry.build(), entry.build(quantize=Scheme())
    state = random_state(theirs)
    renamed = state if entry.key_map is None else entry.key_map(state)
    for model, entries in zip(models, (state, renamed, renamed), strict=True):
        own = model.state_dict()  # with the version of its layout, which torchvision's MNASNet asks for
        assert own.keys() == entries.keys()
        own.update({key: value.clone() for key, value in entries.items()})
        model.load_state_dict(own, assign=True)
    return models[0], models[1], off(models[2])


def is_the_reference_in_eval_and_in_training(
    arch: str, size: int, training_size: int | None = None, theirs: nn.Module | None = None
) -> None:
    """Equal outputs to the bit, and equal statistics after a step of training."""
    models = three(arch, theirs)
    count = sum(parameter.numel() for parameter in models[0].parameters())
    stated = (architecture(arch).build.__doc__ or "").partition(" M parameters")[0].rpartition(" ")[2]
    assert float(stated) == round(count / 1e6, 1)
    with torch.inference_mode():
        expected, *ours = (model.eval()(images(size)) for model in models)
    assert expected.isfinite().all()
    assert expected.std() > 1e-3
    assert all(torch.equal(logits, expected) for logits in ours)
    outputs = []
    for model in models:
        torch.manual_seed(0)
        with torch.no_grad():
            outputs.append(model.train()(images(training_size or size)))
    expected, *ours = (output[0] if isinstance(output, tuple) else output for output in outputs)
    assert all(torch.equal(logits, expected) for logits in ours)
    key_map = architecture(arch).key_map
    state = models[0].state_dict()
    state = state if key_map is None else key_map(state)
    for model in models[1:]:
        assert [name for name, a in model.state_dict().items() if not torch.equal(a, state[name])] == []


def calibrated(arch: str, size: int, target: str, exact: bool = True) -> tuple[nn.Module, Tensor]:
    """A small classifier's random weights, BatchNorm statistics and ranges of the images; exact by construction."""
    torch.manual_seed(0)
    entry = architecture(arch)
    classes = 20 if entry.default("num_classes") else 0  # an encoder has none
    model, batch = entry.build(num_classes=classes, quantize=entry.scheme("w8a8", target)), images(size)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    switches = [(quantizer, quantizer.switches) for quantizer in quantizers(model).values()]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = None
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.1)
        if norms:
            off(model).train()
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.eval()
            model(images(size, 8))
        for quantizer, kept in switches:
            quantizer.switches = kept
        qzoo.calibrate(model.eval(), [batch], method="max")
        if exact:
            make_exact_(model, target, batch, even=True)
    return model, batch


def ranges(model: nn.Module, size: int) -> Counter[tuple[str, bool, float]]:
    """Role, sign and range of each quantizer of activations."""
    qzoo.calibrate(model.eval(), [images(size)], method="mse")
    return Counter(
        (q.role, q.nonnegative, float(q.amax))
        for q in quantizers(model).values()
        if q.role != "weight" and q.amax is not None
    )


def runs_in_int8_in_onnxruntime(
    arch: str,
    size: int,
    folder: Path,
    floats: tuple[str, ...] = (),
    rules: tuple[str, ...] = (),
    exact: bool = True,
) -> Counter[str]:
    """Every layer has an integer kernel and nothing but the operators ``floats`` is float.

    Args:
        exact: the outputs equal the simulation.

    Returns:
        The executed operators.
    """
    model, batch = calibrated(arch, size, "onnxruntime")
    with torch.inference_mode():
        expected = model(batch)
    assert len(expected.unique()) > 5, "a constant output would agree with anything"
    path = export_onnx(model, folder / "model.onnx", example=batch)
    assert {finding.rule for finding in lint(path, "onnxruntime")} <= set(rules)
    for level in ("none", "all"):
        got = OnnxRuntimeRunner(path, level=level, optimized=folder / "optimized.onnx")(batch)
        assert not exact or torch.equal(torch.as_tensor(got), expected), level
    ops = _executed(folder / "optimized.onnx")
    _has_integer_layers(ops, model)
    moves = {"Reshape", "Flatten", "Transpose", "Pad", "Split", "Slice", "MaxPool", "NhwcMaxPool"}
    moves |= {"ReorderInput", "ReorderOutput"}  # of the channels, for a pooling
    moves |= {"Shape", "Gather", "Squeeze", "Unsqueeze", "Range"}  # how many images
    integer = {op for op in ops if op.startswith(("QLinear", "QGemm", "MatMulInteger", "average"))}
    assert ops.keys() - integer - moves - {"QuantizeLinear", "DequantizeLinear"} == set(floats)
    if not floats:
        assert (ops["QuantizeLinear"], ops["DequantizeLinear"]) == (1, 1)
    return ops


def _executed(optimized: Path) -> Counter[str]:
    """The operators that ONNX Runtime executes; "average" is a convolution by ones."""
    nodes = onnx.load(optimized).graph.node
    return Counter(
        "average" if any(name.endswith("_ones_quantized") for name in node.input) else node.op_type
        for node in nodes
    )


def _has_integer_layers(ops: Counter[str], model: nn.Module) -> None:
    """ONNX Runtime executes an integer kernel for each layer and product, and no layer in float."""
    executed = sum(ops[kind] for kind in ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat"))
    split = sum(name.endswith("qkv") for name, _ in model.named_modules())  # in three: query, key and value
    products = sum(2 * q.is_on for name, q in quantizers(model).items() if name.endswith("softmax_quantizer"))
    assert _layers(model) + products <= executed <= _layers(model) + products + 2 * split
    assert not {"Conv", "FusedConv", "Gemm", "FusedGemm"} & ops.keys()


def _layers(model: nn.Module) -> int:
    return sum(isinstance(m, QuantConv2d | QuantLinear) for m in model.modules())


def runs_in_int8_in_openvino(
    arch: str, size: int, folder: Path, rules: tuple[str, ...] = (), exact: bool = True
) -> None:
    """Every layer reads 8-bit integers in the graph that OpenVINO executes; ``exact``: equal to the simulation."""
    pytest.importorskip("openvino")
    model, batch = calibrated(arch, size, "openvino")
    batch = on_levels(model, batch)
    with torch.inference_mode():
        expected = model(batch)
    path = export_onnx(model, folder / "model.onnx", example=batch, target="openvino")
    assert {finding.rule for finding in lint(path, "openvino")} <= set(rules)
    run = OpenVinoRunner(path)
    if exact:
        assert torch.equal(run(batch), expected)
    _reads_integers(run.compiled, model)


def _reads_integers(compiled: Any, model: nn.Module) -> None:
    """In what OpenVINO executes every layer reads integers; a layer that reads no image is computed once, at load."""
    called: set[str] = set()
    precisions = []
    for op in compiled.get_runtime_model().get_ordered_ops():
        kind = op.get_rt_info()["layerType"].astype(str)
        sources = [value.get_source_output().get_node().get_friendly_name() for value in op.inputs()]
        if kind == "Input" or called.intersection(sources):
            called.add(op.get_friendly_name())
            precisions += [read_precision(op)] if kind in LAYERS_OF_OPENVINO else []
    assert len(precisions) >= _layers(model)  # products of matrices are of these types, and some averages
    assert set(precisions) <= {"u8", "i8"}


def is_exact(arch: str, size: int, folder: Path) -> None:
    """The outputs of both runtimes equal the simulation."""
    pytest.importorskip("openvino")
    for target, runner in RUNNERS:
        model, batch = calibrated(arch, size, target)
        batch = on_levels(model, batch)
        with torch.inference_mode():
            expected = model(batch)
        assert len(expected.unique()) > 5, "a constant output would agree with anything"
        path = export_onnx(model, folder / "model.onnx", example=batch, target=target)
        assert torch.equal(torch.as_tensor(runner(path)(batch)), expected), target


def runs_in_int8_whatever_the_batch(arch: str, size: int, folder: Path) -> None:
    """A file of any batch, as it is and made fixed by the runtime, and a file of batch 1: all layers are integer."""
    openvino = pytest.importorskip("openvino")
    for target in ("onnxruntime", "openvino"):
        model, batch = calibrated(arch, size, target, exact=False)
        for size_of_batch, fixed in (("dynamic", False), ("dynamic", True), (1, False)):
            path = folder / f"{target}-{size_of_batch}.onnx"
            if not path.exists():
                export_onnx(model, path, example=batch, target=target, batch=size_of_batch)  # type: ignore[arg-type]
            if target == "onnxruntime":
                options = onnxruntime.SessionOptions()
                options.optimized_model_filepath = str(folder / "optimized.onnx")
                if fixed:
                    name = onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_param
                    options.add_free_dimension_override_by_name(name, 1)
                onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
                _has_integer_layers(_executed(folder / "optimized.onnx"), model)
            else:
                core = openvino.Core()
                read = core.read_model(path)
                if fixed:
                    read.reshape([1, 3, size, size])
                compiled = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
                _reads_integers(compiled, model)


def is_as_near_in_openvino(arch: str, size: int, folder: Path) -> None:
    """OpenVINO's noise against its simulation is at most 6 dB above ONNX Runtime's against its own.

    In some networks one value that is rounded otherwise makes all the noise of an image, and many images have none:
    where the first few say something else, 32 are taken.
    """
    pytest.importorskip("openvino")
    assert any(_noise_in_openvino(arch, size, folder, more) < 6 for more in (0, 30))


def _noise_in_openvino(arch: str, size: int, folder: Path, more: int) -> float:
    """How far OpenVINO's noise is above ONNX Runtime's, in dB, on a batch and so many images of noise."""
    sqnr = {}
    for target, runner in RUNNERS:
        model, batch = calibrated(arch, size, target, exact=False)
        torch.manual_seed(0)
        noise = batch.mean() + batch.std() * torch.randn(more, *batch.shape[1:])
        given = torch.cat([batch, noise])
        with torch.inference_mode():
            expected = model(given)
        path = export_onnx(model, folder / "ordinary.onnx", example=batch, target=target)
        sqnr[target] = Fidelity.of(torch.as_tensor(runner(path)(given)), expected).sqnr_db
    return sqnr["onnxruntime"] - sqnr["openvino"]


def is_clean_for_tensorrt(arch: str, size: int, folder: Path, rules: tuple[str, ...] = ()) -> None:
    """Lint has nothing to say of the file but ``rules``."""
    model, batch = calibrated(arch, size, "tensorrt", exact=False)
    path = export_onnx(model, folder / "model.onnx", example=batch, target="tensorrt")
    assert [str(finding) for finding in lint(path, "tensorrt") if finding.rule not in rules] == []
