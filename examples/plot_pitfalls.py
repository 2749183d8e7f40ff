"""
Measure what was minimised
==========================

A network is trained on augmented images, with weight decay, with batch normalisation as it is in
training. Leave one of these out and the Hessian is that of another problem, at whose minimum the
weights are not: Park and Kim (`arXiv 2202.06709 <https://arxiv.org/abs/2202.06709>`_) warn of clean
images and of a missing L2 penalty. How much it matters is here to be seen for one small network.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from lossgeometry import line, max_eigenvalue_spectrum, random_directions
from lossgeometry.plots import STYLE, plot_line, plot_samples

WEIGHT_DECAY = 0.005

digits = load_digits()
images = torch.tensor(digits.images[:800], dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target[:800])


def augmented(batch):
    """Images moved by up to a pixel each way, and with noise."""
    moved = [torch.roll(image, torch.randint(-1, 2, (2,)).tolist(), dims=(1, 2)) for image in batch]
    return torch.stack(moved) + 0.2 * torch.randn(batch.shape)


# %%
# The training. SGD's weight decay is the L2 penalty; that of AdamW is not.

torch.manual_seed(0)
model = nn.Sequential(
    *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.MaxPool2d(2)),
    *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.GELU()),
    *(nn.Flatten(), nn.Linear(256, 10)),
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=WEIGHT_DECAY)
for _ in range(10):
    for chosen in torch.randperm(len(images)).split(64):
        optimizer.zero_grad()
        cross_entropy(model(augmented(images[chosen])), labels[chosen]).backward()
        optimizer.step()

# %%
# The objective, and the same with one thing left out at a time. All have the same eight
# mini-batches of 64 images, so that they compare by less than the intervals, which are over
# mini-batches.

chosen = torch.arange(512).split(64)
clean = [(images[c], labels[c]) for c in chosen]
trained_on = [(augmented(batch), targets) for batch, targets in clean]
cases = {
    "as trained": dict(batches=trained_on, weight_decay=WEIGHT_DECAY),
    "without L2": dict(batches=trained_on, weight_decay=0.0),
    "clean images": dict(batches=clean, weight_decay=WEIGHT_DECAY),
    "BatchNorm evaluates": dict(batches=trained_on, weight_decay=WEIGHT_DECAY),
}
largest = {}
for name, options in cases.items():
    model.train(name != "BatchNorm evaluates")
    found = max_eigenvalue_spectrum(model, cross_entropy, k=5, tol=1e-2, **options)
    largest[name] = found.eigenvalues.numpy().max(1)
    print(
        f"{name:20} NEP {100 * found.nep:4.1f} ± {200 * found.nep_standard_error:3.1f} %   "
        f"APE {found.ape:5.2f} ± {2 * found.ape_standard_error:.2f}"
    )

# %%
# Of this network clean images make no difference that would be seen above the intervals, and the
# mode of BatchNorm makes one of a factor of four. L2 adds the weight decay to every eigenvalue,
# which is nothing to large ones; it matters for what is near zero, and for surfaces, of which it
# may be the larger part.
#
# The running statistics of BatchNorm are those of one point of weight space. Along a line they are
# wrong for every other point, unless they are computed anew there (``recalibrate``), and a network
# may look sharp for that reason alone.

model.eval()
(direction,) = random_directions(model, 1, seed=0)
xs = np.linspace(-1, 1, 21)
everything = augmented(images), labels
kept = line(model, {"nll": cross_entropy}, everything, direction, xs)
anew = line(model, {"nll": cross_entropy}, everything, direction, xs, recalibrate=everything)

with plt.rc_context(STYLE):
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.3), width_ratios=(3, 2))
    plot_samples(
        largest,
        ylabel="largest eigenvalue of a mini-batch",
        colors={name: f"C{i}" for i, name in enumerate(largest)},
        ax=left,
    )
    left.set(yscale="log", ylim=(3, 100))
    plot_line(xs, kept["nll"], ylabel="NLL", label="statistics of the trained weights", ax=right)
    plot_line(xs, anew["nll"], ylabel="NLL", label="computed anew", linestyle="--", ax=right)
    right.legend(fontsize=7)
    plt.show()
