"""The core under torch's own machinery: compile, export, inference mode, autocast, memory formats, copies."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from small_data import calibrate_as_in_the_guide
from torch import nn

from qzoo.quant import TensorQuantizer, quantize_, tensor_quant
from qzoo.quant import nn as qnn
from qzoo.quant.tensor_quant import QuantDescriptor

pytestmark = pytest.mark.filterwarnings("ignore")


def net(calibrated=True, **descriptors):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    quantize_(model, **descriptors)
    if calibrated:
        calibrate_as_in_the_guide(model, image())
    return model


def image(n=2):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


DESCRIPTORS = [
    {},
    {"quant_desc_input": QuantDescriptor((4, 3)), "quant_desc_weight": QuantDescriptor((4, 3), axis=0)},
    {"quant_desc_weight": QuantDescriptor(4, axis=0, block=(1, 1))},
    {"quant_desc_input": QuantDescriptor(learn_amax=True, amax=2.0)},
]


@pytest.mark.parametrize("calibrated", [True, False], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("descriptors", DESCRIPTORS, ids=["int8", "fp8", "block", "learned"])
def test_compiles_without_a_graph_break(descriptors, calibrated):
    model = net(calibrated, **descriptors)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = image().requires_grad_()
    y = compiled(x)
    expected = model(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    (wanted,) = torch.autograd.grad(expected.sum(), x)
    (found,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("calibrated", [True, False], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("descriptors", DESCRIPTORS, ids=["int8", "fp8", "block", "learned"])
def test_inductor_in_one_graph_forward_and_backward(descriptors, calibrated):
    torch._dynamo.reset()
    model = net(calibrated, **descriptors)
    same = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for n in (2, 5, 3):
        # not at the largest value of the calibration data, where the last bit decides whether a gradient passes
        x = (0.9 * image(n)).requires_grad_()
        other = x.detach().clone().requires_grad_()
        y, expected = compiled(x), same(other)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        y.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-5)
    for a, b in zip(model.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["graph_break"] == {}


def test_functions_compile_without_a_graph_break():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(x, amax):
        y = tensor_quant.fake_tensor_quant(x, amax, 8, False, True)
        q, scale = tensor_quant.tensor_quant(x, amax)
        return y, q / scale, tensor_quant.scaled_e4m3(x, amax)

    x, amax = torch.randn(4, 5), torch.tensor(1.5)
    y, z, e = f(x, amax)
    assert torch.equal(y, tensor_quant.fake_tensor_quant(x, amax))
    torch.testing.assert_close(z, y)
    assert torch.equal(e, tensor_quant.scaled_e4m3(x, amax))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("descriptors", DESCRIPTORS, ids=["int8", "fp8", "block", "learned"])
def test_exports_with_a_dynamic_batch(descriptors, strict):
    model = net(**descriptors).eval()
    program = torch.export.export(
        model, (image(),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=strict
    )
    x = image(5)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-6)
    assert "qzoo.fake_quantize" in str(program.graph)


def test_inference_mode_and_then_training():
    model = net(False)
    with torch.inference_mode():
        model(image())
        calibrate_as_in_the_guide(model, image())
        inside = model(image())
    model(image()).sum().backward()
    assert torch.equal(model(image()), inside)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_keeps_ranges_and_rounding_in_float32(dtype):
    quantizer = TensorQuantizer(QuantDescriptor(amax=1e-3))
    x = torch.randn(64) * 1e-3
    with torch.autocast("cpu", dtype):
        y = quantizer(x.to(dtype))
        assert y.dtype == dtype
        assert torch.equal(y, quantizer(x.to(dtype).float()).to(dtype))
        out = net()(image())
    assert torch.isfinite(out).all()


def test_channels_last_is_kept():
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    for desc in (QuantDescriptor(), QuantDescriptor(axis=1), QuantDescriptor((4, 3))):
        y = TensorQuantizer(desc)(x)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(y, TensorQuantizer(desc)(x.detach().contiguous()))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.is_contiguous(memory_format=torch.channels_last)


def test_meta_device():
    model = nn.Sequential(
        qnn.QuantConv2d(3, 4, 3, device="meta"),
        qnn.QuantConv2d(4, 4, 3, device="meta", dtype=torch.float16).float(),
    )
    assert model(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 4, 4, 4)
    with torch.device("meta"):
        whole = qnn.QuantLinear(3, 4, quant_desc_input=QuantDescriptor(amax=1.0))
    assert whole.input_quantizer.amax.is_meta
    assert whole(torch.empty(5, 3, device="meta")).shape == (5, 4)
    whole.to_empty(device="cpu").load_state_dict(
        qnn.QuantLinear(3, 4, quant_desc_input=QuantDescriptor(amax=2.0)).state_dict()
    )
    assert whole.input_quantizer.amax.item() == 2.0
    repr(whole)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies(how):
    model = net()
    model[0].input_quantizer.role = "input"
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert torch.equal(model(image()), other(image()))
    assert other[0].input_quantizer.role == "input"
    assert other[0].input_quantizer.amax is not model[0].input_quantizer.amax


def test_state_moves_from_a_calibrated_to_a_fresh_model():
    model, fresh = net(), net(False)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model(image()), fresh(image()))


def test_real_quantization_and_checks_are_eager_only():
    quantizer = TensorQuantizer(QuantDescriptor(amax=1.0, unsigned=True))
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    assert compiled(torch.tensor([-1.0, 1.0])).tolist() == [0.0, 1.0]


def test_data_parallel_replicas_share_the_ranges():
    model = net()
    replica = copy.copy(model[0])
    assert torch.equal(replica(image()), model[0](image()))
    wrapped = nn.DataParallel(model)  # without a GPU it calls the module
    assert torch.equal(wrapped(image()), model(image()))


def test_optimizer_step_moves_the_weights():
    model = net()
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(image()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, model[0].weight)


def test_import_is_light_and_changes_nothing():
    code = (
        "import logging, sys, torch; conv = torch.nn.Conv2d; handlers = list(logging.root.handlers);"
        "import qzoo.quant;"
        "heavy = {'torchvision', 'timm', 'onnx', 'onnxscript', 'matplotlib', 'huggingface_hub'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "assert torch.nn.Conv2d is conv and logging.root.handlers == handlers"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_fx_records_static_quantizers():
    model = net().eval()
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(image(3)), model(image(3)))
    assert "qzoo.fake_quantize" in str(traced.graph)


def test_real_quantization_exports():
    quantizer = TensorQuantizer(QuantDescriptor(amax=1.0, fake_quant=False))
    x = torch.randn(4, 3)
    program = torch.export.export(quantizer, (x,))
    assert quantizer.scale is None
    assert torch.equal(program.module()(x), quantizer(x))


def test_quantizers_of_a_model_quantized_in_place_know_their_names():
    model = net(False)
    model[4].input_quantizer.dynamic = False
    with pytest.raises(RuntimeError, match=r"4\._input_quantizer"):
        model(image())


def _train_on_half(rank, store, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net())
        wrapped(image(4)[2 * rank : 2 * rank + 2]).square().mean().backward()
        torch.save([p.grad for p in wrapped.module.parameters()], f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    torch.multiprocessing.spawn(_train_on_half, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    model = net()
    model(image(4)).square().mean().backward()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for a, b, p in zip(first, second, model.parameters(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, p.grad)


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = net()
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        wrapped(image()).sum().backward()
        model(image()).sum().backward()
        for a, b in zip(wrapped.module.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "desc", [QuantDescriptor(amax=1.0), QuantDescriptor((4, 3), amax=1.0)], ids=["int8", "fp8"]
)
def test_derivatives_of_torch_func_are_those_of_autograd(desc):
    quantizer, x = TensorQuantizer(desc), torch.tensor([[-2.0, -0.5, 0.25], [1.0, 3.0, 0.0]])
    passes = (x.abs() <= 1).float()
    assert torch.equal(torch.func.grad(lambda t: quantizer(t).sum())(x), passes)
    assert torch.equal(torch.vmap(torch.func.grad(lambda t: quantizer(t).sum()))(x), passes)
    y, tangent = torch.func.jvp(quantizer, (x,), (torch.full_like(x, 2.0),))
    assert torch.equal(y, quantizer(x))
    assert torch.equal(tangent, 2 * passes)
    second = torch.func.grad(lambda t: torch.func.grad(lambda s: (quantizer(s) ** 2).sum())(t).sum())(x)
    assert torch.equal(second, 2 * passes)


@pytest.mark.parametrize("descriptors", DESCRIPTORS[:3], ids=["int8", "fp8", "block"])
def test_gradients_of_single_samples(descriptors):
    model, x = net(**descriptors), image(3)
    parameters = dict(model.named_parameters())

    def loss(values, one):
        return torch.func.functional_call(model, values, (one[None],)).square().sum()

    found = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i in range(len(x)):
        model.zero_grad()
        model(x[i : i + 1]).square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name][i], parameter.grad, rtol=1e-4, atol=1e-5)
