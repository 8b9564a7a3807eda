"""The Vision Transformers against timm's, and their quantizers by execution."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections import Counter
from pathlib import Path

import pytest
import timm
import timm.layers
import torch
import torchvision
from references import quantizers, random_state, with_state
from timm.models.vision_transformer import VisionTransformer as Theirs
from torch import nn
from torch.testing import assert_close

import qzoo
from qzoo import registry
from qzoo.cards.card import card
from qzoo.config import FloatSource
from qzoo.errors import DataError
from qzoo.models.vit import VisionTransformer, torchvision_names
from qzoo.pipeline.parts import calibration_images
from qzoo.pipeline.recipes import recipes
from qzoo.preprocessing import Preprocessing
from qzoo.quant.nn import QuantConv2d, QuantLinear
from qzoo.quantizers import quantizers_off, set_target
from qzoo.scheme import Scheme
from qzoo.zoo.request import new_config

TORCHVISION = {
    "vit_b_16": "vit_base_patch16_224",
    "vit_b_32": "vit_base_patch32_224",
    "vit_l_16": "vit_large_patch16_224",
    "vit_l_32": "vit_large_patch32_224",
    "vit_h_14": "vit_huge_patch14_224",
}
DEIT = [f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")]
DEIT3 = [f"deit3_{size}_patch16_224" for size in ("small", "medium", "base", "large")]
DINO = [f"vit_{size}_patch14_dinov2" for size in ("small", "base")]
ARCHITECTURES = ["vit_tiny_patch16_224", "vit_small_patch16_224", *TORCHVISION.values(), *DEIT, *DEIT3, *DINO]


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """timm's network with two blocks, its attention written out, and random weights."""
    timm.layers.set_fused_attn(False)
    try:
        theirs = Theirs(embed_dim=192, depth=2, num_heads=3).eval()
    finally:
        timm.layers.set_fused_attn(True)
    state = random_state(theirs)
    return with_state(theirs, state), state


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("patch", [16, 32])
def test_deit3s_outputs_equal_timms_bit_for_bit(patch: int, images: torch.Tensor) -> None:
    timm.layers.set_fused_attn(False)
    try:
        theirs = Theirs(
            embed_dim=64, depth=2, num_heads=2, patch_size=patch, no_embed_class=True, init_values=1e-6
        )
    finally:
        timm.layers.set_fused_attn(True)
    state = random_state(theirs)
    ours = VisionTransformer(64, 2, depth=2, patch=patch, class_position=False, scale=1e-6)
    models = [with_state(theirs, state), with_state(ours, state)]
    with torch.inference_mode():
        expected, logits = (model(images) for model in models)
        assert torch.equal(logits, expected)
        assert expected.std() > 1e-3
        assert torch.equal(models[1].train()(images), models[0].train()(images))


def test_outputs_equal_timms_bit_for_bit(pair, images) -> None:  # type: ignore[no-untyped-def]
    theirs, state = pair
    plain = with_state(VisionTransformer(192, 3, depth=2), state)
    quantized = with_state(VisionTransformer(192, 3, depth=2, quantize=Scheme()), state)
    assert not quantizers(plain)
    for quantizer in quantizers(quantized).values():
        quantizer.disable()
    with torch.inference_mode():
        expected = theirs(images)
        assert expected.isfinite().all()
        assert expected.std() > 1e-3
        assert torch.equal(plain(images), expected)
        assert torch.equal(quantized(images), expected)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_whole_models_have_timms_parameters(arch: str) -> None:
    entry = registry.architecture(arch)
    with torch.device("meta"):
        theirs = timm.create_model(arch, num_classes=entry.default("num_classes"))
        ours, quantized = entry.build(), entry.build(quantize=Scheme())
    expected = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == expected
    assert {name: value.shape for name, value in quantized.state_dict().items()} == expected
    stated = re.search(r"([\d.]+) M parameters", entry.build.__doc__ or "")
    assert stated is not None
    count = sum(parameter.numel() for parameter in theirs.parameters())
    assert float(stated[1]) == round(count / 1e6, 1)
    heads = {m.num_heads for m in theirs.modules() if hasattr(m, "num_heads")}
    assert {m.heads for m in ours.modules() if hasattr(m, "heads")} == heads


