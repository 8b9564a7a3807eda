"""Recipes: which post-training methods in which order, and the choice of the best one.

``best_recipe`` chooses as :func:`qzoo.calibrate` does with "auto", but among whole recipes: each is applied to a copy
of the model with most of the calibration images and compared on the rest, so that none is judged by images that it
has seen, and no image of the test set is looked at.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.accuracy import Fidelity
from qzoo.distributed import Group
from qzoo.errors import ArgumentError, CalibrationError, QuantizationError
from qzoo.options import AUTO, BATCHNORM, PERCENTILE, PROCEDURAL, Recipe
from qzoo.preprocessing import Preprocessing
from qzoo.progress import track
from qzoo.ptq.adaround import adaround
from qzoo.ptq.bias_correction import correct_bias
from qzoo.ptq.collect import SHARE, hold_back, images_of
from qzoo.ptq.data_free import calibrate_data_free
from qzoo.ptq.equalize import can_equalize, equalize, some
from qzoo.ptq.procedural import MatchedNorms, calibrate_procedural, procedural_batches
from qzoo.ptq.ranges import Calibration, Candidate, calibrate
from qzoo.ptq.relu6 import without_relu6
from qzoo.ptq.sequential import adaround_sequential
from qzoo.ptq.smoothquant import ALPHA, ALPHAS, smooth
from qzoo.quant.fold import evaluating
from qzoo.quantizers import device_of, quantizers_off, weight_quantizers
from qzoo.runtimes.pytorch import output_of

logger = logging.getLogger(__name__)

RECIPES = (
    Recipe(method="max"),
    Recipe(method="mse"),
    Recipe(method="mse", bias_correction="analytic"),
    Recipe(method="mse", rounding="learned"),
    Recipe(method="max", rounding="sequential"),
    Recipe(method="percentile", rounding="sequential"),
    Recipe(method="mse", rounding="sequential"),
)
"""What ``best_recipe`` tries first, the cheap ones before the others; then the best behind SmoothQuant (transformers)
and behind equalization."""


@dataclass(frozen=True)
class Choice:
    """Recipe that :func:`best_recipe` chose, with all that it tried.

    Attributes:
        recipe: the one with the highest SQNR on images that it had not seen.
        candidates: all of them, best first.
        images, held_back: number of images that they were applied with, and compared on.

    Example:
        >>> model = qzoo.create_model("resnet20.fmnist", pretrained="float", quantize="w8a8")
        >>> recipes = (Recipe(method="max"), Recipe(method="mse"))
        >>> choice = best_recipe(model, loader, recipes=recipes, progress=False)
        >>> len(choice.candidates), choice.images, choice.held_back
        (2, 12, 4)
    """

    recipe: Recipe
    candidates: tuple[Candidate, ...]
    images: int
    held_back: int


def apply_recipe(
    model: nn.Module,
    loader: Iterable[Any],
    recipe: Recipe,
    *,
    preprocessing: Preprocessing | None = None,
    progress: bool = True,
    group: Group | None = None,
) -> Calibration:
    """Apply a recipe: quantize a model with float weights, in place, for the target that is switched on.

    Args:
        model: with quantizers and trained weights.
        loader: batches of images; not touched by a recipe without data, which draws its own.
        recipe: what to do.
        preprocessing: of the images; needed by a recipe without data.
        progress: show progress bars.
        group: processes that share the pass for the ranges, see :func:`qzoo.calibrate`; each does all the rest.

    Returns:
        How the ranges were found.

    Raises:
        CalibrationError: no quantizers or images, nothing to smooth or to equalize; see the methods.
        ValueError: a recipe without data, but no preprocessing.

    Example:
        >>> model = qzoo.create_model("resnet20.fmnist", pretrained="float", quantize="w8a8")
        >>> apply_recipe(model, loader, Recipe(method="mse"), progress=False).images
        16
    """
    if recipe.data_free and preprocessing is None:
        raise ArgumentError(
            f"method {recipe.method!r} takes the range of the images from their preprocessing; pass it"
        )
    if recipe.method == BATCHNORM and preprocessing is not None:
        correct = recipe.bias_correction == "analytic"
        return calibrate_data_free(model, preprocessing, correct=correct, equalized=recipe.equalize)
    if recipe.method == PROCEDURAL and preprocessing is not None:
        batches = [batch.to(device_of(model)) for batch in procedural_batches(preprocessing)]
    else:
        batches = [images_of(batch) for batch in loader]
    return _apply(model, batches, recipe, progress=progress, group=group)


def _apply(
    model: nn.Module,
    batches: list[Tensor],
    recipe: Recipe,
    *,
    progress: bool = False,
    group: Group | None = None,
) -> Calibration:
    """Apply a recipe with these images, also one by procedural images."""
    if recipe.alpha == AUTO:
        recipe = best_alpha(model, batches, recipe, progress=progress).recipe
    if recipe.smooth:
        alpha = ALPHA if recipe.alpha is None else float(recipe.alpha)
        if not smooth(model, batches, alpha=alpha, progress=progress):
            raise CalibrationError(
                "nothing to smooth: no quantized linear layer reads a LayerNorm; leave smoothing out"
            )
    if recipe.equalize:
        without_relu6(model, batches)
        some(equalize(model, batches, progress=progress))
    matched: AbstractContextManager[None] = nullcontext()
    if recipe.method == PROCEDURAL:
        norms = MatchedNorms(model) if recipe.rounding != "nearest" else None
        calibration = calibrate_procedural(model, batches, norms=norms, progress=progress)
        if norms is not None and norms.any and _rounds_coarsely(model):
            matched = norms.round_on(model, batches)
    else:
        percentile = PERCENTILE if recipe.percentile is None else recipe.percentile
        calibration = calibrate(
            model, batches, method=recipe.method, percentile=percentile, progress=progress, group=group
        )
    with matched:
        _fit_weights(model, batches, recipe, progress)
    return calibration


def _rounds_coarsely(model: nn.Module) -> bool:
    """Whether some weights have fewer than 8 bits: at 8 their error is smaller than what BatchNorms would mend."""
    bits = [quantizer.num_bits for _, quantizer in weight_quantizers(model).values()]
    return any(isinstance(count, int) and count < 8 for count in bits)


def _fit_weights(model: nn.Module, batches: list[Tensor], recipe: Recipe, progress: bool) -> None:
    """Round the weights and correct the biases, as the recipe says."""
    exact = copy.deepcopy(model) if recipe.bias_correction == "empirical" else None
    if recipe.rounding == "learned":
        adaround(model, batches, progress=progress)
    elif recipe.rounding == "sequential":
        adaround_sequential(model, batches, progress=progress)
    if recipe.bias_correction == "analytic":
        correct_bias(model, batches, method="analytic", progress=progress)
    elif exact is not None:
        with quantizers_off(exact):
            correct_bias(model, batches, method="empirical", reference=exact, progress=progress)


def best_recipe(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    recipes: tuple[Recipe, ...] | None = None,
    held_back: float = SHARE,
    progress: bool = True,
) -> Choice:
    """Try recipes on copies of the model, and choose the best; the model stays as it is.

    The chosen one is to be applied with all the images.

    Args:
        model: with quantizers and float weights, at the target that counts.
        loader: batches of calibration images.
        recipes: the candidates, each of which needs images, if only procedural ones; None: :data:`RECIPES`, then the
            best of them behind SmoothQuant with several alphas where the model has LayerNorms, then the best behind
            cross-layer equalization where it has pairs for that. One that the model refuses is left out, with a
            warning.
        held_back: share of the images that the recipes are compared on, the last ones.
        progress: show a progress bar.

    Returns:
        The recipe with the highest SQNR of the logits, and all candidates.

    Raises:
        CalibrationError: fewer than two images, or no recipe could be applied.
        ValueError: no recipes, or a share outside 0 to 1.

    Example:
        >>> model = qzoo.create_model("resnet20.fmnist", pretrained="float", quantize="w8a8")
        >>> recipes = (Recipe(method="max"), Recipe(method="mse"))
        >>> choice = best_recipe(model, loader, recipes=recipes, progress=False)
        >>> record = apply_recipe(model, loader, choice.recipe, progress=False)
    """
    if recipes is not None and not recipes:
        raise ArgumentError("no recipes to choose from; pass some")
    fit, check = hold_back(loader, held_back)
    with quantizers_off(model):
        expected = _logits(model, check)
    trials: list[tuple[Candidate, Recipe]] = []
    problems: list[str] = []

    def attempt(recipe: Recipe) -> None:
        candidate = copy.deepcopy(model)
        try:
            _apply(candidate, list(fit), recipe)
            fidelity = Fidelity.of(_logits(candidate, check), expected)
            if not fidelity.finite:
                raise CalibrationError("its logits, or the float model's, hold NaN or infinity")
        except (QuantizationError, CalibrationError) as error:
            problems.append(f"{recipe}: {error}")
            logger.warning("left out, %s", problems[-1])
            return
        trials.append((Candidate.of(str(recipe), fidelity), recipe))
        trials.sort(key=lambda pair: pair[0].rank, reverse=True)

    for recipe in track(RECIPES if recipes is None else recipes, "try recipes", show=progress):
        attempt(recipe)
    if not trials:
        raise CalibrationError(f"no recipe could be applied: {'; '.join(problems)}")
    if recipes is None and any(isinstance(module, nn.LayerNorm) for module in model.modules()):
        for recipe in _smooth(trials[0][1]):
            attempt(recipe)
    if recipes is None and can_equalize(model, fit[0][:1]):
        attempt(replace(trials[0][1], equalize=True))
    candidates = tuple(candidate for candidate, _ in trials)
    return Choice(trials[0][1], candidates, sum(map(len, fit)), sum(map(len, check)))


def best_alpha(model: nn.Module, loader: Iterable[Any], recipe: Recipe, *, progress: bool = True) -> Choice:
    """Search the alpha of SmoothQuant: try a recipe without it and with several alphas; the model stays as it is.

    Xiao et al. (2022, arXiv:2211.10438, section 4) search it by model, since it depends on how far the channels of the
    activations stick out.

    Args:
        model: with quantizers and float weights, at the target that counts.
        loader: batches of calibration images; part of them is held back to compare on.
        recipe: all the rest.
        progress: show a progress bar.

    Returns:
        The recipe with the alpha of highest SQNR, or without smoothing, and all candidates.

    Raises:
        CalibrationError: fewer than two images, or no candidate could be applied.

    Example:
        >>> from qzoo.models.layers import linear
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(28), linear(28, 10, quantize=qzoo.Scheme()))
        >>> choice = best_alpha(model, loader, Recipe(method="max"), progress=False)
        >>> sorted(candidate.method for candidate in choice.candidates)
        ['max', 'smooth 0.15 + max', 'smooth 0.5 + max', 'smooth 0.85 + max']
    """
    without = replace(recipe, smooth=False, alpha=None)
    return best_recipe(model, loader, recipes=(without, *_smooth(without)), progress=progress)


def _smooth(recipe: Recipe) -> list[Recipe]:
    return [replace(recipe, smooth=True, alpha=alpha) for alpha in ALPHAS]


@torch.no_grad()
def _logits(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    with evaluating(model):
        return torch.cat([output_of(model, batch) for batch in batches])
