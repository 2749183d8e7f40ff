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
    arguments = levels / TOP_LEVEL * _TOP_ARGUMENTS[kinds]
    groups = _GROUPS[kinds]
    arguments = torch.where(groups == _BILINEAR, arguments * signs, arguments)
    whole = (groups > 2) & (groups <= len(_BY_VALUE))
    blended = (groups > len(_BY_VALUE)) & (groups < _BILINEAR)
    return torch.where(whole, arguments.floor(), arguments) + 0.1 * blended


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
    for layer in zip(operations.kinds, operations.arguments, operations.bicubic, strict=True):
        images = _apply_one_to_each(images, *layer, fill)
    return images


def _apply_one_to_each(
    images: Tensor, kinds: Tensor, arguments: Tensor, bicubic: Tensor, fill: Tensor
) -> Tensor:
    device = images.device
    groups = _GROUPS[kinds]
    groups += (groups == _BILINEAR) & bicubic
    order = groups.argsort()
    sizes = groups.bincount(minlength=_BILINEAR + 2).tolist()
    images, kinds, arguments = (
        images.index_select(0, order.to(device)),
        kinds[order],
        arguments[order],
    )
    amounts = arguments.to(device)[:, None, None, None]

    starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    blended = slice(starts[len(_BY_VALUE) + 1], starts[_BILINEAR])
    done = [images[: sizes[0]]]
    for i, (change, size) in enumerate(zip(_BY_VALUE, sizes[1:], strict=False), start=1):
        if size:
            here = slice(starts[i], starts[i + 1])
            done.append(change(images[here], amounts[here]))
    if blended.start < blended.stop:
        parts = images[blended].split(sizes[len(_BY_VALUE) + 1 : _BILINEAR])
        ends = [end(part) for end, part in zip(_BLENDED, parts, strict=True) if len(part)]
        done.append(_blend(torch.cat(ends), images[blended], amounts[blended]))
    for i, (reach, interpolate) in enumerate(_INTERPOLATIONS, start=_BILINEAR):
        if sizes[i]:
            here = slice(starts[i], starts[i + 1])
            matrices = _matrices(kinds[here], arguments[here], images.shape[2:]).to(device)
            done.append(_transform(images[here], matrices, reach, interpolate, fill))
    return torch.cat(done).index_select(0, order.argsort().to(device))


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


def _matrices(kinds: Tensor, arguments: Tensor, size: torch.Size) -> Tensor:
    """Affine maps (m, 2, 3) of (x, y, 1), where a pixel goes, to where it comes from."""
    height, width = size

    def only(name: str) -> Tensor:
        return arguments.where(kinds == OPERATIONS.index(name), 0)

    angles = only("Rotate") % 360 * (-math.pi / 180)
    cos, sin = (torch.round(f(angles), decimals=15) for f in (torch.cos, torch.sin))
    x, y = width / 2, height / 2
    across = cos * -x + sin * -y + x + only("TranslateXRel") * width
    down = -sin * -x + cos * -y + y + only("TranslateYRel") * height
    rows = (cos, sin + only("ShearX"), across, only("ShearY") - sin, cos, down)
    return torch.stack(rows, 1).view(-1, 2, 3)


def _transform(
    images: Tensor,
    matrices: Tensor,
    reach: int,
    interpolate: Callable[..., Tensor],
    fill: Tensor,
) -> Tensor:
    """Interpolate between 2 * `reach` pixels along each axis; those beyond the border are its."""
    height, width = images.shape[2:]
    device = images.device
    x = torch.arange(width, device=device) + 0.5
    y = torch.arange(height, device=device)[:, None] + 0.5
    a, b, c = matrices[..., None, None].unbind(2)
    places = a * x + b * y + c  # (m, 2, height, width), of x and y
    inside = (places >= 0) & (places < torch.tensor([[[width]], [[height]]], device=device))
    places -= 0.5
    corners = places.floor()
    fractions = places - corners
    near = (
        corners.long()[:, :, None]
        + torch.arange(1 - reach, 1 + reach, device=device)[:, None, None]
    )
    columns, rows = near[:, 0].clamp(0, width - 1), near[:, 1].clamp(0, height - 1)
    index = rows[:, :, None] * width + columns[:, None]  # (m, rows, columns, height, width)
    index = index.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    values = images.flatten(2).gather(2, index).short()
    values = values.unflatten(2, (2 * reach, 2 * reach, height, width))
    dx, dy = fractions[:, None].unbind(2)
    along_rows = interpolate(*values.unbind(3), dx[:, :, None])
    found = interpolate(*along_rows.unbind(2), dy).clamp(0, 255).to(torch.uint8)
    return torch.where(inside.all(1, keepdim=True), found, fill[:, None, None])


def _linear(first: Tensor, second: Tensor, d: Tensor) -> Tensor:
    return first + (second - first) * d


def _cubic(a: Tensor, b: Tensor, c: Tensor, d: Tensor, t: Tensor) -> Tensor:
    """Keys's cubic convolution with slope -1."""
    return b + t * ((c - a) + t * ((2 * (a - b) + c - d) + t * (-a + b - c + d)))


_BY_VALUE = (_autocontrast, _equalize, _solarize, _posterize, _solarize_add)
_BLENDED = (_black, _mean_grey, _grey, _smooth)
_INTERPOLATIONS = ((1, _linear), (2, _cubic))
_BILINEAR = 1 + len(_BY_VALUE) + len(_BLENDED)  # group 0 stays as it is
_GROUP_OF = {
    **dict(AutoContrast=1, Equalize=2, Solarize=3, Invert=3, Posterize=4, SolarizeAdd=5),
    **dict(Brightness=6, Contrast=7, Color=8, Sharpness=9),
}
_GROUPS = torch.tensor([*(_GROUP_OF.get(name, _BILINEAR) for name in OPERATIONS), 0])
_TOP_ARGUMENTS = torch.tensor(list(TOP_ARGUMENTS.values()), dtype=torch.float64)
