"""Every runtime gives the same logits behind one interface; what is missing or wrong is named."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from torch import nn

from qzoo import runtimes
from qzoo.deployment import load
from qzoo.errors import ExportError, MissingDependencyError
from qzoo.export import export_onnx


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return nn.Sequential(*layers, nn.Linear(8, 5)).eval()


@pytest.fixture(scope="module")
def path(model: nn.Module, tmp_path_factory) -> Path:
    return export_onnx(model, tmp_path_factory.mktemp("m") / "model.onnx", example=torch.zeros(1, 3, 8, 8))


@pytest.fixture(params=[name for name in runtimes.installed() if name != "torch.compile"])
def runner(request, model: nn.Module, path: Path) -> runtimes.Runner:
    return runtimes.load(model if request.param == "pytorch" else path, request.param)


def test_same_logits_at_any_batch_size(runner: runtimes.Runner, model: nn.Module) -> None:
    for batch in (1, 3, 8):
        images = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(runner(images), model(images), rtol=1e-4, atol=1e-5)


def test_strided_input(runner: runtimes.Runner, model: nn.Module) -> None:
    images = torch.randn(4, 8, 8, 3).permute(0, 3, 1, 2)
    with torch.no_grad():
        torch.testing.assert_close(runner(images), model(images), rtol=1e-4, atol=1e-5)


def test_results_are_kept_and_threads_do_not_mix(runner: runtimes.Runner) -> None:
    """A later or a concurrent call must not write into an earlier call's result."""
    batches = [torch.randn(2, 3, 8, 8) for _ in range(24)]
    expected = [runner(images).clone() for images in batches]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(runner, batches))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_module_is_exported_on_the_way(model: nn.Module) -> None:
    images = torch.randn(2, 3, 8, 8)
    run = load(model, "onnxruntime", 2, images)
    assert run.threads == 2
    with torch.no_grad():
        torch.testing.assert_close(run(images), model(images), rtol=1e-4, atol=1e-5)


def test_pytorch_takes_a_copy_and_gives_threads_back(model: nn.Module) -> None:
    before = torch.get_num_threads()
    run = runtimes.load(model.train(), "pytorch", threads=before + 1)
    assert model.training
    run(torch.zeros(1, 3, 8, 8))
    assert torch.get_num_threads() == before
    model.eval()


def test_numbers_of_threads_do_not_mix(model: nn.Module) -> None:
    """The number is the process's: of two calls that change it at once, one would put back the other's."""
    before = torch.get_num_threads()
    runs = [runtimes.load(model, "pytorch", threads=before + extra) for extra in (0, 1, 2)]
    images = torch.randn(2, 3, 8, 8)
    with ThreadPoolExecutor(6) as pool:
        for _ in pool.map(lambda i: runs[i % 3](images), range(300)):
            pass
        assert set(pool.map(lambda _: torch.get_num_threads(), range(60))) == {before}
    with ThreadPoolExecutor(1) as fresh:
        assert fresh.submit(torch.get_num_threads).result() == before


def test_missing_package_names_the_install_line(monkeypatch, path: Path) -> None:
    monkeypatch.setattr("qzoo.runtimes.base.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'qzoo\[onnx\]'"):
        runtimes.load(path, "onnxruntime")
    with pytest.raises(MissingDependencyError, match=r"pip install 'qzoo\[onnx,openvino\]'"):
        runtimes.load(path, "openvino")


FILES = [name for name in ("onnxruntime", "openvino") if name in runtimes.installed()]


def ends(place: Path, nodes: list[onnx.NodeProto], inputs: str, outputs: str) -> Path:
    """A file with these inputs and outputs, one letter each."""
    value = partial(onnx.helper.make_tensor_value_info, elem_type=onnx.TensorProto.FLOAT, shape=[2])
    graph = onnx.helper.make_graph(nodes, "g", [value(x) for x in inputs], [value(y) for y in outputs])
    opset = onnx.helper.make_opsetid("", 18)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), place)
    return place


@pytest.mark.parametrize("runtime", FILES)
def test_files_with_several_ends_are_refused(tmp_path: Path, runtime: str) -> None:
    """Not silently run for the first of their outputs."""
    node = onnx.helper.make_node
    two = ends(tmp_path / "two.onnx", [node("Relu", ["a"], ["y"]), node("Abs", ["a"], ["z"])], "a", "yz")
    with pytest.raises(ExportError, match=r"two\.onnx' has 2 outputs \(y, z\)"):
        runtimes.load(two, runtime)
    with pytest.raises(ExportError, match=r"has 2 inputs \(a, b\)"):
        runtimes.load(ends(tmp_path / "in.onnx", [node("Add", ["a", "b"], ["y"])], "ab", "y"), runtime)


@pytest.mark.parametrize("runtime", FILES)
def test_what_a_runtime_raises_is_an_export_error(tmp_path: Path, path: Path, runtime: str) -> None:
    """The types that runtimes raise have no base in common."""
    (tmp_path / "junk.onnx").write_bytes(b"junk" * 9)
    with pytest.raises(ExportError, match=r"can't load '.*junk\.onnx': [^\n]*$"):
        runtimes.load(tmp_path / "junk.onnx", runtime)
    run = runtimes.load(path, runtime)
    broken = SimpleNamespace(run=_fails, infer=_fails)
    if runtime == "onnxruntime":
        run._session = broken
    else:
        run._local.request = broken
    with pytest.raises(ExportError, match=r"could not run images \[1, 3, 8, 8\]: out of memory"):
        run(torch.zeros(1, 3, 8, 8))


def _fails(*args: object, **kwargs: object) -> None:
    raise RuntimeError("Exception from core.cpp:132:\nout of memory")


def test_refusals(path: Path, model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pytorch, torch\.compile, onnxruntime"):
        runtimes.load(path, "tflite")
    with pytest.raises(ExportError, match="modules"):
        runtimes.load(path, "pytorch")
    with pytest.raises(TypeError, match=r"onnxruntime runs ONNX files, not Sequential; qzoo\.deploy"):
        runtimes.load(model, "onnxruntime")
    with pytest.raises(FileNotFoundError, match=r"nothing\.onnx"):
        runtimes.load(tmp_path / "nothing.onnx")
    for runtime in ("pytorch", "onnxruntime"):  # before the export, which would ask for an example
        with pytest.raises(ValueError, match="threads must be at least 1, not 0"):
            load(model, runtime, threads=0)
        for threads in ("2", 2.0, True):
            with pytest.raises(TypeError, match="threads must be a whole number"):
                load(model, runtime, threads=threads)
        with pytest.raises(TypeError, match="must be a module, not None"):
            load(None, runtime)
