"""The zoo's hand-written definitions are the oracle: ``qzoo.quantize`` of the float one has their quantizers."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import qzoo
from qzoo.quantizers import quantizers, quantizers_off
from qzoo.registry import architecture, list_architectures

CHEAP = (
    *("resnet20", "resnet18", "mobilenet_v2", "tf_efficientnet_lite0", "deit_tiny_patch16_224"),
    *("squeezenet1_1", "mnasnet0_5"),
)
# Their adaptive pooling to 7 x 7 or 6 x 6 changes nothing at the size that they are for.
POOLED = ("vgg", "alexnet")
ALL = [name if name in CHEAP else pytest.param(name, marks=pytest.mark.slow) for name in list_architectures()]


def seen(model: nn.Module, image: Tensor) -> Counter[tuple[object, ...]]:
    """What each quantizer is given, whatever the order of its values, and what it makes of it.

    Zeros are not counted: whether a padding comes before or behind a quantizer is the same.
    """
    found: Counter[tuple[object, ...]] = Counter()

    def hook(quantizer, args) -> None:
        values = args[0][args[0] != 0].sort().values.numpy().tobytes()
        settings = (
            quantizer.role,
            quantizer.nonnegative,
            quantizer.num_bits,
            quantizer.axis,
            quantizer.symmetric,
        )
        found[(*settings, quantizer.narrow_range, hashlib.sha256(values).hexdigest())] += 1

    for quantizer in quantizers(model).values():
        quantizer.register_forward_pre_hook(hook)
    with torch.no_grad(), quantizers_off(model):
        model(image)
    return found


def without_roles_of_transformers(found: Counter[tuple[object, ...]]) -> Counter[tuple[object, ...]]:
    """Products are inputs, and the two inputs of an add are alike."""
    same = {"product": "input", "stream": "add", "residual": "add", "branch": "add"}
    plain: Counter[tuple[object, ...]] = Counter()
    for (role, *rest), count in found.items():
        plain[(same.get(str(role), role), *rest)] += count
    return plain


@pytest.mark.parametrize("name", ALL)
def test_the_same_quantizers_at_the_same_tensors(name: str) -> None:
    torch.manual_seed(0)
    entry = architecture(name)
    # quantize() takes no convolution before a pooling for the last layer, which has 8 bits in the definition.
    bits = 8 if name.startswith("squeezenet") else 4
    plain = entry.build(num_classes=10, in_channels=3, quantize=None).eval()
    by_hand = entry.build(num_classes=10, in_channels=3, quantize=qzoo.Scheme(bits, bits)).eval()
    by_hand.load_state_dict(plain.state_dict())
    transformer = "_patch16_" in name
    size = 224 if transformer or name.startswith(POOLED) else 64
    image = torch.randn(1, 3, size, size)
    made = seen(qzoo.quantize(plain, image, f"w{bits}a{bits}"), image)
    wanted = seen(by_hand, image)
    if transformer:  # quantize() does not know the roles of its definition: the places are the same
        made, wanted = without_roles_of_transformers(made), without_roles_of_transformers(wanted)
    assert [key[:6] for key in (wanted - made).elements()] == [], "only the definition has these"
    more = made - wanted
    if transformer:
        # ONNX Runtime runs the convolution of the patches in int8 only with a Q behind, which the definition has not.
        assert [key[0] for key in more.elements()] == ["activation"]
    else:
        assert [key[:6] for key in more.elements()] == []
