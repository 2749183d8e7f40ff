"""
All eigenvalues at once, with errors
====================================

The density of *all* eigenvalues costs a few hundred products, however many eigenvalues there are.
It is an estimate from random vectors and so is worth nothing without its errors, of which there are
two: one of chance, which more ``probes`` make smaller, and one of resolution, which more ``steps``
do. This network is small enough to write down its Hessian and see whether they are true.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from lossgeometry import Hessian, spectral_density, trace
from lossgeometry.plots import STYLE, plot_spectral_density

digits = load_digits()
images = torch.tensor(digits.data[:500], dtype=torch.float32) / 16
labels = torch.tensor(digits.target[:500])

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(60):
    optimizer.zero_grad()
    cross_entropy(model(images), labels).backward()
    optimizer.step()

# %%
# The estimate takes 8 probes of 40 steps, 320 products, and the truth 910, one for each parameter.

H = Hessian(model, cross_entropy, (images, labels))
D = spectral_density(H, probes=8, steps=40, seed=0)
truth = torch.linalg.eigvalsh((H @ torch.eye(H.shape[0])).double()).numpy()
print(f"{D.matvecs} products for {H.shape[0]} eigenvalues")

# %%
# Numbers with their 95 % intervals, and the truth. Of a count the interval is as wide as the
# eigenvalues near its ends are unresolved.

total = trace(H, matvecs=99, seed=0)
rows = {"trace": (total, truth.sum())}
for lower, upper in ((-np.inf, -0.01), (0.02, np.inf), (0.1, np.inf)):
    count = ((truth >= lower) & (truth <= upper)).sum()
    rows[f"eigenvalues in [{lower}, {upper}]"] = (D.count(lower, upper), count)
print(f"{'':30} {'estimate':>9} {'from':>7} {'to':>7} {'truth':>7}")
for name, (estimate, true) in rows.items():
    low, high = estimate.interval()
    print(f"{name:30} {estimate.estimate:9.2f} {low:7.2f} {high:7.2f} {true:7.2f}")

# %%
# The band is two standard errors and the systematic error. The dashed line is the density of the
# true eigenvalues with the same smoothing: each is a bell of the width ``D.bandwidth``.

grid = D.grid(600)
estimate = D.estimate(grid)
distances = (grid[:, None] - truth) / D.bandwidth
bells = np.exp(-(distances**2) / 2) / (D.bandwidth * np.sqrt(2 * np.pi))
exact = bells.mean(axis=1)

with plt.rc_context(STYLE):
    figure, ax = plt.subplots(figsize=(6, 3.5))
    plot_spectral_density(
        grid,
        estimate.estimate,
        estimate.standard_error,
        systematic_error=estimate.systematic_error,
        label="estimate",
        ax=ax,
    )
    ax.plot(grid, exact, "--", color="black", linewidth=1, label="truth")
    ax.set_ylim(1e-4, None)
    ax.legend()
    plt.show()

# %%
# Where the band reaches down to nothing, at the right, single eigenvalues stand out: how much each
# of them weighs in a random vector is chance. :func:`lossgeometry.eigsh` finds those.
