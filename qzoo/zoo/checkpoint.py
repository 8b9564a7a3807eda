"""Checkpoint folders: ``config.json`` and ``model.safetensors``, written atomically, loaded strictly.

Two forms. *Master*: the float weights as trained, to go on from. *Packed*: each quantized weight as its
integers or 8-bit floats, everything else in columns (:mod:`qzoo.zoo.packing`). Weights that were quantized and come
back are a fixed point of the quantizer, so a packed model's quantized outputs equal the master's to the last
bit.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from qzoo.config import WEIGHTS, Config, config_of, read_config
from qzoo.errors import ArgumentError, CheckpointError, QuantizationError
from qzoo.files import place, scratch_beside
from qzoo.quant.nn import QuantConv2d, QuantLinear, TensorQuantizer
from qzoo.quantizers import name_quantizers, quantizers, set_layer_bits, weight_quantizers
from qzoo.registry import architecture
from qzoo.scheme import TARGETS, Scheme, with_target
from qzoo.version import __version__
from qzoo.zoo import hub, packing
from qzoo.zoo.tensors import assign_state, check_finite, check_ranges, expected_tensors, is_range, range_fits

_OWN_FACTORY = "name a function that builds this one, qzoo.quantize(..., factory='FILE.py:FUNCTION')"


def save_pretrained(
    model: nn.Module, folder: str | Path, *, form: str | None = None, config: Config | None = None
) -> Path:
    """Save a model as a checkpoint folder: ``config.json`` and weights.

    A new folder appears at once or not at all. In an existing one the weights are replaced first and
    config.json, which holds their SHA-256, last: whoever loads in between gets an error, never a mixture.

    Args:
        model: float, or quantized with a range in every quantizer.
        folder: where to write.
        form: "packed" (the default of quantized models) or "master".
        config: what to write; ``model.qzoo_config`` by default. Form, files and version are filled in here.

    Returns:
        The folder.

    Raises:
        CheckpointError: no config, a quantizer without a finite range or that differs from the scheme, parameters
            that are not float32, not finite, or not those of the config's architecture, or a folder that can't be
            written.

    Example:
        >>> folder = qzoo.save_pretrained(model, "my-resnet20")
        >>> sorted(path.name for path in folder.iterdir())
        ['config.json', 'model.safetensors']
    """
    config = config if config is not None else config_of(model)
    form = form or ("packed" if config.scheme else "master")
    if form not in ("master", "packed") or (form == "packed" and config.scheme is None):
        raise CheckpointError(f"form is {form!r}; expected 'master', or 'packed' for a quantized model")
    check_ranges(model)
    added = tuple(name for name, module in model.named_modules() if getattr(module, "bias_added", False))
    config = dataclasses.replace(config, biases=added)
    if not config.factory.partition(":")[0].endswith(".py"):  # a file's network can't be built here
        try:
            built = empty_model(config, config.scheme)
        except QuantizationError as error:
            raise CheckpointError(
                f"{config.factory} builds another network: {error}; {_OWN_FACTORY}"
            ) from error
        _check_quantizers(model, built, config)
        _check_shapes(model, built, config)
    state = _state(model)
    tensors = packing.packed_state(model, state) if form == "packed" else state
    config = dataclasses.replace(config, form=form, qzoo_version=__version__)
    return _write(Path(folder), tensors, config)


def load_pretrained(
    where: str | Path,
    *,
    target: str | None = None,
    model: nn.Module | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> nn.Module:
    """Load a checkpoint from a folder, the zoo or the Hugging Face Hub.

    Args:
        where: a folder, the name of a zoo checkpoint, or a Hub repository ``"org/name"``.
        target: the runtime that the quantizers simulate; by default the one it was made for
            (:attr:`qzoo.config.Config.target`).
        model: the float network, for a checkpoint of :func:`qzoo.quantize` whose network is in a file of its author's:
            a checkpoint runs no code. It stays as it is.
        revision: of a Hub repository.
        cache_dir, token, local_files_only: for the Hub, see :class:`qzoo.zoo.hub.Access`.

    Returns:
        The module, in eval mode, with its :class:`~qzoo.config.Config` as ``qzoo_config``.

    Raises:
        CheckpointError: the folder is incomplete or altered, or tensors are missing, unexpected or misshaped.
        UnknownModelError, HubError: see :func:`qzoo.zoo.hub.locate`.

    Example:
        >>> model = qzoo.load_pretrained("resnet20.fmnist-w8a8", target="openvino")
        >>> model.qzoo_config.architecture
        'resnet20'
    """
    folder = hub.locate(where, revision, hub.Access(cache_dir, token, local_files_only))
    config = read_config(folder)
    scheme = with_target(config.scheme, target or config.target) if config.scheme else None
    try:
        loaded = empty_model(config, scheme, model)
    except QuantizationError as error:  # a layer that the architecture does not have
        raise CheckpointError(f"{folder}: config.json: {error}") from error
    checked = _check_weights_file(folder, config, loaded)
    assign_state(loaded, _read_tensors(folder / WEIGHTS, loaded, config), str(folder))
    if _identity(folder / WEIGHTS) != checked:
        raise CheckpointError(f"{folder / WEIGHTS} was replaced while it was read; load it again")
    check_ranges(loaded)
    return loaded.eval()


def empty_model(config: Config, scheme: Scheme | None, given: nn.Module | None = None) -> nn.Module:
    """Build the config's architecture without memory for its parameters, to assign loaded tensors to.

    What :func:`qzoo.quantize` made is made again, in memory; of the ``given`` network where there is one.
    """
    if config.factory:
        from qzoo.placement.factory import network_of  # late: networks of the zoo's own don't wait for these
        from qzoo.placement.model import with_quantizers

        model = network_of(config) if given is None else copy.deepcopy(given)
        if config.plain_relu:
            replace_relu6(model)
        if scheme is not None:
            example = torch.zeros(1, *config.preprocessing.input_size)
            model, *_ = with_quantizers(model, example, scheme, config.exclude)
            _add_biases(model, config.biases)
        model.qzoo_config = config  # type: ignore[assignment]
        return model
    if given is not None:
        raise ArgumentError(f"{config.name} is of the zoo's {config.architecture}; load it without model=")
    with torch.device("meta"):
        return build(config, scheme)


def build(config: Config, scheme: Scheme | None) -> nn.Module:
    """Build the config's architecture with random weights, and with the scheme's quantizers."""
    entry = architecture(config.architecture)
    model = entry.build(**dataclasses.asdict(config.arguments), quantize=scheme)
    if config.plain_relu:
        replace_relu6(model)
    if scheme is not None:
        set_layer_bits(model, scheme)
        if scheme.float_layers:
            from qzoo.placement.float_layers import keep_in_float  # late: other models don't wait for it

            keep_in_float(model, scheme, torch.zeros(1, *config.preprocessing.input_size))
        _add_biases(model, config.biases)
    name_quantizers(model)
    model.qzoo_config = config  # type: ignore[assignment]
    return model


def _add_biases(model: nn.Module, names: tuple[str, ...]) -> None:
    """Give layers the biases that a correction gave them.

    Raises:
        QuantizationError: no quantized layer of that name, or one with a bias of its own.
    """
    modules = dict(model.named_modules())
    for name in names:
        layer = modules.get(name)
        if not isinstance(layer, (QuantConv2d, QuantLinear)) or layer.bias is not None:
            raise QuantizationError(f"biases names {name!r}, which is no quantized layer without a bias")
        layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)))
        layer.bias_added = True


def replace_relu6(model: nn.Module) -> int:
    """Put a ReLU in place of every ReLU6, which scaling channels needs; the model's config, if any, records it.

    Returns:
        The number of ReLU6 that there were.
    """
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, nn.ReLU6)
    ]
    for parent, name, child in places:
        parent._modules[name] = nn.ReLU(child.inplace)
    config = getattr(model, "qzoo_config", None)
    if places and isinstance(config, Config):
        model.qzoo_config = dataclasses.replace(config, plain_relu=True)  # type: ignore[assignment]
    return len(places)


def _state(model: nn.Module) -> dict[str, Tensor]:
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    wrong = [
        key for key, value in state.items() if value.is_floating_point() and value.dtype != torch.float32
    ]
    if wrong:
        raise CheckpointError(
            f"checkpoints hold float32, but {wrong[0]} is {state[wrong[0]].dtype}; call .float()"
        )
    check_finite(state)
    return state


def _read_tensors(path: Path, model: nn.Module, config: Config) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the file one by one, with memory of their own: columns taken apart, weights unpacked.

    A tensor mapped from the file would change with it, and end the process where the file was cut short.
    """
    from safetensors import SafetensorError, safe_open

    packed = weight_quantizers(model) if config.form == "packed" else {}
    wide = packing.columns(model) if config.form == "packed" else {}
    ranges: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            keys = sorted(file.keys())
            for key in (k for k in keys if k in wide):
                for name, tensor in packing.expand(key, file.get_tensor(key), wide[key]):
                    ranges[name] = tensor
                    yield name, tensor
            for key in (k for k in keys if k not in wide):
                tensor = file.get_tensor(key)
                if key in packed:
                    weight, quantizer = packed[key]
                    amax_key = f"{quantizer.name}._amax"
                    amax = file.get_tensor(amax_key) if amax_key in keys else ranges.get(amax_key)
                    yield key, _unpack(key, tensor, weight, quantizer, amax)
                else:
                    yield key, tensor.clone(memory_format=torch.contiguous_format)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no whole safetensors file ({error})") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _unpack(
    key: str, tensor: Tensor, weight: Tensor, quantizer: TensorQuantizer, amax: Tensor | None
) -> Tensor:
    if amax is None:
        raise CheckpointError(f"{key} is packed, but its scale {quantizer.name}._amax is missing")
    if amax.dtype != torch.float32 or not range_fits(amax, weight, quantizer):
        raise CheckpointError(f"{quantizer.name}._amax does not fit the weight it scales")
    try:
        return packing.unpack_weight(tensor, weight.shape, amax, quantizer.num_bits, quantizer.block)
    except CheckpointError as error:
        raise CheckpointError(f"{key} {error}") from error


