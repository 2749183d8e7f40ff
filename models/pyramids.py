"""The networks of Park and Kim's Figure 5: a ResNet, a ViT, and two pyramids between them.

Their parts and their first weights are timm's (``pip install -e '.[timm]'``); the sizes are chosen
here, for images of a few pixels. The ViT has one grid of tokens, as `models.csan`. The others have
stages of two blocks; each stage has half as many tokens along each side as the one before it, and
twice their width.

- *ResNet* (He et al., CVPR 2016): two 3 x 3 convolutions a block. The stem is of three 3 x 3
  convolutions (He et al., CVPR 2019), the first with the stride of a patch, and without pooling.
- *ViT* (Dosovitskiy et al., ICLR 2021), with a class token, or an average over the tokens.
- *PiT* (Heo et al., ICCV 2021): every token attends to every other; a depthwise convolution with
  stride 2 between stages; a class token. The first patches do not overlap, as they do in the paper.
- *Swin* (Liu et al., ICCV 2021): attention within windows of 4 x 4 tokens (7 x 7 in the paper),
  which are shifted in every other block; an average over the tokens.

Changed in all of them: which images skip a residual branch is drawn by
`models.isotropic.StochasticDepth`, for a whole mini-batch however it is cut. The position
embeddings of ViT and PiT begin as large as that of `models.isotropic.Isotropic`, for its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn

from lossgeometry.errors import InputError
from models.description import require, require_integer, require_number
from models.isotropic import (
    MAX_DEPTH,
    MAX_DROP,
    MAX_SIZE,
    MAX_TOKENS,
    MAX_WEIGHTS,
    Pooling,
    StochasticDepth,
)
from models.meta import without_weights

STAGE = 2  # blocks: in a Swin, one with windows as they are and one with shifted windows
MOST_STAGES = 4  # of timm's ResNet
WINDOW = 4  # of a Swin


@dataclass(frozen=True)
class Sizes:
    """Options of these networks, each of which reads those that it has.

    Parameters
    ----------
    image_size, channels, classes : int
        Pixels along each side of the image, its channels, and the number of classes.
    patch_size : int
        Pixels along each side of a token of the first stage; divides `image_size`.
    dim, heads : int
        Width of those tokens, and attention heads, which divide it; of a ResNet the width is even.
    depth : int
        Number of blocks, of all stages.
    mlp_ratio : float
        Hidden width of the perceptrons by that of their tokens.
    stochastic_depth : float
        Probability of skipping a residual branch in the last block; it rises linearly from 0.
    position_std : float
        Standard deviation of the position embedding before training.
    pooling : {"gap", "cls"}
        Of a ViT.

    Raises
    ------
    InputError
        If an option is out of range.
    """

    image_size: int
    channels: int
    classes: int
    patch_size: int
    dim: int
    depth: int
    heads: int = 1
    mlp_ratio: float = 4.0
    stochastic_depth: float = 0.0
    position_std: float = 0.5
    pooling: Pooling = "gap"

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "classes", "patch_size", "dim", "depth", "heads"):
            most = MAX_DEPTH if name == "depth" else MAX_SIZE
            require_integer(name, getattr(self, name), 1, most)
        fits = self.image_size % self.patch_size == 0
        require(fits, "patch_size", self.patch_size, f"a divisor of {self.image_size}")
        few = self.grid**2 <= MAX_TOKENS
        require(few, "image_size", self.image_size, f"at most {MAX_TOKENS} tokens")
        require(self.dim % self.heads == 0, "heads", self.heads, f"a divisor of {self.dim}")
        require_number("mlp_ratio", self.mlp_ratio, 1 / self.dim, MAX_SIZE / self.dim)
        require_number("stochastic_depth", self.stochastic_depth, 0, MAX_DROP)
        require_number("position_std", self.position_std, 0, MAX_SIZE)
        known = get_args(Pooling)
        require(self.pooling in known, "pooling", self.pooling, f"one of {known}")

    @property
    def grid(self) -> int:
        """Tokens along each side of the image, in the first stage."""
        return self.image_size // self.patch_size

    def stages(self, start: int) -> tuple[int, ...]:
        """A size of each stage that begins as `start` and doubles from one to the next."""
        count = self.depth // STAGE
        whole = self.depth == count * STAGE and self.grid % 2 ** (count - 1) == 0
        expected = f"stages of {STAGE} blocks, of which each halves the {self.grid} tokens"
        require(whole, "depth", self.depth, expected)
        return tuple(start * 2**i for i in range(count))


def _resnet(sizes: Sizes) -> nn.Module:
    from timm.models.resnet import BasicBlock, ResNet

    require(sizes.dim % 2 == 0, "dim", sizes.dim, "an even number")
    widths = sizes.stages(sizes.dim)
    most = STAGE * MOST_STAGES
    require(sizes.depth <= most, "depth", sizes.depth, f"at most {most} blocks")
    block: Any = BasicBlock  # of which timm's annotation wants an instance
    model: Any = ResNet(
        block,
        (STAGE,) * len(widths),
        sizes.classes,
        sizes.channels,
        stem_type="deep",
        stem_width=sizes.dim // 2,
        channels=widths,
        drop_path_rate=sizes.stochastic_depth,
    )
    model.conv1[0].stride = (sizes.patch_size, sizes.patch_size)
    model.maxpool = nn.Identity()
    for i in range(len(widths), MOST_STAGES):
        model.add_module(f"layer{i + 1}", nn.Identity())
    return model


def _vit(sizes: Sizes) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    pool: Any = {"gap": "avg", "cls": "token"}[sizes.pooling]
    model: Any = VisionTransformer(
        sizes.image_size,
        sizes.patch_size,
        sizes.channels,
        sizes.classes,
        global_pool=pool,
        class_token=sizes.pooling == "cls",
        embed_dim=sizes.dim,
        depth=sizes.depth,
        num_heads=sizes.heads,
        mlp_ratio=sizes.mlp_ratio,
        drop_path_rate=sizes.stochastic_depth,
    )
    nn.init.normal_(model.pos_embed, std=sizes.position_std)
    return model


def _pit(sizes: Sizes) -> nn.Module:
    from timm.models.pit import PoolingVisionTransformer

    heads = sizes.stages(sizes.heads)
    model = PoolingVisionTransformer(
        sizes.image_size,
        sizes.patch_size,
        sizes.patch_size,
        base_dims=(sizes.dim // sizes.heads,) * len(heads),
        depth=(STAGE,) * len(heads),
        heads=heads,
        mlp_ratio=sizes.mlp_ratio,
        num_classes=sizes.classes,
        in_chans=sizes.channels,
        drop_path_rate=sizes.stochastic_depth,
    )
    nn.init.normal_(model.pos_embed, std=sizes.position_std)
    return model


def _swin(sizes: Sizes) -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    heads = sizes.stages(sizes.heads)
    return SwinTransformer(
        sizes.image_size,
        sizes.patch_size,
        sizes.channels,
        sizes.classes,
        embed_dim=sizes.dim,
        depths=(STAGE,) * len(heads),
        num_heads=heads,
        window_size=WINDOW,
        mlp_ratio=sizes.mlp_ratio,
        drop_path_rate=sizes.stochastic_depth,
    )


MAKERS: dict[str, Callable[[Sizes], nn.Module]] = {
    "resnet": _resnet,
    "vit": _vit,
    "pit": _pit,
    "swin": _swin,
}


def build_pyramid(network: str, *, most_weights: int = MAX_WEIGHTS, **options: object) -> nn.Module:
    """Build the `network` of `MAKERS` of so many weights at most; `options` are those of `Sizes`.

    Raises
    ------
    InputError
        If an option is out of range, or timm is not installed.
    TypeError
        If there is no such option.
    """
    sizes = Sizes(**options)  # type: ignore[arg-type]
    try:
        with without_weights():
            weights = sum(p.numel() for p in MAKERS[network](sizes).parameters())
        most = min(most_weights, MAX_WEIGHTS)
        require(weights <= most, "dim", sizes.dim, f"at most {most} weights, not {weights}")
        model = MAKERS[network](sizes)
    except ModuleNotFoundError as error:
        needed = "expected pip install timm"
        raise InputError(
            f"network: {network} is timm's, which is not installed, {needed}"
        ) from error
    from timm.layers import DropPath

    module: Any
    for name, module in list(model.named_modules()):
        if isinstance(module, DropPath):
            model.set_submodule(name, StochasticDepth(module.drop_prob))
        elif hasattr(module, "fused_attn"):  # whose kernels torch.vmap, of a `Stack`, does not have
            module.fused_attn = False
    return model
