"""Networks of torchvision and timm with sane statistics, and the share of their multiply-adds that runs in int8."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Network:
    """A network of others, and what the two runtimes make of it.

    Attributes:
        name: ``"torchvision:NAME"`` or ``"timm:NAME"``.
        size: the side of the image.
        exact: the runtimes whose result is the simulation's to the bit with powers of two for scales. OpenVINO rounds
            the activations of the others otherwise: SiLU, hard-swish in part, GELU, softmax.
        share: the least part of the multiply-adds of layers with weights that runs in int8.
        images: how many OpenVINO's noise is taken of, where it is not exact; it may be 6 dB above ONNX Runtime's. One
            value that is rounded otherwise makes all the noise of an image, and some images have none.
    """

    name: str
    size: int = 64
    exact: str = "onnxruntime openvino"
    share: float = 0.99
    images: int = 4


ANY = Network("")
_LINEAR = """
torchvision:alexnet torchvision:squeezenet1_1 torchvision:shufflenet_v2_x0_5 torchvision:mnasnet0_5 torchvision:resnet18
torchvision:regnet_y_400mf torchvision:mobilenet_v2 torchvision:mobilenet_v3_small torchvision:densenet121
timm:resnet50 timm:resnetv2_50 timm:seresnet50 timm:resnest14d timm:res2net50_26w_4s timm:vovnet39a timm:dla34
timm:hrnet_w18_small timm:repvgg_a0 timm:mobileone_s0 timm:cspresnet50 timm:darknet53 timm:mobilenetv3_large_100
timm:mobilenetv4_conv_small timm:ghostnetv2_100 timm:lcnet_050 timm:fastvit_t8 timm:nf_resnet26
timm:convmixer_768_32
"""
_OTHERS = """
torchvision:efficientnet_b0 timm:tinynet_e timm:resnext26ts timm:eca_resnet33ts timm:rexnet_100
torchvision:swin_t timm:swinv2_cr_tiny_224 timm:mobilevit_xxs timm:efficientvit_b0
"""
# What LayerNorms and softmax make in float is between two codes now and then.
_NEITHER = """
timm:deit_tiny_patch16_224 timm:vit_tiny_patch16_224 timm:mixer_s32_224 timm:coatnet_nano_rw_224
"""
NETWORKS = (
    *(Network(name) for name in _LINEAR.split()),
    Network("torchvision:vgg11_bn", 32),
    Network("torchvision:googlenet", 96),
    Network("torchvision:inception_v3", 96),
    Network("timm:xception41", 96),
    *(Network(name, exact="onnxruntime") for name in _OTHERS.split()),
    Network("timm:levit_128s", 224, exact="onnxruntime"),
    *(Network(name, exact="") for name in _NEITHER.split()),
    Network("torchvision:maxvit_t", 224, exact=""),
    Network("torchvision:efficientnet_v2_s", exact="onnxruntime"),
    Network("torchvision:convnext_tiny", exact="openvino"),
    Network("timm:convnext_atto", exact="onnxruntime", images=16),
    Network("timm:poolformer_s12", exact="onnxruntime"),
    # Its position embedding is a convolution of constants, which neither runtime has in int8.
    Network("timm:edgenext_xx_small", exact="onnxruntime", share=0.98, images=32),
)
"""The networks of torchvision and timm that are tried, each with the smallest image that it takes."""

_INT8 = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "ConvInteger", "MatMulInteger")


def network(name: str, size: int) -> tuple[nn.Module, Tensor]:
    """``"torchvision:NAME"`` or ``"timm:NAME"`` with seeded weights, BatchNorm statistics of images, and these."""
    where, _, arch = name.partition(":")
    torch.manual_seed(0)
    if where == "torchvision":
        models = __import__("torchvision").models
        options = {"init_weights": True} if arch in ("googlenet", "inception_v3") else {}
        if arch == "inception_v3":
            options["aux_logits"] = False  # that head takes no small images
        model = models.get_model(arch, weights=None, **options)
    else:
        timm = __import__("timm")
        try:
            model = timm.create_model(arch, pretrained=False, img_size=size)
        except TypeError:
            model = timm.create_model(arch, pretrained=False)
    images = torch.randn(4, 3, size, size)
    return with_statistics(model, images), images


@torch.no_grad()
def with_statistics(model: nn.Module, images: Tensor) -> nn.Module:
    """Gives BatchNorm the statistics of the images, and no branch or classifier a weight of zero."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None
        if norm.weight is not None:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not module.weight.any():
            module.reset_parameters()
    for parameter in model.parameters():
        if 0 < parameter.abs().max() <= 1e-3:  # LayerScale as it begins, with which no block counts
            signs = torch.randint(0, 2, parameter.shape) * 2 - 1
            parameter.copy_(signs * 2.0 ** torch.randint(-1, 2, parameter.shape))
    model.train()(images)
    return model.eval()


