"""The losses that a teacher adds, against loops in float64."""

import math

import pytest
import torch

from hf_sparse.training.distillation import hidden_loss, kl_loss


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def softmax(row, temperature):
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergence_is_the_mean_over_tokens_times_the_temperature_squared(temperature):
    student, teacher = numbers(4, 7), numbers(4, 7, seed=1)
    total = 0.0
    for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = softmax(theirs, temperature), softmax(ours, temperature)
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    expected = temperature**2 * total / 4
    assert float(kl_loss(student, teacher, temperature)) == pytest.approx(expected, rel=1e-5)


def test_the_same_predictions_diverge_by_nothing():
    assert float(kl_loss(numbers(3, 5), numbers(3, 5) + 2, 1.0)) == pytest.approx(0, abs=1e-5)


def test_hidden_states_count_relative_to_the_teacher_s_norm_of_each_layer():
    student = [numbers(3, 4), 100 * numbers(3, 4, seed=1)]
    teacher = [numbers(3, 4, seed=2), 100 * numbers(3, 4, seed=3)]
    expected = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        pairs = list(zip(ours.flatten().tolist(), theirs.flatten().tolist(), strict=True))
        expected += sum((s - t) ** 2 for s, t in pairs) / sum(t * t for _, t in pairs) / 2
    assert float(hidden_loss(student, teacher)) == pytest.approx(expected, rel=1e-5)


def test_half_precision_is_computed_in_fp32():
    student, teacher = (
        numbers(3, 5, dtype=torch.bfloat16),
        numbers(3, 5, seed=1, dtype=torch.bfloat16),
    )
    assert kl_loss(student, teacher, 1.0).dtype == torch.float32
    assert hidden_loss([student], [teacher]).dtype == torch.float32
