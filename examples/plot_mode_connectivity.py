"""
A way between two minima
========================

Two trainings from different starts end far from each other, with a mountain on the straight line
between them. It can be walked around: a curve with one bend, whose bend is trained, has low loss
all the way (Garipov et al., `arXiv 1802.10026 <https://arxiv.org/abs/1802.10026>`_).
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lossgeometry import bezier_path, fit_bezier, linear_path
from lossgeometry.plots import STYLE, log_scale, plot_line

digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
train = TensorDataset(images[:1200], labels[:1200])
data = {"training": train[:], "test": (images[1200:], labels[1200:])}

# %%
# Two trainings, which differ in their seed.


def trained(seed):
    """A network of one hidden layer."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(20):
        for batch, targets in DataLoader(train, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            cross_entropy(model(batch), targets).backward()
            optimizer.step()
    return model


model, other = trained(0), trained(1).state_dict()

# %%
# The straight line, and a quadratic Bezier curve whose control point is fitted to the training
# images. Several sets of data are measured at once.

ts = np.linspace(0, 1, 41)
metrics = {"nll": cross_entropy}
straight = linear_path(model, other, metrics, data, ts)
curve = fit_bezier(
    model, other, cross_entropy, DataLoader(train, batch_size=200), steps=300, learning_rate=0.03
)
around = bezier_path(model, other, curve.bend, metrics, data, ts)

# %%
# The barrier is the largest height above the straight line between the losses at both ends, as far
# as these points tell: it is of one pair of networks, and others have others.

for name, path in {"straight": straight, "curve": around}.items():
    heights = {which: path.barrier(f"{which}/nll") for which in data}
    print(name, {which: round(height, 4) for which, height in heights.items()})

with plt.rc_context(STYLE):
    figure, ax = plt.subplots(figsize=(6, 3.5))
    for (name, path), color in zip(
        {"straight line": straight, "fitted curve": around}.items(), ("C0", "C1"), strict=True
    ):
        for which, style in zip(data, ("-", "--"), strict=True):
            plot_line(
                ts,
                path.metrics[f"{which}/nll"],
                xlabel="t, from one network (0) to the other (1)",
                ylabel="NLL",
                label=f"{name}, {which} images",
                color=color,
                linestyle=style,
                ax=ax,
            )
    log_scale(ax)
    ax.legend(fontsize=7)
    plt.show()
