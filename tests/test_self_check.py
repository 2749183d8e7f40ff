"""Operators that verify themselves: right ones pass, planted wrong derivatives do not."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lossgeometry import FunctionModule, Hessian
from tests.dense import CLASSES, OPERATORS, make


def test_check_accepts_right_operators_in_both_precisions():
    for dtype in (torch.float32, torch.float64):
        for name in ("csan-mask-3", "resnet", "vit"):
            model, loss_fn, x, y = make(name)
            for operator in OPERATORS.values():
                check = operator(model.to(dtype), loss_fn, (x.to(dtype), y)).check()
                assert check.ok, (name, operator, check)
                assert check.symmetry < 100 * torch.finfo(dtype).eps


class Detached(torch.autograd.Function):
    """A sine whose second derivative is missing."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].detach().cos()


class Scaled(torch.autograd.Function):
    """A product with a wrong derivative."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return 1.01 * grad * b, grad * a


class Asymmetric(Detached):
    """A sine whose double backward is wrong by a per cent in one of its two terms."""

    @staticmethod
    def backward(ctx, grad):
        return Scaled.apply(grad, ctx.saved_tensors[0].cos())


def test_check_catches_a_planted_wrong_double_backward():
    x, y = torch.randn(8, 6), torch.randint(0, CLASSES, (8,))

    class Planted(nn.Module):
        def __init__(self, sine):
            super().__init__()
            self.sine, self.first, self.last = sine, nn.Linear(6, 10), nn.Linear(10, CLASSES)

        def forward(self, x):
            return self.last(self.sine(self.first(x)))

    for dtype in (torch.float32, torch.float64):
        data = (x.to(dtype), y)
        right = Hessian(Planted(torch.sin).to(dtype), F.cross_entropy, data).check()
        assert right.ok
        detached = Hessian(Planted(Detached.apply).to(dtype), F.cross_entropy, data).check()
        assert not detached.ok
        assert detached.finite_difference > 10 * detached.tolerance
        asymmetric = Hessian(Planted(Asymmetric.apply).to(dtype), F.cross_entropy, data).check()
        assert not asymmetric.ok
        assert asymmetric.symmetry > 2 * asymmetric.tolerance


def test_check_does_not_pass_what_is_not_finite():
    model, loss_fn, x, y = make("conv")
    x[0] = torch.nan
    check = Hessian(model, loss_fn, (x, y)).check()
    assert not check.ok
    assert np.isnan(check.symmetry)


def test_the_verdict_does_not_depend_on_the_size_of_the_loss():
    x, y = torch.randn(8, 6), torch.randint(0, CLASSES, (8,))
    for size in (1e-30, 1e-10, 1e19, 1e28):
        for sine, verdict in ((torch.sin, "right"), (Detached.apply, "wrong")):

            class Scaled(nn.Module):
                def __init__(self, sine=sine):
                    super().__init__()
                    self.sine, self.first, self.last = sine, nn.Linear(6, 9), nn.Linear(9, CLASSES)

                def forward(self, x):
                    return self.last(self.sine(self.first(x)))

            def loss(outputs, targets, size=size):
                return size * F.cross_entropy(outputs, targets)

            assert Hessian(Scaled(), loss, (x, y)).check().verdict == verdict


def test_where_the_gradient_jumps_nothing_is_said():
    """As in a residual network whose last normalisations begin with zeros."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = (nn.Linear(6, 6) for _ in range(3))
            self.scale = nn.Parameter(torch.zeros(6))

        def forward(self, x):
            x = self.first(x).relu()
            return self.last((x + self.scale * self.second(x)).relu())

    torch.manual_seed(0)
    model, data = Residual(), (torch.randn(8, 6), torch.randint(0, CLASSES, (8,)))
    check = Hessian(model, F.cross_entropy, data).check()
    assert (check.verdict, check.ok) == ("undecided", False)
    assert "jumps" in str(check)
    torch.nn.init.normal_(model.scale)
    assert Hessian(model, F.cross_entropy, data).check().verdict == "right"


def test_a_loss_that_moves_without_a_gradient_is_noticed():
    class Cut(nn.Linear):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    x, y = torch.randn(8, 6), torch.randint(0, CLASSES, (8,))
    assert Hessian(Cut(6, CLASSES), F.cross_entropy, (x, y)).check().verdict == "wrong"
    assert Hessian(nn.Linear(6, CLASSES), lambda z, _: z.mean(), (x, y)).check().ok


def test_what_is_wrong_where_there_is_little_curvature_is_noticed():
    """The product with a vector is along the other parameter, where all is right."""

    def loss(p):
        return 500 * p["steep"] ** 2 + Detached.apply(p["gentle"])

    start = {name: torch.tensor(1.0, dtype=torch.float64) for name in ("steep", "gentle")}
    assert Hessian(FunctionModule(loss, start), None, ((), None)).check().verdict == "wrong"
