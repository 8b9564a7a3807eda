"""Knowledge distillation: the quantized model learns the float model's probabilities beside the labels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from qzoo.errors import ArgumentError


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Compute the distillation loss of a student against its teacher, on softened probabilities.

    It is the Kullback-Leibler divergence times the squared temperature.

    Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network" (arXiv:1503.02531), section 2: the
    square keeps the gradient's size when the temperature changes. Its use for low bits: Mishra and Marr 2018,
    "Apprentice" (arXiv:1711.05852).

    Args:
        student, teacher: logits [N, classes]; the teacher's get no gradient.
        temperature: divides the logits before the softmax.

    Returns:
        The mean over the batch, in nats, 0-d.

    Raises:
        ValueError: the temperature is not positive.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0]])
        >>> distillation_loss(logits, logits)
        tensor(0.)
    """
    if not temperature > 0:
        raise ArgumentError(f"temperature must be positive, not {temperature}")
    goal = F.log_softmax(teacher.detach().float() / temperature, dim=1)
    logs = F.log_softmax(student.float() / temperature, dim=1)
    return temperature**2 * F.kl_div(logs, goal, reduction="batchmean", log_target=True)
