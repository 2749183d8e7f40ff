"""
Is my minimum flat?
===================

Not before it is said what a step of length one is. Multiply one layer of a ReLU network by ten and
divide the next by ten: it computes the same function, and its largest eigenvalue is another one
(Dinh et al., `arXiv 1703.04933 <https://arxiv.org/abs/1703.04933>`_). Directions with as much
length in each filter as the weights have there make the two the same again (Li et al., `arXiv
1712.09913 <https://arxiv.org/abs/1712.09913>`_).
"""

import copy

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from lossgeometry import Hessian, eigsh, flatness, line, random_directions
from lossgeometry.plots import STYLE, plot_line

digits = load_digits()
data = torch.tensor(digits.data[:500], dtype=torch.float32) / 16, torch.tensor(digits.target[:500])

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
for _ in range(100):
    optimizer.zero_grad()
    cross_entropy(model(data[0]), data[1]).backward()
    optimizer.step()

# %%
# The same function with other weights.

rescaled = copy.deepcopy(model)
with torch.no_grad():
    rescaled[0].weight *= 10
    rescaled[0].bias *= 10
    rescaled[2].weight /= 10
models = {"as trained": model, "rescaled": rescaled}
difference = (model(data[0]) - rescaled(data[0])).abs().max()
print(f"outputs differ by at most {difference:.0e}")

# %%
# The loss along eight random directions, with every filter as long as the model's and, for
# comparison, as long as each other's; and what these lines say in numbers, with the 95 % interval
# over the directions. It says nothing of other networks: train several, and take the interval over
# those.

xs = np.linspace(-1, 1, 41)
lines = {}
for name, network in models.items():
    for normalization, scale in (("filter", 1.0), ("none", 0.05)):
        directions = random_directions(network, 8, seed=0, normalization=normalization)
        lines[name, normalization] = np.stack(
            [line(network, {"nll": cross_entropy}, data, d, scale * xs)["nll"] for d in directions]
        )
    top = eigsh(Hessian(network, cross_entropy, data), k=1)
    flat = flatness(xs, lines[name, "filter"]).estimates()
    print(
        f"{name:10} largest eigenvalue {top.eigenvalues[0]:7.3f} ± {top.errors[0]:.0e}, "
        f"along normalised directions: curvature {flat['curvature'].format()}, "
        f"width {flat['width'].format()}"
    )

# %%
# Left, steps are of one length for both networks, and the rescaled one seems sharp. Right, they are
# as long as the weights, filter by filter, and one curve covers the other. What stays the same then
# is what does not depend on the scale; it is no promise that the network generalises.

with plt.rc_context(STYLE):
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.2), sharey=True)
    for ax, normalization, scale in zip(axes, ("none", "filter"), (0.05, 1.0), strict=True):
        for name, style in zip(models, ("-", ":"), strict=True):
            plot_line(
                scale * xs,
                lines[name, normalization].mean(axis=0),
                ylabel="NLL, mean of 8 directions",
                label=name,
                linestyle=style,
                ax=ax,
            )
        ax.set_title({"none": "not normalised", "filter": "filter-normalised"}[normalization])
    axes[0].legend()
    axes[1].set_ylabel("")
    plt.show()
