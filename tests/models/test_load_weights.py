"""Float weights under the names of others: all of them, or a message that says which do not fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from references import random_state
from safetensors.torch import save_file

import qzoo
from qzoo import registry
from qzoo.errors import CheckpointError, UnknownModelError
from qzoo.quantizers import quantizers, quantizers_off
from qzoo.zoo.create import create_model
from qzoo.zoo.sources import under_own_names

ALIASES = [
    (alias, name) for name in registry.list_architectures() for alias in registry.architecture(name).aliases
]

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return random_state(qzoo.resnet20())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ""])
def test_own_names_from_a_file_or_a_state_dict(suffix: str, state: dict, tmp_path: Path) -> None:
    source: Path | dict = tmp_path / f"weights{suffix}" if suffix else state
    if suffix == ".safetensors":
        save_file(state, source)
    elif suffix:
        torch.save({"state_dict": state}, source)
    model = qzoo.resnet20(quantize=True)
    weight = model.conv1.weight
    assert qzoo.load_weights(model, source) is model
    assert model.conv1.weight is weight  # an optimizer that has it keeps it
    assert dict.fromkeys(state, True) == {
        key: torch.equal(model.state_dict()[key], state[key]) for key in state
    }


def test_ranges_of_other_weights_are_forgotten(state: dict) -> None:
    model = qzoo.create_model("resnet20.fmnist-w8a8", pretrained=True)
    saved = model.state_dict()
    own = {key: value for key, value in saved.items() if not key.endswith("_amax")}
    assert len(own) < len(saved)
    qzoo.load_weights(model, own)
    assert all(quantizer.amax is None for quantizer in quantizers(model).values())
    qzoo.load_weights(model, saved)  # with its ranges
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
    assert len(model.state_dict()) == len(saved)


def test_what_does_not_fit_is_listed_and_the_model_is_as_before(state: dict, tmp_path: Path) -> None:
    model = qzoo.resnet20()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state["conv1.weight"] = state["conv1.weight"][:3]
    state["head.bias"] = state.pop("fc.bias")
    with pytest.raises(CheckpointError) as error:
        qzoo.load_weights(model, state)
    for part in ("missing: fc.bias", "unexpected: head.bias", "misshaped: conv1.weight [3, 3, 3, 3]"):
        assert part in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match="can't be read as tensors"):
        qzoo.load_weights(model, "no-such.pth")
    torch.save(model, tmp_path / "whole.pth")
    with pytest.raises(
        CheckpointError, match=r"^[^\n]*whole.pth can't be read as tensors: [^\n]*state_dict\(\)$"
    ):
        qzoo.load_weights(model, tmp_path / "whole.pth")
    with pytest.raises(TypeError, match=r"source must be a state dict, .* not a CifarResNet"):
        qzoo.load_weights(model, model)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_swins_of_timm_are_torchvisions(name: str) -> None:
    theirs = timm.create_model(name).eval()
    image = torch.randn(1, *theirs.pretrained_cfg["input_size"])
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.1)
        ours = qzoo.load_weights(qzoo.create_model(name).eval(), theirs.state_dict())
        assert torch.equal(ours(image), theirs(image))


@pytest.mark.parametrize(
    ("alias", "name"),
    [*(pair for pair in ALIASES if pair[0] in timm.list_models()), ("vgg11_bn", "vgg11_bn")],
)
def test_timms_network_has_the_parameters_of_ours(alias: str, name: str) -> None:
    entry = registry.architecture(name)
    with torch.device("meta"):
        theirs, ours = timm.create_model(alias).state_dict(), entry.build().state_dict()
    renamed = under_own_names(theirs, ours, entry.key_map)
    assert {key: value.shape for key, value in renamed.items()} == {k: v.shape for k, v in ours.items()}
    if entry.key_map is not None:
        assert entry.key_map(ours).keys() == ours.keys()  # what has our names already keeps them


SMALL = [
    (alias, name, 64)
    for alias, name in (
        ("mobilenetv2_100", "mobilenet_v2"),
        ("mnasnet_050", "mnasnet0_5"),
        ("mobilenetv3_small_100", "mobilenet_v3_small"),
        ("regnety_004", "regnet_y_400mf"),
        ("efficientnet_b0", "efficientnet_b0"),
    )
]


@pytest.mark.parametrize(("alias", "name", "size"), SMALL)
def test_timms_weights_give_its_outputs(alias: str, name: str, size: int) -> None:
    theirs = timm.create_model(alias).eval()
    state = random_state(theirs)
    theirs.load_state_dict(state)
    ours = qzoo.load_weights(create_model(alias, quantize=True), state).eval()
    assert ours.qzoo_config.architecture == name
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), quantizers_off(ours):
        expected = theirs(x)
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages.1.1.conv_1x1.bn.bias": None}, r"missing: stages\.1\.1\.conv_1x1\.bn\.bias;"),
        ({"stem.conv_kxk.conv.weight": None}, r"missing: stem\.conv_kxk\.conv\.weight;"),
        (
            {f"stages.0.1.identity.{entry}": None for entry in NORM},
            r"missing: stages\.0\.1\.identity\.running_mean, ",
        ),
        ({"stages.0.0.identity.bias": torch.zeros(48)}, r"unexpected: stages\.0\.0\.identity\.bias;"),
        (
            {"stem.conv_1x1.conv.weight": torch.zeros(2, 2)},
            r"misshaped: stem\.conv_1x1\.conv\.weight \[2, 2\]",
        ),
        (
            {"stem.conv_kxk.conv.weight": torch.zeros(2, 2)},
            r"misshaped: stem\.conv_kxk\.conv\.weight \[2, 2\]",
        ),
    ],
)
def test_branches_of_a_repvgg_that_can_not_be_added_up_are_named(change: dict, message: str) -> None:
    state = {**timm.create_model("repvgg_a0").state_dict(), **change}
    state = {key: value for key, value in state.items() if value is not None}
    with pytest.raises(CheckpointError, match=f"the state dict: the branches .*{message}"):
        qzoo.load_weights(qzoo.repvgg_a0_reparam(), state)


def test_a_key_map_that_fails_is_a_checkpoint_error() -> None:
    state = timm.create_model("swinv2_tiny_window8_256").state_dict()
    del state["layers.0.blocks.0.attn.q_bias"]
    with pytest.raises(CheckpointError, match=r"missing: features\.1\.0\.attn\.qkv\.bias,"):
        qzoo.load_weights(qzoo.swin_v2_t(), state)
    state = timm.create_model("mobilenetv3_small_100").state_dict()
    state["bn1.running_var"] = torch.ones(3)
    with pytest.raises(
        CheckpointError, match=r"can't be given the model's names \(RuntimeError: .*whole state"
    ):
        qzoo.load_weights(qzoo.mobilenet_v3_small(), state)


def test_a_wrapped_state_dict_loads_from_memory_as_from_a_file(state: dict, tmp_path: Path) -> None:
    for wrapper in ("state_dict", "model"):
        model = qzoo.load_weights(qzoo.resnet20(), {"epoch": 3, wrapper: state})
        assert torch.equal(model.conv1.weight, state["conv1.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"fc.bias": 3},
            r"other things than named tensors, 'fc\.bias' \(int\); save or pass model\.state_dict\(\)$",
        ),
        ({3: torch.zeros(1)}, r"other things than named tensors, '3' \(int as a name\);"),
        (
            {"fc.bias": torch.zeros(10, dtype=torch.float64)},
            r"of another type: fc\.bias torch\.float64 \(the model",
        ),
        ({"fc.bias": torch.zeros(9).half()}, r"misshaped: fc\.bias \[9\]"),
    ],
)
def test_what_is_no_float_tensor_is_named(change: dict, message: str, state: dict, tmp_path: Path) -> None:
    torch.save({**state, **change}, tmp_path / "weights.pth")
    for source in ({**state, **change}, tmp_path / "weights.pth"):
        with pytest.raises(CheckpointError, match=message):
            qzoo.load_weights(qzoo.resnet20(), source)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_floats_become_what_the_model_has(dtype: torch.dtype, state: dict, tmp_path: Path) -> None:
    narrow = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    torch.save(narrow, tmp_path / "weights.pth")
    for source in (narrow, tmp_path / "weights.pth"):
        model = qzoo.load_weights(qzoo.resnet20(), source)
        assert model.conv1.weight.dtype == torch.float32
        assert all(torch.equal(value, narrow[key].to(value)) for key, value in model.state_dict().items())
    same = qzoo.load_weights(qzoo.resnet20().to(dtype), narrow)
    assert same.conv1.weight.dtype == dtype


def test_levits_with_convolutions_are_ours_with_linear_layers() -> None:
    theirs = timm.create_model("levit_conv_128s").eval()
    state = random_state(theirs)
    theirs.load_state_dict(state)
    assert state["stages.0.blocks.0.mlp.ln1.linear.weight"].dim() == 4
    ours = qzoo.load_weights(create_model("levit_conv_128s"), state).eval()
    assert ours.qzoo_config.architecture == "levit_128s"
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = theirs(x)
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_deit3_loads_facebooks_file_and_timms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = timm.create_model("deit3_small_patch16_224").state_dict()
    published = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", key): value for key, value in theirs.items()}
    assert "blocks.0.gamma_1" in published
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("QZOO_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save({"model": published}, tmp_path / "hub" / "checkpoints" / "deit_3_small_224_1k.pth")
    models = [qzoo.create_model("deit3_small_patch16_224", pretrained=True)]
    models += [qzoo.load_weights(qzoo.deit3_small_patch16_224(), state) for state in (published, theirs)]
    for model in models:
        assert all(torch.equal(value, theirs[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("alias", ["efficientnet_b5", "efficientnetv2_s"])
def test_deep_networks_of_timm_give_its_outputs_in_float64(alias: str) -> None:
    """With random weights float32 is not enough for more than a hundred layers."""
    theirs = timm.create_model(alias).eval()
    theirs.load_state_dict(random_state(theirs))
    theirs.double()
    ours = qzoo.load_weights(create_model(alias).double(), theirs.state_dict()).eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = theirs(x)
        torch.testing.assert_close(ours(x), expected, rtol=1e-7, atol=1e-7 * expected.abs().max().item())


@pytest.mark.parametrize(
    "alias",
    [
        *(f"efficientnet_b{number}" for number in (4, 5, 6, 7)),
        *(f"efficientnetv2_{size}" for size in "sml"),
        "mobilenetv3_small_100",
        "mobilenetv3_large_100",
    ],
)
def test_timms_epsilon_goes_into_the_scale_of_the_norms(alias: str) -> None:
    entry = registry.architecture(alias)
    with torch.device("meta"):
        theirs, ours = timm.create_model(alias), entry.build()
    (epsilon,), (own,) = ({m.eps for m in net.modules() if hasattr(m, "eps")} for net in (theirs, ours))
    variance = 2e-4
    state = {
        key: torch.full((1, 1, 1, 1), variance if key.endswith("running_var") else 1.0)
        for key in theirs.state_dict()
    }
    assert entry.key_map is not None
    renamed = entry.key_map(state)
    norms = [key.removesuffix("running_var") for key in renamed if key.endswith("running_var")]
    assert len(norms) == sum(isinstance(m, torch.nn.BatchNorm2d) for m in ours.modules())
    expected = ((variance + own) / (variance + epsilon)) ** 0.5
    assert [renamed[f"{norm}weight"].item() for norm in norms] == pytest.approx([expected] * len(norms))
    torchvisions = dict.fromkeys(ours.state_dict(), torch.ones(1))
    assert entry.key_map(torchvisions) == torchvisions


def test_a_trained_repvgg_becomes_the_deployed_one() -> None:
    theirs = timm.create_model("repvgg_a0").eval()
    state = random_state(theirs)
    theirs.load_state_dict(state)
    ours = qzoo.load_weights(create_model("repvgg_a0_reparam"), state).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = theirs(x)
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_aliases_are_names_wherever_names_are(capsys: pytest.CaptureFixture[str]) -> None:
    from qzoo.__main__ import main

    assert registry.parse_name("vit_b_16.tv_in1k-w8a8").arch == "vit_base_patch16_224"
    assert qzoo.mnasnet_050(num_classes=3).qzoo_config.name == "mnasnet0_5"
    assert registry.list_architectures("mnasnet_05*") == ["mnasnet0_5"]
    assert qzoo.list_models("vit_b_16", pretrained=True) == ["vit_base_patch16_224.tv_in1k"]
    for pattern in ("vit_b_16.tv_in1k", "vit_b_16.*", "vit_?_16.tv_in1k", "vit_base_patch16_224.tv*"):
        assert "vit_base_patch16_224.tv_in1k" in qzoo.list_models(pattern, pretrained=True)
    assert qzoo.list_models("vit_b_16.tv", pretrained=True) == []
    assert "mnasnet_050" not in dir(qzoo)
    assert main(["list", "mobilenetv2_100"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("mobilenet_v2 ")
    assert main(["list", "--pretrained", "mobilenetv2_100.tv_in1k"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("mobilenet_v2.tv_in1k ")
    with pytest.raises(UnknownModelError, match="did you mean 'vit_b_16'"):
        create_model("vit_b_16_")
    with pytest.raises(AttributeError, match="did you mean 'mnasnet_050'"):
        assert qzoo.mnasnet_0500


def test_no_two_networks_share_a_name() -> None:
    names = registry.known_names()
    assert len(names) == len(set(names))
