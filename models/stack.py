"""Networks of one shape as one: a matrix of weights, of which each network is a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from models.csan import WindowAttention, common_masks
from models.isotropic import random_branches

FREE = ("window", "head_window", "border")  # options in which the networks of a stack may differ


class Stack:
    """Networks that differ only in their weights, and in what the attention of CSANs sees.

    What n of them do is one program, whose operations are n times as large as those of one network:
    these are so small that they leave most of a GPU idle.

    Parameters
    ----------
    models : sequence of nn.Module
        Equal but for the options `FREE`. They move to `device`; their parameters become views of
        `weights`, and their statistics of `buffers`.
    device : torch.device or str

    Attributes
    ----------
    weights : Tensor
        (n, P), all parameters of a network in a row. One leaf: its gradient, its norm and a step of
        an optimizer take a handful of kernels, whatever the number of layers.
    buffers : dict of str to Tensor
        (n, ...), the running statistics of every BatchNorm, to which each mini-batch adds.
    """

    def __init__(self, models: Sequence[nn.Module], device: torch.device | str) -> None:
        for model in models:
            model.to(device).train()
        self.models = models
        self.weights = torch.stack(
            [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models]
        )
        self._shapes = {name: p.shape for name, p in models[0].named_parameters()}
        for model, row in zip(models, self.weights, strict=True):
            for parameter, piece in zip(model.parameters(), self._pieces(row), strict=True):
                parameter.data = piece
        self.weights.requires_grad_()
        everything = [persistent_buffers(model) for model in models]
        self.buffers = {
            name: torch.stack([own[name] for own in everything]) for name in everything[0]
        }
        for name, stacked in self.buffers.items():
            place, _, key = name.rpartition(".")
            for model, row in zip(models, stacked, strict=True):
                setattr(model.get_submodule(place), key, row)
        self._branches = random_branches(models[0])
        self._program, self._masks = models[0], dict[str, Tensor]()
        attentions = [_attentions(model) for model in models]  # alike in all blocks of a network
        if attentions[0]:
            first = [next(iter(modules.values())) for modules in attentions]
            # The others are masks of the one with the largest head window.
            self._program = models[max(range(len(models)), key=lambda k: first[k].head_window)]
            masks = common_masks(first)
            self._masks = {
                f"{name}.{key}": torch.stack([mask[key] for mask in masks])
                for name in attentions[0]
                for key in masks[0]
            }

    def draw(self, images: int) -> Tensor:
        """Choose the residual branches that one network keeps: (images, branches), 1 or 0.

        Drawn from PyTorch's global generator on the CPU, in the order of a forward pass.
        """
        drawn = [branch.draw(images) for branch in self._branches.values()]
        return torch.stack(drawn, 1) if drawn else torch.zeros(images, 0)

    def losses(
        self,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        inputs: Tensor,
        targets: Tensor,
        kept: Tensor,
    ) -> Tensor:
        """Losses (n,) of the networks in training mode, each on images of its own.

        BatchNorm normalises over these images, and its running statistics take them in.

        Parameters
        ----------
        loss_fn : callable
            ``(outputs, targets) -> scalar``.
        inputs, targets : Tensor
            (n, B, channels, height, width) and (n, B, ...).
        kept : Tensor
            (n, B, branches), what `draw` chose for each network.
        """

        def loss(
            weights: Tensor, buffers: dict[str, Tensor], x: Tensor, y: Tensor, kept: Tensor
        ) -> Tensor:
            named = dict(zip(self._shapes, self._pieces(weights), strict=True))
            branches = dict(zip(self._branches, kept.unbind(1), strict=True))
            return loss_fn(functional_call(self._program, {**named, **buffers, **branches}, x), y)

        if len(self.models) == 1:
            return loss(self.weights[0], {}, inputs[0], targets[0], kept[0])[None]
        return vmap(loss)(self.weights, {**self._masks, **self.buffers}, inputs, targets, kept)

    def _pieces(self, row: Tensor) -> list[Tensor]:
        """The parameters of a network, of all of them in a row."""
        sizes = [shape.numel() for shape in self._shapes.values()]
        return [
            piece.view(shape)
            for piece, shape in zip(row.split(sizes), self._shapes.values(), strict=True)
        ]


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint of `model` holds besides its parameters: statistics of BatchNorm."""
    trained = dict(model.named_parameters())
    return {name: t for name, t in model.state_dict().items() if name not in trained}


def _attentions(model: nn.Module) -> dict[str, WindowAttention]:
    found = model.named_modules()
    return {name: module for name, module in found if isinstance(module, WindowAttention)}
