"""The command line: each command does what its library call does, and errors are one line and exit status 2."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from small_data import write_folder
from torch import Tensor

import qzoo
from qzoo.__main__ import COMMANDS, main
from qzoo.commands import say
from qzoo.config import config_of
from qzoo.data import load_data
from qzoo.models.resnet_cifar import CifarResNet
from qzoo.progress import track

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


def test_an_onnx_file_is_evaluated_as_what_it_says_of_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against a session of ONNX Runtime; the second file takes 16 images at a time, and has no metadata."""
    onnxruntime = pytest.importorskip("onnxruntime")
    paths = [tmp_path / name for name in ("int8.onnx", "float.onnx", "foreign.onnx")]
    model = qzoo.load_pretrained("resnet20.fmnist-w8a8")
    qzoo.export_onnx(model, paths[0], target="onnxruntime")
    qzoo.export_onnx(qzoo.load_pretrained("resnet20.fmnist"), paths[1], batch=16)
    images, labels = next(iter(load_data(config_of(model).preprocessing, "fashion-mnist", batch_size=40)))
    found, exact = [], []
    for path, logits in ((paths[0], found), (paths[1], exact)):
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for start in (0, 16, 24):
            batch = images[start : start + 16].numpy()
            rows = session.run(None, {session.get_inputs()[0].name: batch})[0]
            logits.append(rows[8:] if start == 24 else rows)
    ours, theirs = (np.concatenate(parts) for parts in (found, exact))
    assert main(["evaluate", str(paths[0]), "--float", str(paths[1]), "--subset", ":40", "-q"]) == 0
    out = capsys.readouterr().out
    assert "40 images, target onnxruntime" in out
    assert f"top-1      {100 * (ours.argmax(1) == labels.numpy()).mean():.2f} %" in out
    assert f"agreement  {100 * (ours.argmax(1) == theirs.argmax(1)).mean():.2f} %" in out
    noise = ((ours - theirs) ** 2).sum(dtype=np.float64)
    sqnr = re.search(r"SQNR +([\d.]+) dB", out)
    assert sqnr is not None
    assert float(sqnr[1]) == pytest.approx(10 * np.log10((theirs**2).sum(dtype=np.float64) / noise), abs=0.02)
    file = onnx.load(paths[1])
    del file.metadata_props[:]
    onnx.save(file, paths[2])
    assert main(["evaluate", str(paths[2]), "--dataset", "fashion-mnist", "--subset", ":40", "-q"]) == 0
    out = capsys.readouterr().out
    assert "the file does not say how its images are prepared; 1 x 28 x 28, mean 0.5 and" in out
    assert main(["evaluate", str(paths[2]), "-q"]) == 2
    assert "pass data=FOLDER (--data FOLDER)" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"no protobuf", None])
def test_what_is_no_onnx_file_is_said_in_words(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "x.onnx").write_bytes(content)
    for command in ("evaluate", "benchmark"):
        assert main([command, str(tmp_path / "x.onnx"), "-q"]) == 2
        assert "x.onnx" in capsys.readouterr().err


def test_export_of_a_wrong_batch_is_said_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["export", "resnet20.fmnist-w8a8", str(tmp_path / "m.onnx"), "--batch", "many"])
    assert "'dynamic' or a positive number, not 'many'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["benchmark", "survey"])
