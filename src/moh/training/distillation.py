"""The distillation loss: how far a model's next-token distribution is from a frozen teacher's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

_CHUNK = 256  # tokens at a time: two float32 rows of 50,000 logits each are then 100 MB, not gigabytes


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """`T^2 * sum over predicted tokens of KL(softmax(teacher / T) || softmax(student / T))`, a float32 scalar.

    As in next-token prediction, the logits at position n are those for the label at n + 1; labels of -100 do not count.
    The caller divides the sum by the number of tokens in the step. Chunks are recomputed in the backward pass, so that
    no float32 copy of all logits is ever held.

    Args:
        student_logits: `[B, N, V]`, with gradient.
        teacher_logits: `[B, N, V]`, of the same vocabulary.
        labels: `[B, N]` token ids, or -100.
        temperature: T, above 0.

    Raises:
        ValueError: the logits differ in shape, as those of different vocabularies do.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "teacher and student must give logits of one shape (the same tokenizer and vocabulary), got "
            f"{tuple(teacher_logits.shape)} and {tuple(student_logits.shape)}"
        )
    counts = (labels[:, 1:] != -100).flatten()  # [B*(N-1)]
    student = student_logits[:, :-1].flatten(0, 1)  # [B*(N-1), V]
    teacher = teacher_logits[:, :-1].detach().flatten(0, 1)
    total = student.new_zeros((), dtype=torch.float32)
    for start in range(0, len(counts), _CHUNK):
        part = slice(start, start + _CHUNK)
        total = total + checkpoint(
            _summed_kl, student[part], teacher[part], counts[part], temperature, use_reentrant=False
        )
    return total * temperature**2  # the gradient would otherwise shrink as 1 / T^2 (arXiv 1503.02531)


def _summed_kl(student: Tensor, teacher: Tensor, counts: Tensor, temperature: float) -> Tensor:
    student_log = F.log_softmax(student.float() / temperature, dim=-1)
    teacher_log = F.log_softmax(teacher.float() / temperature, dim=-1)
    per_token = F.kl_div(student_log, teacher_log, reduction="none", log_target=True).sum(-1)  # [chunk]
    return torch.where(counts, per_token, 0.0).sum()
