"""The command line: each command does what its library call does, and errors are one line and exit status 2."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch import Tensor

import qzoo
from qzoo.__main__ import main
from qzoo.models.resnet_cifar import CifarResNet

ROOT = Path(qzoo.__file__).parent.parent


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    assert main(["list", *words]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    return {line.split()[0]: line for line in lines}


def test_list_prints_what_list_models_gives_with_its_figures(
    capsys: pytest.CaptureFixture[str], qzoo_home: Path
) -> None:
    found = listed(capsys, "resnet*")
    assert list(found) == qzoo.list_models("resnet*")
    expected = "0.27 M .*94.75 % of 10,000 .*1.09 MB.*  fmnist fmnist-w2a2_qat .*fmnist-w8a8"
    assert re.search(expected, found["resnet20"])
    assert re.search(r"25.56 M  .*102.23 MB.*-$", found["resnet50"])  # as torchvision counts
    shutil.copytree(
        ROOT / "model_cards" / "resnet32.fmnist-w8a8", qzoo_home / "checkpoints" / "resnet32.fmnist-w8a8"
    )
    found = listed(capsys, "--pretrained", "resnet*")
    assert list(found) == qzoo.list_models("resnet*", pretrained=True)
    assert re.search(
        r"94.75 % of 10,000  94.80 % of 10,000  0.28 MB.*in the package", found["resnet20.fmnist-w8a8"]
    )
    assert found["resnet32.fmnist-w8a8"].endswith(str(qzoo_home / "checkpoints" / "resnet32.fmnist-w8a8"))
    assert re.search(r"25.56 M .*hf:timm/resnet50", found["resnet50.tv_in1k"])
    (qzoo_home / "checkpoints" / "resnet32.fmnist-w8a8" / "config.json").write_text("{}")
    (qzoo_home / "checkpoints" / "resnet32.fmnist-w8a8").rename(qzoo_home / "checkpoints" / "no_net.mine")
    assert "no_net.mine: " in listed(capsys, "--pretrained", "no_net*")["no_net.mine"]
    assert len(listed(capsys, "resnet20")) == 1


def test_import_of_nothing_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--import", "nowhere.py"]) == 2
    assert capsys.readouterr().err == "qzoo: there is no file 'nowhere.py' to import models from\n"


def test_env_names_versions_and_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert qzoo.__version__ in out
    assert "kernels (cpu)" in out


def test_a_wrong_name_is_one_line_that_suggests(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "resnet2O.fmnist-w8a8", "unused.onnx"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("qzoo: ")
    assert "Traceback" not in error


def test_what_the_system_refuses_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["card", "--page", str(tmp_path / "file" / "zoo.md")]) == 2
    assert "Not a directory" in capsys.readouterr().err


def test_evaluate_prints_accuracy_interval_and_fidelity(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "resnet20.fmnist-w8a8", "--subset", "0:256", "-q"]) == 0
    out = capsys.readouterr().out
    assert "256 images, target onnxruntime" in out  # what it was calibrated for
    for word in ("top-1", "95 % interval", "agreement", "SQNR", "float"):
        assert word in out


@pytest.mark.parametrize(("options", "size"), [([], 256), (["--batch-size", "25"], 25)])
def test_evaluate_takes_the_batch_size(
    options: list[str], size: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []
    forward = CifarResNet.forward

    def counted(self: CifarResNet, images: Tensor) -> Tensor:
        seen.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(CifarResNet, "forward", counted)
    assert main(["evaluate", "resnet20.fmnist", "--subset", "0:300", "-q", *options]) == 0
    capsys.readouterr()
    assert max(seen) == size
    assert sum(seen) == 300


def test_export_writes_a_file_that_onnx_runtime_opens(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    assert main(["export", "resnet20.fmnist-w8a8", str(path), "--batch", "1"]) == 0
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [1, 1, 28, 28]


def test_export_of_a_wrong_batch_is_said_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["export", "resnet20.fmnist-w8a8", str(tmp_path / "m.onnx"), "--batch", "many"])
    assert "'dynamic' or a positive number, not 'many'" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["benchmark", "resnet18"], ["env"]])
@pytest.mark.parametrize("threads", ["0", "-1", "two", "99999999999"])
def test_a_wrong_number_of_threads_is_said_in_words(
    command: list[str], threads: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*command, f"--threads={threads}"])
    assert f"must be a whole number of 1 or more, not '{threads}'" in capsys.readouterr().err


def test_what_a_runtime_raises_is_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    """Its own types are no ValueError and no OSError."""

    def fails(*args: object, **kwargs: object) -> None:
        raise type("Fail", (Exception,), {})("no kernel")

    monkeypatch.setattr("qzoo.runtimes.ort.onnxruntime_session", fails)
    path = tmp_path / "m.onnx"
    assert main(["export", "resnet20.fmnist-w8a8", str(path), "--check"]) == 2
    assert f"qzoo: ONNX Runtime can't load '{path}': no kernel" in capsys.readouterr().err


def test_a_refused_argument_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "resnet20.fmnist-w8a8", "--batch", "0"]) == 2
    assert capsys.readouterr().err.startswith("qzoo: batches must be positive")


def test_a_mistake_keeps_its_traceback(tmp_path: Path) -> None:
    """A ValueError that torch raises says nothing to a user without the place where it was raised."""
    (tmp_path / "broken.py").write_text(
        "import sys\nimport qzoo.bench.environment\n"
        "def fails():\n    raise ValueError('Expected more than 1 value per channel')\n"
        "qzoo.bench.environment.describe = fails\n"
        "from qzoo.__main__ import main\nsys.exit(main(['env']))\n"
    )
    result = subprocess.run(
        [sys.executable, tmp_path / "broken.py"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "in fails" in result.stderr


def test_training_without_its_images_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "resnet18.tv_in1k"]) == 2
    assert "pass data=FOLDER (--data FOLDER)" in capsys.readouterr().err


def test_the_module_runs_as_a_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "qzoo", "--help"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0
    assert "benchmark" in result.stdout
