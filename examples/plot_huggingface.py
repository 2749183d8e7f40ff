"""
A classifier and a language model of Hugging Face
=================================================

Models that compute their own loss are taken as they are: a batch is what the model is called with,
and ``None`` stands for its loss. What that loss is the mean over is to be said where it is not
examples: a language model's is over tokens, of which batches hold different numbers.

Both models here are made from a configuration, small, and trained on the spot; a model that was
loaded is measured in the same way.
"""

import matplotlib.pyplot as plt
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from lossgeometry import Hessian, max_eigenvalue_spectrum
from lossgeometry.plots import STYLE, plot_samples

SIZE = dict(vocab_size=32, hidden_size=32, num_hidden_layers=2)
torch.manual_seed(0)

# %%
# A classifier: which of two sequences has more even words than odd ones?

words = torch.randint(2, 32, (256, 12))
more_even = ((words % 2 == 0).sum(1) > 6).long()
classifier = BertForSequenceClassification(
    BertConfig(**SIZE, num_attention_heads=4, intermediate_size=64)
)
reviews = [
    {"input_ids": words[i : i + 16], "labels": more_even[i : i + 16]} for i in range(0, 256, 16)
]

# %%
# A language model: sequences that count in steps of one to four, of 6 to 16 words. Their ends are
# filled up with padding, of which ``-100`` says that it does not count.


def counting(start, step, length):
    """Words of a sequence and their labels, which are the same without the padding."""
    sequence = (start + step * torch.arange(16)) % 32
    here = torch.arange(16) < length
    return torch.where(here, sequence, 0), torch.where(here, sequence, -100)


rows = [
    counting(*(int(torch.randint(*ends, ())) for ends in ((0, 32), (1, 5), (6, 17))))
    for _ in range(256)
]
tokens, labels = (torch.stack(column) for column in zip(*rows, strict=True))
generator = GPT2LMHeadModel(
    GPT2Config(**SIZE, num_attention_heads=4, n_positions=16, bos_token_id=0, eos_token_id=0)
)
sentences = [
    {"input_ids": tokens[i : i + 16], "labels": labels[i : i + 16]} for i in range(0, 256, 16)
]


def predicted(batch):
    """Tokens that count: the first of a sequence is predicted by nothing."""
    return int((batch["labels"][:, 1:] != -100).sum())


# %%
# Training.


def train(model, batches, epochs):
    """AdamW, as ever."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    model.eval()


train(classifier, reviews, 12)
train(generator, sentences, 12)

# %%
# ``H.check()`` compares products with finite differences of the gradient: whatever is inside of a
# model, attention, layer norms or an activation of one's own, is differentiated as it is.

cases = {
    "classifier": (classifier, reviews, None),
    "language model": (generator, sentences, predicted),
}
for name, (model, batches, count) in cases.items():
    H = Hessian(model, None, batches, count=count)
    print(f"{name}: {H.shape[0]} parameters, {H.check().verdict}")

# %%
# The largest eigenvalues of each mini-batch, which is what a step of training sees of the loss.

largest = {}
for name, (model, batches, count) in cases.items():
    found = max_eigenvalue_spectrum(model, None, batches[:6], k=3, count=count, seed=0)
    largest[name] = found.eigenvalues.numpy().max(1)
    print(
        f"{name:15} {int((found.eigenvalues < 0).sum())} of {found.eigenvalues.numel()} negative, "
        f"mean of the others {found.ape:.1f} ± {2 * found.ape_standard_error:.1f}"
    )

# %%
# Dots are the largest eigenvalue of each mini-batch, beside their mean and its 95 % interval. Of
# the classifier they differ by a factor of more than ten from one mini-batch to another.

with plt.rc_context(STYLE):
    figure, ax = plt.subplots(figsize=(5, 3.5))
    plot_samples(
        largest,
        ylabel="largest eigenvalue of a mini-batch",
        colors={"classifier": "C0", "language model": "C1"},
        ax=ax,
    )
    plt.show()