def _check_shapes(model: nn.Module, built: nn.Module, config: Config) -> None:
    """Refuse what would not load again: tensors that the config's architecture has not, or of other shapes."""
    shapes = {key: list(value.shape) for key, value in model.state_dict().items() if not is_range(key)}
    expected = {key: list(value.shape) for key, value in built.state_dict().items() if not is_range(key)}
    network = config.factory or config.architecture
    advice = (
        _OWN_FACTORY
        if config.factory
        else "for another number of classes or channels call qzoo.create_model with it, load model.state_dict() into "
        "that model, and save that"
    )
    for key in sorted(shapes.keys() | expected.keys()):
        if shapes.get(key) != expected.get(key):
            raise CheckpointError(
                f"{key} is {shapes.get(key, 'missing')}, but {network} with {config.arguments} has "
                f"{expected.get(key, 'no such tensor')}; {advice}"
            )


def _check_quantizers(model: nn.Module, built_model: nn.Module, config: Config) -> None:
    """Refuse what the config can't record: quantizers that it doesn't build, or that were switched by hand."""
    by_name, built = quantizers(model), quantizers(built_model)
    if by_name.keys() != built.keys():
        other = min(by_name.keys() ^ built.keys())
        text = "a quantizer" if other in by_name else "no quantizer"
        network, scheme = config.factory or config.architecture, config.scheme or "float"
        advice = (
            _OWN_FACTORY
            if config.factory
            else "a layer can be replaced only by one that is quantized in the same way"
        )
        raise CheckpointError(f"the model has {text} {other}, unlike {network} as {scheme}; {advice}")
    for name, quantizer in by_name.items():
        own, wanted = _settings(quantizer), _settings(built[name])
        for what, value in own.items():
            if value != wanted[what]:
                text = f"has {value} {what}" if what == "bits" else f"has {what} {value}"
                raise CheckpointError(f"{name} {text}, but the scheme {config.scheme} says {wanted[what]}")
    odd: dict[str, list[str]] = {
        target.name: [
            n for n, q in by_name.items() if q.role and q.switches.disabled == (q.role in target.roles)
        ]
        for target in TARGETS.values()
    }
    if all(odd.values()):
        nearest = min(odd.values(), key=len)
        raise CheckpointError(
            f"{', '.join(nearest[:5])} {'is' if len(nearest) == 1 else 'are'} switched on or off by hand, "
            "which a checkpoint can't record; qzoo.set_target(model, ...) puts the switches back"
        )