def test_the_help_says_what_threads_are_for_where_calls_are_timed(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("--threads THREADS threads that a timed call may use (default: 1)") == 1
    assert "default: all cores" not in text


@pytest.mark.parametrize("command", [["benchmark", "resnet18"], ["survey"], ["env"]])
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
    assert main(["benchmark", "resnet20.fmnist-w8a8", "--runtimes", "tflite"]) == 2
    assert capsys.readouterr().err.startswith("qzoo: no runtime 'tflite'; expected some of")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["list", "nosuch*"], "no architecture matches 'nosuch*'; without a pattern all are listed"),
        (["list", "nosuch*", "--pretrained"], "no name with weights matches 'nosuch*'; without"),
        (
            ["sensitivity", "no.such-w8a8", "--out", "nodir/x.json"],
            "--out nodir/x.json: give a file in a folder",
        ),
        (["card", "--page", "nodir/x.md"], "No such file or directory: 'nodir/x.md'"),
        (["calibrate", "resnet20.fmnist-w8a8", "--out", "file"], "out must be a folder, and file is a file"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_can_not_be_done_is_said_before_anything_is(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert main(words) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not said.out
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_more_processes_than_the_machine_can_take_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    most = 4 * (os.cpu_count() or 1)
    with pytest.raises(SystemExit):
        main(["evaluate", "resnet20.fmnist-w8a8", "--workers", str(most + 1)])
    assert (
        f"must be at most {most}, four for each of this machine's cores, not {most + 1}"
        in capsys.readouterr().err
    )


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


HOSTILE = (
    *(
        "cpuinfo",
        "faulthandler",
        "huggingface_hub",
        "json",
        "matplotlib",
        "numpy",
        "onnx",
        "onnxruntime",
        "onnxscript",
    ),
    *("openvino", "PIL", "psutil", "qzoo", "random", "rich", "safetensors", "sitecustomize", "timm", "torch"),
    *("torchvision", "typing", "usercustomize", "yaml", "zlib"),
)


@pytest.mark.slow
def test_no_command_runs_python_files_of_the_current_folder(tmp_path: Path) -> None:
    """As the console script has it, whose folder is first on the path; also in the processes that commands start."""
    folder, script = tmp_path / "hostile", tmp_path / "bin" / "run.py"
    for place in (folder, script.parent):
        place.mkdir()
    for name in HOSTILE:
        (folder / f"{name}.py").write_text(
            f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\nraise SystemExit('the file {name}.py was run')\n"
        )
    write_folder(folder / "pets", ("cat", "dog"), 20)
    Image.new("RGB", (40, 30), "teal").save(folder / "photo.png")
    name, made = "resnet20.pets-w8a8", ["--float", "float", "--data", "pets", "--method", "max"]
    trained = ["--epochs", "1", "--batch-size", "8", "--workers", "1", "--out", "float"]
    lines = [
        ["list"],
        ["env"],
        ["train", "resnet20.pets", "--dataset", "folders", "--data", "pets", *trained],
        ["calibrate", name, *made, "--out", "calibrated"],
        ["build", name, *made, "--out", "built", "--workers", "1"],
        ["predict", "photo.png", "--model", "built"],
        [
            "benchmark",
            "built",
            "--data",
            "pets",
            "--float",
            "float",
            "--batch",
            "1",
            "--seconds",
            "0.01",
            "--out",
            "report",
        ],
        ["evaluate", "built", "--data", "pets", "--float", "float", "--workers", "1"],
        ["inspect", "built", "--data", "pets", "--images", "2"],
        ["sensitivity", "built", "--data", "pets", "--images", "2"],
        ["export", "built", "model.onnx", "--check"],
        ["lint", "model.onnx", "--target", "onnxruntime"],
        ["card", "built"],
        ["publish", "built", "--dry-run"],
        ["verify", "built", "--data", "pets"],
    ]
    assert {line[0] for line in lines} == set(COMMANDS)
    script.write_text(
        "import json, sys\nfrom qzoo.__main__ import main\n"
        "for argv in json.loads(sys.argv[1]):\n    print(argv[0], main([*argv, '-q']), file=sys.stderr, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, script, json.dumps(lines)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()
    for line in lines:
        assert f"{line[0]} 0\n" in result.stderr, result.stderr


def test_the_module_runs_as_a_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "qzoo", "--help"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0
    assert "benchmark" in result.stdout


def test_the_module_runs_no_python_files_of_the_current_folder(tmp_path: Path) -> None:
    for name in (*HOSTILE, "argparse", "contextlib", "collections", "platform"):
        # Python imports these itself, or qzoo from here, before qzoo's first line (SECURITY.md)
        if name not in ("qzoo", "typing", "sitecustomize", "usercustomize", "zlib"):
            (tmp_path / f"{name}.py").write_text("raise SystemExit('it ran ' + __name__)\n")
    result = subprocess.run(
        [sys.executable, "-m", "qzoo", "env"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "kernels (cpu)" in result.stdout


def test_what_is_printed_moves_no_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "x\x1b[2J\x1b]0;title\x07\u202e"
    value = onnx.helper.make_tensor_value_info("v", onnx.TensorProto.FLOAT, [1, 3, 8, 8])
    weight = onnx.numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "w")
    node = onnx.helper.make_node("Conv", ["v", "w"], ["y"], name=name)
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph([node], "g", [value], [out], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    onnx.save(model, tmp_path / f"{name[:4]}.onnx")
    main(["lint", str(tmp_path / f"{name[:4]}.onnx")])
    main(["evaluate", name, "--data", name])
    main(["lint", name])
    said = "".join(capsys.readouterr())
    assert "x\\x1b[2J" in said
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", said)


def test_tables_warnings_and_bars_move_no_cursor(
    qzoo_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "x\x1b[2J\r\u202e"
    net = tmp_path / "net.py"
    net.write_text(f"import warnings\nprint(warnings.formatwarning({name!r}, UserWarning, {name!r}, 1))\n")
    (qzoo_home / "checkpoints" / f"resnet20.{name}").mkdir(parents=True)
    config = json.loads((ROOT / "model_cards" / "resnet20.fmnist-w8a8" / "config.json").read_text())
    for folder in (f"resnet20.{name}", "resnet20.mine-w8a8"):
        (qzoo_home / "checkpoints" / folder).mkdir(parents=True, exist_ok=True)
        changed = json.dumps({**config, "architecture": name})
        (qzoo_home / "checkpoints" / folder / "config.json").write_text(changed)
    main(["list", "--pretrained", "--import", str(net)])
    with pytest.raises(SystemExit):
        main(["list", "--" + name, name, name])
    list(track([1], f"[link=x]{name}"))
    say(name)
    said = "".join(capsys.readouterr())
    assert said.count("x\\x1b[2J\\r\\u202e") >= 4
    assert "[link=x]" in said
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", said)


def test_commands_print_by_say_alone() -> None:
    for path in Path(qzoo.commands.__file__).parent.glob("[a-z]*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
                assert "file=sys.stderr" in ast.unparse(node), f"{path.name}:{node.lineno}"
