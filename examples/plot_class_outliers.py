"""
About as many outliers as classes
=================================

Most eigenvalues of a classifier's Hessian are small. With :math:`C` classes, about as many stand
out (Sagun et al., `arXiv 1611.07476 <https://arxiv.org/abs/1611.07476>`_; Papyan,
`arXiv 1901.08244 <https://arxiv.org/abs/1901.08244>`_): those of the mean gradients of the
classes, which add up to nothing, so that :math:`C - 1` of them are independent. This script, of
some seconds, counts them for ten digits, for five and for three.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from lossgeometry import Hessian, eigsh
from lossgeometry.plots import STYLE

digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32)
images = (images - images.mean()) / images.std()
labels = torch.tensor(digits.target)

# %%
# A small network begins to learn the first :math:`C` digits. How many stand out depends on the
# stage of the training and on what counts as a gap: after twice as many steps, three do with three
# classes.


def largest_eigenvalues(classes):
    """The C + 4 largest of a network that tells so many digits apart."""
    torch.manual_seed(0)
    chosen = labels < classes
    data = images[chosen], labels[chosen]
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, classes))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
    H = Hessian(model, nn.functional.cross_entropy, data)
    return eigsh(H, k=classes + 4, which="LA", tol=1e-2).eigenvalues.numpy()


spectra = {classes: largest_eigenvalues(classes) for classes in (3, 5, 10)}

# %%
# Where they stop is where neighbours are farthest apart, on a logarithmic scale.

print(f"{'classes':>7} {'outliers':>8}   the gap after them")
for classes, values in spectra.items():
    ratios = values[:-1] / values[1:]
    outliers = int(ratios[1:].argmax()) + 2  # the first, which is above the others anyway, aside
    print(f"{classes:7} {outliers:8}   {ratios[outliers - 1]:.2f}")

# %%
# Dotted lines are where they stop if there are C - 1.

with plt.rc_context(STYLE):
    figure, ax = plt.subplots(figsize=(6, 3.5))
    for classes, values in spectra.items():
        ranks = np.arange(1, len(values) + 1)
        ax.semilogy(ranks, values, "o-", markersize=3, label=f"{classes} classes")
    for i, classes in enumerate(spectra):
        ax.axvline(classes - 0.5, color=f"C{i}", linestyle=":", linewidth=1)
    ax.set(xlabel="rank", ylabel="eigenvalue of the Hessian")
    ax.legend()
    plt.show()
