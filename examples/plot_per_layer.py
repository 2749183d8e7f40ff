"""
Which layer is sharp
====================

A block of the Hessian is the curvature if only one layer moves. ``per_layer`` makes an operator for
each of them. The blocks do not add up to the whole: eigenvalues of a block are never above the
largest of the Hessian, which also knows how layers move together.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from lossgeometry import Hessian, eigsh, per_layer
from lossgeometry.plots import STYLE, plot_layers

digits = load_digits()
images = torch.tensor(digits.images[:512], dtype=torch.float32) / 16
labels = torch.tensor(digits.target[:512])


# %%
# A small transformer that sees the rows of an image one by one.


class Rows(nn.Module):
    """Two blocks of attention over eight tokens."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Linear(8, 24)
        self.position = nn.Parameter(0.1 * torch.randn(8, 24))
        block = nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, 2)
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        """Logits of images, which are (n, 8, 8)."""
        return self.head(self.blocks(self.embedding(x) + self.position).mean(1))


torch.manual_seed(0)
model = Rows()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(60):
    optimizer.zero_grad()
    cross_entropy(model(images), labels).backward()
    optimizer.step()

# %%
# The four eigenvalues of largest magnitude of each layer. Layers have few eigenvalues that matter,
# and these take about twenty products each.

data = images[:128], labels[:128]
found = {}
for name, block in per_layer(Hessian, model, cross_entropy, data):
    found[name] = eigsh(block, k=4, tol=1e-2)
    values = " ".join(f"{value:9.3f}" for value in found[name].eigenvalues)
    print(f"{name:36} {values}   ± {found[name].errors.max():.0e}")

whole = eigsh(Hessian(model, cross_entropy, data), k=1, tol=1e-2)
print(f"{'all layers':36} {whole.eigenvalues[0]:9.3f}   ± {whole.errors[0]:.0e}")

# %%
# Red curves upwards; what curved downwards would be blue.

names = [name.replace("blocks.layers.", "block ") for name in found]
values = np.stack([pairs.eigenvalues.numpy() for pairs in found.values()])
with plt.rc_context(STYLE):
    figure, ax = plt.subplots(figsize=(6.5, 4.5))
    plot_layers(names, values, ax=ax)
    plt.show()
