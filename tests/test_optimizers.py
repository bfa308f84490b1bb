"""AdamW, Muon and the schedule, against torch's own and against plain float64."""

import math

import pytest
import torch
from torch import nn

from lib.models.transformer import Transformer, TransformerConfig
from lib.optimizers import Muon, Optimizer, orthogonalise

SHAPES = [(8, 8), (8, 8), (24, 8), (8, 24), (8, 24)]


def matrices(seed: int, dtype=torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def small_model() -> Transformer:
    return Transformer(TransformerConfig(vocab=5, d_model=8, n_heads=2, positions="none"), seed=0)


def test_the_schedule_rises_holds_and_falls_as_the_recipe_says():
    plan = Optimizer(warmup=20, hold=0.5, floor=0.03)
    factor = [plan.factor(step, 200) for step in range(200)]
    assert factor[0] == pytest.approx(1 / 20) and factor[9] == pytest.approx(0.5)
    assert factor[19:101] == [1.0] * 82
    assert factor[150] == pytest.approx(1 - 0.97 * 50 / 99)
    assert factor[199] == pytest.approx(0.03)
    assert factor[:20] == sorted(factor[:20]) and factor[100:] == sorted(factor[100:], reverse=True)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("plan", [Optimizer(), Optimizer(warmup=0, hold=1), Optimizer(hold=0, floor=0)])
def test_the_learning_rate_never_leaves_its_range(plan, steps):
    assert all(0 <= plan.factor(step, steps) <= 1 for step in range(steps))


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (3, 16, 64)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, S, V = torch.linalg.svd(G, full_matrices=False)
    S = torch.linspace(1.0, 0.1, shape[-2], dtype=torch.float64).expand(S.shape)
    value = torch.linalg.svdvals(orthogonalise(U * S[..., None, :] @ V))
    assert value.min() > 0.65 and value.max() < 1.25  # the range of Jordan's quintic after five iterations
    aligned = U.mT @ orthogonalise(U * S[..., None, :] @ V) @ V.mT
    off = aligned - torch.diag_embed(aligned.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-10, "singular vectors are untouched"


def test_a_zero_gradient_moves_nothing():
    assert orthogonalise(torch.zeros(4, 6)).eq(0).all()


def test_muon_agrees_with_torch_up_to_bfloat16():
    ours, theirs = matrices(0), matrices(0)
    optimizers = [
        Muon(ours, lr=0.03),
        torch.optim.Muon(theirs, lr=0.03, weight_decay=0.0, momentum=0.95, nesterov=True),
    ]
    before = [W.detach().clone() for W in ours]
    for step in range(5):
        gradients = matrices(100 + step)
        for weights, optimizer in zip((ours, theirs), optimizers, strict=True):
            for W, G in zip(weights, gradients, strict=True):
                W.grad = G.detach().clone()
            optimizer.step()
    for start, a, b in zip(before, ours, theirs, strict=True):
        moved = (b - start).norm()
        assert (a - b).norm() / moved < 0.05  # bfloat16 has 8 bits: single updates differ by about 1.5 %
        assert ((a - start).norm() / moved).item() == pytest.approx(1, abs=0.02)


def test_muon_agrees_with_its_formula_in_float64_one_matrix_at_a_time():
    weights = matrices(0, torch.float64)
    expected = [W.detach().clone() for W in weights]
    average = [torch.zeros_like(W) for W in expected]
    optimizer = Muon(weights, lr=0.1, momentum=0.9)
    for step in range(3):
        for i, (W, G) in enumerate(zip(weights, matrices(50 + step, torch.float64), strict=True)):
            W.grad = G.detach().clone()
            average[i] = 0.9 * average[i] + 0.1 * W.grad
            X = 0.1 * W.grad + 0.9 * average[i]
            X = X / X.norm()
            for _ in range(5):
                A = X.T @ X  # from the other side: X (a + b A + c A A)
                X = X @ (3.4445 * torch.eye(len(A), dtype=A.dtype) - 4.7750 * A + 2.0315 * A @ A)
            expected[i] -= 0.1 * math.sqrt(max(1, W.shape[0] / W.shape[1])) * X
        optimizer.step()
    for W, value in zip(weights, expected, strict=True):
        assert torch.allclose(W, value, atol=1e-6)  # 1e-7 guards the norm against zero


def test_muon_takes_the_matrices_of_the_layers_and_adamw_everything_else():
    model = small_model()
    adamw, muon = Optimizer(muon_lr=0.03).build(model)
    names = {id(p): name for name, p in model.named_parameters()}
    moved = [[names[id(p)] for p in part.param_groups[0]["params"]] for part in (adamw, muon)]
    assert sorted(moved[0] + moved[1]) == sorted(names.values()), "every weight has one optimizer"
    assert all(name.startswith("layers.") and name.endswith("weight") for name in moved[1])
    assert len(moved[1]) == 2 * 6 and {"embedding.weight", "W_U.weight"} <= set(moved[0])
    assert [type(part) for part in Optimizer().build(model)] == [torch.optim.AdamW]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Optimizer(muon_lr=0.1, muon_on=("blocks",)).build(small_model()), "blocks.*names no matrix"),
        (lambda: Optimizer(adamw_lr=-1.0), "adamw_lr must be positive"),
        (lambda: Optimizer(muon_lr=math.inf), "muon_lr must be positive and finite"),
        (lambda: Optimizer(hold=1.5), "0 <= hold <= 1"),
        (lambda: Muon([nn.Parameter(torch.zeros(3))], lr=0.1), "shape \\(3,\\)"),
    ],
)
def test_nonsense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
