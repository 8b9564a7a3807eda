"""A model's logits on images: their fidelity to a reference's, and the uncertainty of a share of images."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qzoo.errors import ArgumentError, DataError, QuantizationError, QzooError


@dataclass(frozen=True)
class Fidelity:
    """How close logits come to a reference's on the same images.

    Holds sums, so that batches, and the parts of several processes, add up; see :meth:`total`. NaN and infinity count
    as the worst: an image whose logits hold NaN never agrees, and logits that are not finite have an SQNR of -infinity.

    Attributes:
        images: number of images.
        agreeing: number of images with the same highest logit.
        signal: sum of squared logits of the reference.
        noise: sum of squared differences; infinite where a logit of either is not finite.
    """

    images: int = 0
    agreeing: int = 0
    signal: float = 0.0
    noise: float = 0.0

    @classmethod
    def of(cls, logits: Tensor, expected: Tensor) -> Fidelity:
        """Compare the logits of a batch with the reference's.

        Args:
            logits: [B, classes].
            expected: the reference's, of the same shape.

        Raises:
            DataError: two shapes, or no classes in them.
        """
        if logits.shape != expected.shape or logits.dim() < 2:
            raise DataError(
                f"logits {list(logits.shape)} can't be compared with the reference's {list(expected.shape)}; both must "
                "be [B, classes]"
            )
        logits, expected = logits.detach().double(), expected.detach().to(logits.device).double()
        numbers = ~(logits.isnan() | expected.isnan()).flatten(1).any(1)
        same = logits.flatten(1).argmax(1) == expected.flatten(1).argmax(1)
        return cls(len(logits), int((same & numbers).sum()), *_energies(logits, expected))

    @classmethod
    def total(cls, parts: Iterable[Fidelity]) -> Fidelity:
        """Add up batches. The sums are exact, so that the order of the parts does not matter."""
        parts = list(parts)
        return cls(
            sum(part.images for part in parts),
            sum(part.agreeing for part in parts),
            math.fsum(part.signal for part in parts),
            math.fsum(part.noise for part in parts),
        )

    @property
    def finite(self) -> bool:
        """Whether all logits, the reference's too, were finite numbers."""
        return math.isfinite(self.signal) and math.isfinite(self.noise)

    @property
    def agreement(self) -> float:
        """Share of images with the same highest logit, in percent."""
        return 100 * self.agreeing / self.images

    @property
    def sqnr_db(self) -> float:
        """``10 log10(signal / noise)``: infinite where all logits are equal, -infinite where one is not finite."""
        return decibel(self.signal, self.noise)


def sqnr(reference: Tensor, other: Tensor) -> float:
    """Signal-to-quantization-noise ratio of two tensors of one shape, in dB; see :attr:`Fidelity.sqnr_db`."""
    return decibel(*_energies(other.double(), reference.double()))


def _energies(values: Tensor, expected: Tensor) -> tuple[float, float]:
    """Of what is expected, and of the difference: infinite where a value is not finite."""
    signal, noise = expected.square().sum().item(), (values - expected).square().sum().item()
    sound = math.isfinite(signal) and math.isfinite(noise)
    return (signal, noise) if sound else (0.0, math.inf)


def decibel(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)``, infinite without noise, -infinite without signal or where one is not finite."""
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return -math.inf
    if noise == 0:
        return math.inf
    return -math.inf if signal == 0 else 10 * math.log10(signal / noise)


def run(model: Callable[[Tensor], Any], images: Tensor) -> Any:
    """Call a model on a batch of images, and say in plain words what it can't take.

    Raises:
        DataError: a model with more inputs than one, or images of a type that its weights don't have; other errors of
            the model are raised as they are.
    """
    try:
        return model(images)
    except (TypeError, RuntimeError, ValueError) as error:
        told = isinstance(error, QzooError) and not isinstance(error, QuantizationError)
        problem = None if told else _misfit(model, images)
        if problem is None:
            raise
        raise DataError(problem) from error


def output_of(model: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    """Run a model that returns one tensor.

    Raises:
        DataError: it returns something else, such as a dictionary or a pair; see :func:`run`.
    """
    result = run(model, images)
    if isinstance(result, Tensor):
        return result
    kind = type(result).__name__
    if isinstance(result, Mapping):
        kind += f" of {', '.join(map(repr, result))}"
    elif isinstance(result, tuple | list):
        kind += f" of {len(result)}"
    raise DataError(
        f"{_name(model)} returned a {kind}; expected one tensor of logits [B, classes]. Wrap the model in a module "
        "whose forward returns only these"
    )


def logits_of(model: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    """Run a classifier.

    Raises:
        DataError: it returns something else, such as a dictionary, or logits of every pixel; see :func:`run`.
    """
    logits = output_of(model, images)
    if logits.dim() != 2 or len(logits) != len(images) or not logits.shape[1]:
        raise DataError(
            f"{_name(model)} returned a tensor {list(logits.shape)} for {len(images)} images; top-1 and top-5 need the "
            "logits [B, classes] of a classifier"
        )
    return logits


def _misfit(model: Callable[[Tensor], Any], images: Tensor) -> str | None:
    """Why a model failed on images, where it is plain to see."""
    name, shape, kind = _name(model), list(images.shape), str(images.dtype).removeprefix("torch.")
    if isinstance(model, nn.Module):
        needed = _required(model.forward)
        if len(needed) > 1:
            return (
                f"the forward of {name} takes {len(needed)} inputs ({', '.join(needed)}); it is called with one "
                "tensor, the images. Wrap the model in a module that takes only these"
            )
    if not images.dtype.is_floating_point:
        return (
            f"{name} can't take {kind} images {shape}; preprocess them as for training: to float32, scaled and "
            "normalized"
        )
    if isinstance(model, nn.Module):
        weight = next((p for p in model.parameters() if p.dtype.is_floating_point), images)
        if weight.dtype != images.dtype:
            want = str(weight.dtype).removeprefix("torch.")
            return f"the images {shape} are {kind}, the weights of {name} {want}; convert the images, or the model"
    if images.dim() == 3:
        return (
            f"{name} failed on a tensor {shape}; the loader must give batches [B, C, H, W], such as [images]"
        )
    return None


def _required(function: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # compiled functions have none
        return []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind in positional]


def _name(model: Any) -> str:
    return type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", "the model")


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a share, in percent (Wilson, 1927, "Probable inference").

    Args:
        z: quantile of the normal distribution; the default gives 95 %.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ArgumentError(f"{successes} successes of {trials} trials is no share")
    share = successes / trials
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    centre, norm = share + z * z / (2 * trials), 1 + z * z / trials
    return 100 * max(0.0, (centre - spread) / norm), 100 * min(1.0, (centre + spread) / norm)
