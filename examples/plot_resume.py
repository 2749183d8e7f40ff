"""
On a cluster: killed, and gone on
=================================

What takes hours is killed: by a time limit, by a node that fails, by hand. Everything that takes
long has a ``save=``, which is called now and then and when something ends the work, and a
``resume=``, which takes what was saved. The result is that of a run which nobody disturbed, to the
last bit.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from lossgeometry import random_directions, surface
from lossgeometry.plots import STYLE, plot_contours, shared_norm

digits = load_digits()
data = torch.tensor(digits.data[:500], dtype=torch.float32) / 16, torch.tensor(digits.target[:500])

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(40):
    optimizer.zero_grad()
    cross_entropy(model(data[0]), data[1]).backward()
    optimizer.step()

# %%
# A surface, and a time limit that is up after so many points: as far as Python is told of the end,
# as it is by Ctrl-C and by an exception, what is done is handed to ``save``. What is killed without
# a word loses some ten seconds.

xs = np.linspace(-1, 1, 21)
directions = random_directions(model, seed=0)
left = 200


def until_time_is_up(outputs, targets):
    """The loss, as long as there is time."""
    global left
    left -= 1
    if left < 0:
        raise TimeoutError
    return cross_entropy(outputs, targets)


saved = []
try:
    surface(model, {"nll": until_time_is_up}, data, directions, xs, xs, save=saved.append)
except TimeoutError:
    unfinished = saved[-1]
print(f"{unfinished.evaluated.sum()} of {unfinished.evaluated.size} points are done")

# %%
# A `Slice` is arrays and a few plain attributes, and goes into any file. Then the same call again.

first = unfinished["nll"].copy()
finished = surface(model, {"nll": cross_entropy}, data, directions, xs, xs, resume=unfinished)
undisturbed = surface(model, {"nll": cross_entropy}, data, directions, xs, xs)
print("the same bits:", np.array_equal(finished["nll"], undisturbed["nll"]))

with plt.rc_context(STYLE):
    figure, axes = plt.subplots(1, 2, figsize=(7.5, 3.6))
    norm = shared_norm([finished["nll"]])
    for ax, values, title in zip(
        axes, (first, finished["nll"]), ("when it was killed", "gone on"), strict=True
    ):
        plot_contours(xs, xs, values, norm=norm, ax=ax)
        ax.set_title(title)
    plt.show()

# %%
# The commands of the study do this by themselves: give the same command again. On a cluster with
# Slurm, :download:`slurm.sh <../../examples/slurm.sh>` puts its job back into the queue when the
# time is almost up, as often as it takes, on as many machines as there are; with ``torchrun``,
# points of a surface, mini-batches of a spectrum and images of a product are shared among the
# processes.
#
# .. literalinclude:: ../../examples/slurm.sh
#    :language: bash