@pytest.fixture(scope="module")
def encoders() -> list[nn.Module]:
    """timm's DINOv2, with two blocks and on small images, and ours, float and quantized, with the same weights."""
    size = {"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 14, "img_size": 56}
    timm.layers.set_fused_attn(False)
    try:
        theirs = Theirs(**size, num_classes=0, init_values=1e-5)
    finally:
        timm.layers.set_fused_attn(True)
    state = random_state(theirs)
    schemes = (None, Scheme())
    ours = [
        VisionTransformer(64, 2, depth=2, image=56, patch=14, scale=1e-5, num_classes=0, quantize=scheme)
        for scheme in schemes
    ]
    return [with_state(model, state) for model in (theirs, *ours)]


def test_dinov2s_features_equal_timms_bit_for_bit(encoders: list[nn.Module]) -> None:
    x = torch.rand(3, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), quantizers_off(encoders[2]):
        expected, *features = (model(x) for model in encoders)
    assert expected.shape == (3, 64)
    assert expected.std() > 1e-3
    assert all(torch.equal(found, expected) for found in features)
    modes = [model.train() for model in encoders]
    with torch.no_grad(), quantizers_off(encoders[2]):
        expected, *features = (model(x) for model in modes)
    assert all(torch.equal(found, expected) for found in features)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_an_encoder_runs_in_the_runtimes(encoders: list[nn.Module], target: str, tmp_path: Path) -> None:
    """Calibrated and exported, features point where the float ones do, and have the same neighbours."""
    pytest.importorskip(target)
    exact, model = encoders[1].eval(), set_target(copy.deepcopy(encoders[2]).eval(), target)
    batches = torch.randn(48, 3, 56, 56, generator=torch.Generator().manual_seed(2)).split(16)
    qzoo.calibrate(model, batches[:1], progress=False)
    run = qzoo.deploy(model, target, example=batches[0])
    found = qzoo.compare_features(run, batches, reference=exact, progress=False)
    assert (found.images, found.neighbours) == (48, 5)
    assert 0.99 < found.lowest_cosine < found.cosine < 1
    assert found.neighbour_agreement > 80
    simulated = qzoo.compare_features(run, batches, reference=model, progress=False)
    assert simulated.sqnr_db > found.sqnr_db


def test_an_encoder_by_its_name() -> None:
    """There is no classifier unless one is asked for, and nothing that has classes takes it."""
    config = new_config("vit_small_patch14_dinov2.lvd142m-w8a8")
    assert config.is_encoder
    assert config.preprocessing.input_size == (3, 518, 518)
    text = card(dataclasses.replace(config, float_source=FloatSource("hf:a/b", "", "", "apache-2.0")))
    assert "features = model(batch)[0]" in text
    assert "pipeline_tag: image-feature-extraction" in text
    assert "classes" not in text
    with torch.device("meta"):
        entry = registry.architecture("vit_small_patch14_dinov2")
        assert entry.build(num_classes=5).head.out_features == 5
        encoder = entry.build()
    encoder.qzoo_config = config  # type: ignore[assignment]
    with pytest.raises(DataError, match=r"image encoder.*compare_features"):
        qzoo.evaluate(encoder, [])
    with pytest.raises(DataError, match=r"no classes.*compare_features"):
        calibration_images(config, "photos", None)
    assert config.name not in [recipe.name for recipe in recipes()]
    published = {"mask_token": 1, "norm.bias": 2}
    assert entry.key_map is not None
    assert entry.key_map(published) == {"norm.bias": 2}


@pytest.mark.parametrize("arch", [*DEIT, *DEIT3, *DINO])
def test_weights_are_timms(arch: str) -> None:
    tag = "lvd142m" if arch in DINO else "fb_in1k"
    ours, theirs = registry.architecture(arch).weights[tag], timm.get_pretrained_cfg(f"{arch}.{tag}")
    assert theirs.url in ours.sources
    assert ours.preprocessing == Preprocessing(
        theirs.input_size, theirs.crop_pct, theirs.interpolation, theirs.mean, theirs.std
    )


@pytest.mark.parametrize("published", [False, True])
def test_torchvisions_weights_give_its_outputs(published: bool, images: torch.Tensor) -> None:
    theirs = torchvision.models.VisionTransformer(224, 16, 2, 3, 192, 768).eval()
    state = random_state(theirs)
    theirs = with_state(theirs, state)
    if published:  # the file is older than torchvision's present names of the two linear layers
        state = {
            k.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): v for k, v in state.items()
        }
    renamed = torchvision_names(state)
    ours = with_state(VisionTransformer(192, 3, depth=2), renamed)
    with torch.inference_mode():
        expected = theirs(images)
        assert expected.std() > 1e-3
        assert_close(ours(images), expected, rtol=1e-4, atol=1e-5)
    assert torchvision_names(renamed) == renamed


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_network_has_the_parameters_of_ours(name: str) -> None:
    with torch.device("meta"):
        theirs, ours = torchvision.models.get_model(name), registry.architecture(name).build()
    assert registry.canonical(name) == TORCHVISION[name]
    renamed = {name: value.shape for name, value in torchvision_names(theirs.state_dict()).items()}
    assert renamed == {name: value.shape for name, value in ours.state_dict().items()}


def test_quantizers_are_where_the_products_are(pair, images) -> None:  # type: ignore[no-untyped-def]
    model = with_state(VisionTransformer(192, 3, depth=2, quantize=Scheme()), pair[1])
    roles = {name: (q.role, q.nonnegative) for name, q in quantizers(model).items()}
    weighted = [m for m in model.modules() if isinstance(m, QuantConv2d | QuantLinear)]
    assert len(weighted) == 2 * 4 + 2
    block = {
        name: role for name, role in roles.items() if name.startswith("blocks.1.") and "_quantizer" in name
    }
    assert Counter(role for role, _ in block.values() if role != "weight") == {
        "input": 4,
        "product": 4,
        "stream": 4,
    }
    assert [name for name, (_, positive) in block.items() if positive] == ["blocks.1.attn.softmax_quantizer"]
    lowest: dict[str, float] = {}
    hooks = [
        q.register_forward_pre_hook(lambda m, args, name=name: lowest.update({name: args[0].min().item()}))
        for name, q in quantizers(model).items()
    ]
    for quantizer in quantizers(model).values():
        quantizer.dynamic = True
    with torch.inference_mode():
        set_target(model, "onnxruntime")
        error = model(images) - pair[0](images)
        expected = pair[0](images)
    for hook in hooks:
        hook.remove()
    assert lowest.keys() == roles.keys()
    assert all(lowest[name] >= 0 for name, (_, positive) in roles.items() if positive)
    assert 0 < error.square().sum() < 0.1 * expected.square().sum()
