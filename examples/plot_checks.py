"""
What goes wrong, and how one is told
====================================

Second derivatives can be wrong without a word: a layer may have a hand-written backward pass that
forgets a term, or cut the graph. Eigenvalues of such a matrix look like any others. ``H.check()``
compares products with finite differences of the gradient, and asks whether the matrix is symmetric.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.functional import mse_loss

from lossgeometry import Hessian, InputError, eigsh
from lossgeometry.plots import STYLE

torch.manual_seed(0)
inputs, targets = torch.randn(64, 8), torch.randn(64, 1)


class Square(torch.autograd.Function):
    """x², with a first derivative that is right and a second one that is not."""

    @staticmethod
    def forward(ctx, x):
        """Keep the slope, which depends on x, as if it did not."""
        ctx.slope = 2 * x.detach()
        return x.square()

    @staticmethod
    def backward(ctx, gradient):
        """Right as it is; but derived once more, 2x is a constant."""
        return ctx.slope * gradient


class Layer(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        """The function."""
        return self.function(x)


def network(function):
    """Two linear layers and a function between them."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), Layer(function), nn.Linear(16, 1))


# %%
# At a kink there is no second derivative to compare with: a leaky ReLU of exact zeros, here because
# all weights before it are zeros. That is not the operator's fault, and ``check`` does not say that
# it is.

zeros = network(nn.functional.leaky_relu)
nn.init.zeros_(zeros[0].weight)
nn.init.zeros_(zeros[0].bias)

models = {
    "x², by PyTorch": network(torch.square),
    "x², in float64": network(torch.square).double(),
    "x², slope forgotten": network(Square.apply),
    "tanh of a detached input": network(lambda x: torch.tanh(x) * x.detach()),
    "leaky ReLU of zeros": zeros,
}
checks = {}
for name, model in models.items():
    dtype = next(model.parameters()).dtype
    H = Hessian(model, mse_loss, (inputs.to(dtype), targets.to(dtype)))
    checks[name] = H.check()
    print(f"{name}: {checks[name].verdict}\n  {checks[name]}")

# %%
# What has not converged says so, and its error covers the truth all the same. And of a matrix that
# is not symmetric nobody gets eigenvalues.

H = Hessian(models["x², by PyTorch"], mse_loss, (inputs, targets))
hasty, patient = eigsh(H, k=1, maxiter=4), eigsh(H, k=1)
for name, top in {"4 products": hasty, f"{patient.matvecs} products": patient}.items():
    print(
        f"{name:12} {top.eigenvalues[0]:.3f} ± {top.errors[0]:.3f}, converged: {top.converged[0]}"
    )

try:
    eigsh(torch.triu(torch.ones(50, 50)), k=1)
except InputError as error:
    print(error)

# %%
# The errors of products, relative to their length, beside what rounding explains.

with plt.rc_context(STYLE):
    figure, ax = plt.subplots(figsize=(7, 3.2))
    places = range(len(checks))
    for values, marker, label in (
        ([check.symmetry for check in checks.values()], "s", "asymmetry"),
        ([check.finite_difference for check in checks.values()], "o", "against finite differences"),
        ([check.tolerance for check in checks.values()], "|", "tolerance"),
    ):
        ax.semilogx(values, places, marker, label=label, markersize=12 if marker == "|" else 5)
    names = [f"{name}: {check.verdict}" for name, check in checks.items()]
    ax.set_yticks(places, names)
    ax.set(xlabel="relative error", ylim=(len(checks) - 0.5, -0.5))
    ax.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    plt.show()
