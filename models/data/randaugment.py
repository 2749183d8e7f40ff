"""RandAugment (Cubuk et al., 2020) of whole batches, as timm draws it and as Pillow computes it.

Every image has operations and magnitudes of its own. They are drawn on the CPU, which therefore
knows how many images take which operation; those are treated together, on the device of the images,
without waiting for it. The results are Pillow's: its roundings are made here, too, in its order and
its precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

TOP_LEVEL = 10.0
PROBABILITY = 0.5  # of doing an operation that was drawn

# What each operation is called with at the top level, as in timm's ``rand`` without ``inc``, of
# which a higher level is the weaker one of Posterize and Solarize.
TOP_ARGUMENTS = {
    "AutoContrast": 0,  # it needs none
    "Equalize": 0,  # it needs none
    "Invert": 0,  # that of Solarize
    "Rotate": 30,  # degrees
    "Posterize": 4,  # bits that are kept
    "Solarize": 256,  # the first value that is inverted
    "SolarizeAdd": 110,  # to values below 128
    "Color": 1.8,  # and 0.1 at every level; 1 leaves the image as it is
    "Contrast": 1.8,
    "Brightness": 1.8,
    "Sharpness": 1.8,
    "ShearX": 0.3,
    "ShearY": 0.3,
    "TranslateXRel": 0.45,  # of the width
    "TranslateYRel": 0.45,  # of the height
}
OPERATIONS = tuple(TOP_ARGUMENTS)
NONE = len(OPERATIONS)


@dataclass(frozen=True)
class Operations:
    """What is done to each of n images, one operation after the other; tensors on the CPU."""

    kinds: Tensor  # int64 (operations, n), indices into `OPERATIONS`, or `NONE`
    arguments: Tensor  # float64 (operations, n), see `arguments_of`
    bicubic: Tensor  # bool (operations, n), of geometric operations; the others are bilinear


def draw(n: int, operations: int, magnitude: float) -> Operations:
    """Draw so many `operations` for each of `n` images, from PyTorch's global generator.

    Each is one of the fifteen, with equal probability, and is done with probability 1/2. Its level
    is normal, with mean `magnitude` and standard deviation 1, and cut off at 0 and 10. Signs and
    interpolations are equally probable.
    """
    shape = (operations, n)
    kinds = torch.randint(len(OPERATIONS), shape)
    # In float64, in which they do not depend on the instructions that the CPU has.
    levels = (magnitude + torch.randn(shape, dtype=torch.float64)).clamp(0, TOP_LEVEL)
    done = torch.rand(shape) < PROBABILITY
    positive, bicubic = torch.rand(2, *shape) < 0.5
    arguments = arguments_of(kinds, levels, 2.0 * positive - 1)
    return Operations(kinds.masked_fill(~done, NONE), arguments, bicubic)


def joined(several: Sequence[Operations]) -> Operations:
    """Operations of the images of several mini-batches, one after the other."""
    of_kind = zip(*((o.kinds, o.arguments, o.bicubic) for o in several), strict=True)
    return Operations(*(torch.cat(tensors, 1) for tensors in of_kind))


def arguments_of(kinds: Tensor, levels: Tensor, signs: Tensor) -> Tensor:
    """Arguments of the operations `kinds` at `levels` from 0 to 10: tensors of one shape."""
    groups = _GROUP_OF[kinds]
    arguments = levels / TOP_LEVEL * _TOP_ARGUMENTS[kinds]
    arguments = torch.where(groups == _BILINEAR, arguments * signs, arguments)
    arguments = torch.where(groups < _BLENDED, arguments.floor(), arguments)
    return arguments + 0.1 * ((groups >= _BLENDED) & (groups < _BILINEAR))


def apply(images: Tensor, operations: Operations, fill: Tensor) -> Tensor:
    """Do `operations` to images.

    Parameters
    ----------
    images : Tensor
        Uint8 (n, channels, height, width), grey or red, green and blue.
    operations : Operations
        Of n images.
    fill : Tensor
        Uint8 (channels,) on the device of the images, the colour of what lies beyond their borders.
    """
    groups = _GROUP_OF[operations.kinds]
    groups += (groups == _BILINEAR) & operations.bicubic
    matrices = _matrices(operations, images.shape[2:])
    for layer in zip(groups, operations.arguments, matrices, strict=True):
        images = _apply_one_to_each(images, *layer, fill)
    return images


def _apply_one_to_each(
    images: Tensor, groups: Tensor, arguments: Tensor, matrices: Tensor, fill: Tensor
) -> Tensor:
    send = partial(torch.Tensor.to, device=images.device, non_blocking=True)
    order = groups.argsort()
    sizes = groups.bincount(minlength=_BILINEAR + len(_INTERPOLATIONS)).tolist()
    changed, blended, moved = sizes[:_BLENDED], sizes[_BLENDED:_BILINEAR], sizes[_BILINEAR:]
    sections = [sum(changed), sum(blended), sum(moved)]
    to_change, to_blend, to_move = images.index_select(0, send(order)).split(sections)
    amounts, factors, _ = send(arguments[order])[:, None, None, None].split(sections)

    each = zip(_CHANGES, to_change.split(changed), amounts.split(changed), strict=True)
    done = [change(part, amount) for change, part, amount in each if len(part)]
    if len(to_blend):
        pairs = zip(_ENDS, to_blend.split(blended), strict=True)
        ends = torch.cat([end(part) for end, part in pairs if len(part)])
        done.append(_blend(ends, to_blend, factors))
    if len(to_move):
        own = send(matrices[order[-len(to_move) :]])
        done.append(_move(to_move, own, moved, fill))
    return torch.cat(done).index_select(0, send(order.argsort()))


def _unchanged(images: Tensor, _: Tensor) -> Tensor:
    return images


def _autocontrast(images: Tensor, _: Tensor) -> Tensor:
    darkest, brightest = images.amin((2, 3), True), images.amax((2, 3), True)
    span = (brightest - darkest).double()
    scale = torch.full_like(span, 255) / span  # a number over a tensor would be a product
    stretched = (images * scale - darkest * scale).clamp(0, 255).to(torch.uint8)
    return torch.where(darkest < brightest, stretched, images)


def _equalize(images: Tensor, _: Tensor) -> Tensor:
    values = images.flatten(2).long()
    histogram = torch.zeros(*values.shape[:2], 256, dtype=torch.int64, device=images.device)
    histogram.scatter_add_(2, values, torch.ones_like(values))
    brightest = histogram.gather(2, values.amax(2, keepdim=True))
    step = (values.shape[2] - brightest) // 255
    darker = histogram.cumsum(2) - histogram
    table = ((step // 2 + darker) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, table.gather(2, values), values).to(torch.uint8).view_as(images)


def _solarize(images: Tensor, first: Tensor) -> Tensor:
    return torch.where(images < first, images, 255 - images)


def _posterize(images: Tensor, bits: Tensor) -> Tensor:
    # None are left below a level of 2.5, which Pillow made black images of before it refused to.
    return images & (255 << (8 - bits.int())).to(torch.uint8)


def _solarize_add(images: Tensor, added: Tensor) -> Tensor:
    return torch.where(images < 128, (images + added).clamp(max=255), images).to(torch.uint8)


def _black(images: Tensor) -> Tensor:
    return torch.zeros_like(images)


def _grey(images: Tensor) -> Tensor:
    """Luma, rounded, in all channels."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.int().unbind(1)
    luma = (19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16
    return luma.to(torch.uint8)[:, None].expand_as(images)


def _mean_grey(images: Tensor) -> Tensor:
    pixels = images[0, 0].numel()
    total = _grey(images)[:, :1].sum((2, 3), keepdim=True)
    return ((2 * total + pixels) // (2 * pixels)).to(torch.uint8).expand_as(images)


def _smooth(images: Tensor) -> Tensor:
    """Means of 3 x 3 pixels, the middle one five times; the border stays as it is."""
    whole = images.int()
    rows = whole[:, :, :-2] + whole[:, :, 1:-1] + whole[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * whole[:, :, 1:-1, 1:-1]
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = (2 * total + 13) // 26
    return smooth


def _blend(ends: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    start = ends.float()
    return (start + factors.float() * (images.float() - start)).clamp(0, 255).to(torch.uint8)


def _matrices(operations: Operations, size: torch.Size) -> Tensor:
    """Affine maps (operations, n, 2, 3) of (x, y, 1), from where a pixel goes to where it was."""
    height, width = size

    def only(name: str) -> Tensor:
        return operations.arguments.where(operations.kinds == OPERATIONS.index(name), 0)

    angles = only("Rotate") % 360 * (-math.pi / 180)
    cos, sin = (torch.round(f(angles), decimals=15) for f in (torch.cos, torch.sin))
    x, y = width / 2, height / 2
    across = cos * -x + sin * -y + x + only("TranslateXRel") * width
    down = -sin * -x + cos * -y + y + only("TranslateYRel") * height
    rows = (cos, sin + only("ShearX"), across, only("ShearY") - sin, cos, down)
    return torch.stack(rows, -1).unflatten(-1, (2, 3))


def _move(images: Tensor, matrices: Tensor, sizes: list[int], fill: Tensor) -> Tensor:
    """Move pixels by affine maps; of each of `_INTERPOLATIONS`, so many images."""
    height, width = images.shape[2:]
    x = torch.arange(width, device=images.device) + 0.5
    y = torch.arange(height, device=images.device)[:, None] + 0.5
    a, b, c = matrices[..., None, None].unbind(2)
    places = a * x + b * y + c  # (n, 2, height, width), of x and y
    limits = torch.tensor([width, height])[:, None, None].to(images.device, non_blocking=True)
    inside = ((places >= 0) & (places < limits)).all(1, keepdim=True)
    places -= 0.5
    corners = places.floor()
    fractions = places - corners
    parts = zip(*(t.split(sizes) for t in (images, corners.long(), fractions)), strict=True)
    found = [
        _interpolated(own, corner, fraction, reach, interpolate)
        for (own, corner, fraction), (reach, interpolate) in zip(
            parts, _INTERPOLATIONS, strict=True
        )
        if len(own)
    ]
    return torch.where(inside, torch.cat(found), fill[:, None, None])


def _interpolated(
    images: Tensor,
    corners: Tensor,
    fractions: Tensor,
    reach: int,
    interpolate: Callable[..., Tensor],
) -> Tensor:
    """Interpolate between 2 * `reach` pixels along each axis, the nearest beyond the border."""
    height, width = images.shape[2:]
    steps = torch.arange(1 - reach, 1 + reach, device=images.device)[:, None, None]
    columns = (corners[:, 0, None] + steps).clamp(0, width - 1)
    rows = (corners[:, 1, None] + steps).clamp(0, height - 1)
    index = rows[:, :, None] * width + columns[:, None]  # (n, rows, columns, height, width)
    index = index.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    values = images.flatten(2).gather(2, index).short()
    values = values.unflatten(2, (2 * reach, 2 * reach, height, width))
    dx, dy = fractions[:, None].unbind(2)
    along_rows = interpolate(dx[:, :, None], *values.unbind(3))
    return interpolate(dy, *along_rows.unbind(2)).clamp(0, 255).to(torch.uint8)


def _linear(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return a + (b - a) * t


def _cubic(t: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Cubic convolution (Keys, 1981) with slope -1."""
    return b + t * ((c - a) + t * ((2 * (a - b) + c - d) + t * (-a + b - c + d)))


# Groups of images that are treated together: those that are changed, each in its way, those that
# are blended with an image that each makes in its way, and those whose pixels are moved.
_CHANGES = (_unchanged, _autocontrast, _equalize, _solarize, _posterize, _solarize_add)
_ENDS = (_black, _mean_grey, _grey, _smooth)
_INTERPOLATIONS: tuple[tuple[int, Callable[..., Tensor]], ...] = ((1, _linear), (2, _cubic))
_BLENDED = len(_CHANGES)
_BILINEAR = _BLENDED + len(_ENDS)
_GROUPS = {
    **dict(AutoContrast=1, Equalize=2, Invert=3, Solarize=3, Posterize=4, SolarizeAdd=5),
    **dict(Brightness=6, Contrast=7, Color=8, Sharpness=9),
}
_GROUP_OF = torch.tensor([*(_GROUPS.get(name, _BILINEAR) for name in OPERATIONS), 0])
_TOP_ARGUMENTS = torch.tensor(list(TOP_ARGUMENTS.values()), dtype=torch.float64)
