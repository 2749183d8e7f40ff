"""
The first spectrum of your own model
====================================

A Hessian has as many rows as the model has parameters, and is never written down: it is known by
its products with vectors, and a few dozen of these tell its largest eigenvalues, each with its
error. Any ``torch.nn.Module`` and any loss will do; here it is a small convolutional network that
reads digits.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lossgeometry import Hessian, eigsh
from lossgeometry.plots import STYLE

digits = load_digits()
images = torch.tensor(digits.images[:600], dtype=torch.float32)[:, None] / 16
dataset = TensorDataset(images, torch.tensor(digits.target[:600]))

# %%
# A model of your own, trained as you train it.

torch.manual_seed(0)
model = nn.Sequential(
    *(nn.Conv2d(1, 8, 3, padding=1), nn.GELU(), nn.MaxPool2d(2)),
    *(nn.Conv2d(8, 16, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(256, 10)),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
for _ in range(20):
    for batch, labels in DataLoader(dataset, batch_size=64, shuffle=True):
        optimizer.zero_grad()
        cross_entropy(model(batch), labels).backward()
        optimizer.step()

# %%
# The operator takes the model, the loss, and data as a DataLoader yields them. It is the Hessian of
# the mean over *all* images, in whatever batches they come. Derivatives can be wrong without a
# word, so the first thing to ask is whether these are right.

H = Hessian(model, cross_entropy, DataLoader(dataset, batch_size=200))
print(H.shape)
print(H.check().verdict, "-", H.check())

# %%
# ``which="BE"`` asks for both ends of the spectrum. An eigenvalue of the Hessian is within the
# stated error of each; ``converged`` says whether that is as small as was asked for.

top = eigsh(H, k=16, which="BE")
print(f"{'eigenvalue':>10} {'error':>8}  converged")
for value, error, converged in zip(top.eigenvalues, top.errors, top.converged, strict=True):
    print(f"{value:10.4f} {error:8.1e}  {bool(converged)}")
print(f"{top.matvecs} products")

# %%
# In some directions the loss curves upwards steeply, in others a little downwards: the weights are
# not at a minimum. Bars of the errors are drawn, and too short to see.

with plt.rc_context(STYLE):
    figure, ax = plt.subplots(figsize=(6, 3.5))
    values, errors = top.eigenvalues.numpy(), top.errors.numpy()
    ranks = range(1, len(values) + 1)
    ax.axhline(0, color="gray", linewidth=0.7)
    ax.errorbar(ranks, values, errors, fmt="o", markersize=4, capsize=3)
    ax.set_yscale("symlog", linthresh=0.1)
    ax.set(xlabel="rank", ylabel="eigenvalue of the Hessian", xticks=[1, 4, 8, 12, 16])
    plt.show()
