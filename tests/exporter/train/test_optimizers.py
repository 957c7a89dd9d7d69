"""Muon takes the steps of torch's, which computes them in bfloat16, in float32 or in bfloat16."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="drafters are fitted with torch")

from dovetail.exporter.train.optimizers import Muon, orthogonal

SHAPES = [(48, 48), (96, 48), (48, 96)]


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_orthogonal_keeps_its_vectors(shape: tuple[int, int], dtype: Any, error: float) -> None:
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    s = s.clamp(min=float(s.max()) / 20)
    found = orthogonal(u @ torch.diag(s) @ v, dtype)
    values = torch.diag(u.T @ found @ v.T)
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3
    assert found.dtype == torch.float32
    assert torch.allclose(found, u @ torch.diag(values) @ v, atol=error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_those_of_torch(dtype: Any) -> None:
    torch.manual_seed(0)
    starts = [torch.randn(shape) for shape in SHAPES]
    ours, theirs = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    optimizers = [
        Muon([{"params": ours}], lr=0.02, weight_decay=0.1, dtype=dtype),
        torch.optim.Muon([{"params": theirs}], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(4):
        for parameters in zip(ours, theirs, strict=True):
            gradient = torch.randn(parameters[0].shape)
            for parameter in parameters:
                parameter.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    for start, one, other in zip(starts, ours, theirs, strict=True):
        assert (one - other).norm() < 0.03 * (one - start).norm()  # bfloat16 has two and a half digits


def test_a_state_goes_on_where_it_was() -> None:
    torch.manual_seed(0)
    gradients = torch.randn(4, 8, 8)
    whole, broken = (torch.nn.Parameter(torch.ones(8, 8)) for _ in range(2))
    first, second = Muon([whole]), Muon([broken])
    for index, gradient in enumerate(gradients):
        whole.grad, broken.grad = gradient.clone(), gradient.clone()
        first.step()
        if index == 2:
            state = second.state_dict()
            second = Muon([broken])
            second.load_state_dict(state)
        second.step()
    assert torch.equal(whole, broken)


def test_what_has_no_gradient_stays() -> None:
    matrix = torch.nn.Parameter(torch.ones(4, 4))
    Muon([matrix]).step()
    assert torch.equal(matrix, torch.ones(4, 4))
