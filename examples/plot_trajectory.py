"""
The way of a training
=====================

In random directions a training hardly moves. In the plane in which its snapshots differ most, that
of their first two principal components, one sees where it went, and the loss around it (Li et al.,
`arXiv 1712.09913 <https://arxiv.org/abs/1712.09913>`_, section 7). What one does *not* see is
whether the training was confined to that plane, and this script asks a random walk.
"""

import copy

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from lossgeometry import line, pca_directions, surface, towards, trajectory
from lossgeometry.plots import STYLE, plot_contours, plot_way

digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)

# %%
# A training with a snapshot, a copy of the state dict, after each epoch.

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
snapshots = [copy.deepcopy(model.state_dict())]
for _ in range(15):
    for chosen in torch.randperm(len(images)).split(128):
        optimizer.zero_grad()
        cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    snapshots.append(copy.deepcopy(model.state_dict()))

# %%
# The plane, with the trained weights as its origin, and how much of the snapshots' variance is in
# it. That share is large for anything that moves a little at a time: a random walk of as many
# steps, in as many dimensions, has most of its variance in a plane, too.

way = trajectory(model, snapshots)
walk = [copy.deepcopy(model.state_dict())]
for _ in snapshots[1:]:
    walk.append({name: w + torch.randn(w.shape) for name, w in walk[-1].items()})
_, by_chance = pca_directions(walk, model)
print(f"the training {way.explained_variance.sum():.1%}, a random walk {by_chance.sum():.1%}")

# %%
# The loss is that in the plane itself, and the training was somewhere above or below it: at each
# snapshot, its loss and that of the point in the plane that is closest to it are two numbers.

x, y = way.coordinates.T
margin = 0.2 * np.ptp(way.coordinates)
xs = np.linspace(x.min() - margin, x.max() + margin, 25)
ys = np.linspace(y.min() - margin, y.max() + margin, 25)
metrics, data = {"nll": cross_entropy}, (images, labels)
nll = surface(model, metrics, data, way.directions, xs, ys)["nll"]

for i in (0, 5, 10):
    own = line(model, metrics, data, towards(model, snapshots[i]), [1])["nll"][0]
    within = surface(model, metrics, data, way.directions, x[i : i + 1], y[i : i + 1])["nll"][0, 0]
    print(f"epoch {i:2}: {own:.3f}, in the plane {within:.3f}")

with plt.rc_context(STYLE):
    figure, ax = plt.subplots(figsize=(6, 2.8))
    plot_contours(xs, ys, nll, ax=ax)
    plot_way(way.coordinates, ax=ax)
    shares = way.explained_variance
    ax.set(
        xlabel=f"first principal direction ({shares[0]:.0%})",
        ylabel=f"second ({shares[1]:.0%})",
        title="NLL, and a training from the hollow point to the cross",
    )
    plt.show()