def share_in_onnxruntime(path: Path, image: Tensor) -> float:
    """Part of the multiply-adds of layers with weights that ONNX Runtime computed in int8, by its profile of a run.

    The products of attention, of two computed tensors, are no layers: what of them is quantized is a matter of the
    target.
    """
    return _share(_onnxruntime_layers(path, image))


def _weights(path: Path) -> dict[str, list[int]]:
    """Shapes of the weights of convolutions, by node. A profile lacks those that ONNX Runtime has packed."""
    graph = onnx.load(path).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    source = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    return {
        node.name: shapes[source.get(node.input[1], node.input[1])]
        for node in graph.node
        if node.op_type == "Conv"
    }


def _onnxruntime_layers(path: Path, image: Tensor) -> Iterator[tuple[int, bool]]:
    from qzoo.runtimes.sessions import onnxruntime_session

    weights = _weights(path)
    session = onnxruntime_session(str(path), 1, profile=path.with_suffix(".profile"))
    session.run(None, {session.get_inputs()[0].name: image.numpy()})
    for event in json.loads(Path(session.end_profiling()).read_text()):
        args = event.get("args", {})
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        op = args["op_name"]
        given, made = (
            [next(iter(entry.values())) for entry in args[f"{side}_type_shape"]]
            for side in ("input", "output")
        )
        if "Conv" in op:
            name = re.sub(r"(_token_\d+|_nchwc)*_kernel_time$", "", event["name"])
            yield math.prod(made[0]) * math.prod(weights[name][1:]), op in _INT8
        elif ("Gemm" in op or "MatMul" in op) and not any(len(shape) > 2 for shape in given[1:]):
            yield math.prod(made[0]) * given[0][-1], op in _INT8


def share_in_openvino(path: Path, image: Tensor) -> float:
    """The same of OpenVINO, by the types of the layers of the graph that it runs: the wider of both operands'."""
    return _share(_openvino_layers(path, image))


def _openvino_layers(path: Path, image: Tensor) -> Iterator[tuple[int, bool]]:
    import openvino

    core = openvino.Core()
    model = core.read_model(str(path))
    model.reshape(list(image.shape))
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    for op in core.compile_model(model, "CPU", settings).get_runtime_model().get_ordered_ops():
        kind = op.get_rt_info()["layerType"].astype(str)
        if kind not in ("Convolution", "Deconvolution", "FullyConnected"):
            continue
        out = math.prod(op.get_output_shape(0))
        int8 = op.get_rt_info()["runtimePrecision"].astype(str) in ("u8", "i8")
        if "onvolution" in kind:
            weight = list(op.input(1).get_shape())
            yield out * math.prod(weight) // op.get_output_shape(0)[1], int8
        else:
            yield out * op.input(0).get_shape()[-1], int8


def _share(layers: Iterator[tuple[int, bool]]) -> float:
    found = list(layers)
    return sum(size for size, int8 in found if int8) / sum(size for size, _ in found)
