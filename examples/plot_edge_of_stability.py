"""
Edge of stability
=================

Train a network with all of its data in every step, and the largest eigenvalue of the Hessian does
not stay where it is: it rises until the steps are on the verge of diverging, and there it remains
(Cohen et al., `arXiv 2103.00065 <https://arxiv.org/abs/2103.00065>`_). For gradient descent with
step :math:`s` that is at :math:`2/s`; momentum moves it, and Adam has its own, for the Hessian that
it preconditions (`arXiv 2207.14484 <https://arxiv.org/abs/2207.14484>`_). This script, of a minute
or two, watches five optimizers arrive.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import SGD, Adam

from lossgeometry import CurvatureTracker
from lossgeometry.plots import STYLE

STEPS = 2500

# %%
# The data are 500 digits, with the squared distance to one-hot labels for a loss.

digits = load_digits()
images = torch.tensor(digits.data[:500], dtype=torch.float32)
images = (images - images.mean()) / images.std()
labels = nn.functional.one_hot(torch.tensor(digits.target[:500])).float()


def squared_error(outputs, targets):
    """Half the squared distance, the mean over examples."""
    return 0.5 * (outputs - targets).square().sum(1).mean()


# %%
# A tracker is called after each step, measures now and then, and changes nothing of the training.
# ``precondition=optimizer`` makes it measure what the optimizer sees (for SGD the Hessian itself),
# and tells where its steps become unstable.


def train(make_optimizer):
    """Curvature while a small network trains on all images at once."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    )
    optimizer = make_optimizer(model.parameters())
    tracker = CurvatureTracker(
        model, squared_error, (images, labels), every=20, precondition=optimizer
    )
    for _ in range(STEPS):
        optimizer.zero_grad()
        squared_error(model(images), labels).backward()
        optimizer.step()
        tracker.step()
    return tracker.result()


trainings = {
    "gradient descent, s = 0.1": lambda weights: SGD(weights, lr=0.1),
    "gradient descent, s = 0.2": lambda weights: SGD(weights, lr=0.2),
    "heavy ball, s = 0.2, b = 0.9": lambda weights: SGD(weights, lr=0.2, momentum=0.9),
    "Nesterov, s = 0.1, b = 0.9": lambda weights: SGD(weights, lr=0.1, momentum=0.9, nesterov=True),
    "Adam, s = 0.001": lambda weights: Adam(weights, lr=0.001),
}
histories = {name: train(make_optimizer) for name, make_optimizer in trainings.items()}

# %%
# Over the last quarter of the steps, the mean is within 3 % of the threshold; heavy ball is still
# on its way.

print(f"{'optimizer':30} {'threshold':>10} {'mean':>10} {'spread':>8} {'ratio':>6} {'products':>8}")
for name, history in histories.items():
    last = history.steps > 0.75 * STEPS
    sharpness, threshold = history.eigenvalues[last, 0], history.threshold[-1]
    print(
        f"{name:30} {threshold:10.1f} {sharpness.mean():10.1f} {sharpness.std():8.1f} "
        f"{sharpness.mean() / threshold:6.3f} {history.matvecs[1:].mean():8.1f}"
    )

# %%
# In units of the threshold, all of them come to one.

with plt.rc_context(STYLE):
    figure, ax = plt.subplots(figsize=(6, 3.5))
    for name, history in histories.items():
        ax.plot(history.steps, history.eigenvalues[:, 0] / history.threshold, label=name)
    ax.axhline(1, color="gray", linestyle="--", label="stability threshold")
    ax.set(
        xlabel="step",
        ylabel="largest eigenvalue / stability threshold",
        ylim=(0, np.clip(ax.dataLim.y1, 1.2, 2.0)),
    )
    ax.legend(fontsize=7, loc="lower right")
    plt.show()