def _settings(quantizer: TensorQuantizer) -> dict[str, object]:
    return {
        "bits": quantizer.num_bits,
        "axis": quantizer.axis,
        "blocks": quantizer.block,
        "narrow_range": quantizer.narrow_range,
        "two_ended": quantizer.two_ended,
        "role": quantizer.role or "none",
    }


# ---- files ----


def _check_weights_file(folder: Path, config: Config, model: nn.Module) -> tuple[int, ...]:
    """Refuse weights that are not those of the config; returns which file that was, see :func:`_identity`."""
    path = folder / WEIGHTS
    if WEIGHTS not in config.files or not path.is_file():
        raise CheckpointError(
            f"{folder} has no weights, only a recipe; `qzoo build {config.name} --data DIR` makes them"
        )
    try:
        identity = _identity(path)
        if config.sizes.get(WEIGHTS, identity[2]) == identity[2]:  # else check_file says that it was altered
            _check_size(path, model, config)
        hub.check_file(path, config.files[WEIGHTS], config.sizes.get(WEIGHTS))
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error})") from error
    return identity


def _check_size(path: Path, model: nn.Module, config: Config) -> None:
    """Refuse what no such model fills before it costs time and memory: terabytes, or a header of a million names."""
    expected = expected_tensors(model).values()
    header = (1 << 16) + (1 << 10) * len(expected)
    most = header + sum(dtype.itemsize * math.prod(shape) for shape, dtype in expected)
    with path.open("rb") as file:
        claimed = int.from_bytes(file.read(8), "little")
    size = path.stat().st_size
    if size > 2 * most:  # a file of a somewhat larger model gets the message that names its tensors
        raise CheckpointError(f"{path} has {size} bytes; {config.name} fills at most {most}")
    if claimed > header:
        raise CheckpointError(
            f"{path} is no whole safetensors file of {config.name}: its header claims {claimed} bytes, and has at most "
            f"{header}"
        )


def _identity(path: Path) -> tuple[int, ...]:
    """What changes when a file is replaced or written to."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _write(folder: Path, tensors: dict[str, Tensor], config: Config) -> Path:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = folder.absolute()
    try:
        with scratch_beside(folder) as scratch:
            save_file(tensors, scratch / WEIGHTS, metadata={"format": "pt"})
            # save_file leaves its file to the owner alone
            (scratch / WEIGHTS).chmod(scratch.stat().st_mode & 0o666)
            files = {WEIGHTS: hub.sha256_of(scratch / WEIGHTS)}
            sizes = {WEIGHTS: (scratch / WEIGHTS).stat().st_size}
            config = dataclasses.replace(config, files=files, sizes=sizes)
            (scratch / "config.json").write_text(config.to_json(), encoding="utf-8")
            place(scratch, folder, (WEIGHTS, "config.json"))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{folder} can't be written ({error}); free some space, or choose another folder"
        ) from error
    return folder
