"""``python -m models.train``: train a network and save it as a checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from filelock import FileLock, Timeout

from lossgeometry.errors import InputError
from models.cli import DataRoot, Device, Minutes, Seed, arg, deadline_in, run
from models.description import PYRAMIDS

if TYPE_CHECKING:
    from models.checkpoint import Checkpoint
    from models.data.datasets import ImageDataset
    from models.recipes import Preset

KERNELS = ("convnext", "replknet", "van", "gated")  # networks whose range is that of a kernel
REFERENCE_KERNEL = 5  # beside which their perceptrons are as wide as it takes


@dataclass(frozen=True)
class Options:
    """Train a convolutional self-attention network, or another, and save it as a checkpoint.

    An interrupted training goes on where it stopped when the same command is given again, and ends
    with the same weights. Examples:

      python -m models.train --window 5 --out checkpoints/csan5.pt

      python -m models.train --window 3 --dataset cifar100 --bf16 --out runs/csan3.pt

      python -m models.train --network convnext --kernel-size 5 --out runs/convnext5.pt
    """

    out: Annotated[Path, arg(metavar="FILE", help="the checkpoint to write")]
    network: Annotated[
        str,
        arg(
            help="csan (window attention), convnext, replknet, van, gated (its plain kernel), or "
            "resnet, vit, pit, swin"
        ),
    ] = "csan"
    window: Annotated[
        int | None, arg(help="of csan: tokens along each side of the attention window; default: 8")
    ] = None
    kernel_size: Annotated[
        int | None,
        arg(
            help="of convnext to gated: tokens along each side of the depthwise kernel; default: 7"
        ),
    ] = None
    dilation: Annotated[
        int | None,
        arg(help="of van's decomposed kernel; default: 3 as published, 1 for kernels of up to 5"),
    ] = None
    head_window: Annotated[int, arg(help="of csan: heads that a query sees; 1 is 1D-CSAN")] = 1
    border: Annotated[
        str | None,
        arg(
            help="windows beyond the image: clamp, mask or zero; default: as the preset says, or "
            "clamp"
        ),
    ] = None
    pooling: Annotated[str, arg(help="of csan and vit: gap or cls")] = "gap"
    dataset: Annotated[
        str | None,
        arg(
            help="digits, cifar10, cifar100, an HDF5 file or a folder of images; default: that of "
            "the preset"
        ),
    ] = None
    preset: Annotated[
        str | None,
        arg(
            help="recipe and model size: digits, cifar10, cifar100 or paper-cifar100; default: the "
            "preset named as the dataset, cifar100 for files and folders, or digits"
        ),
    ] = None
    image_size: Annotated[
        int | None,
        arg(
            metavar="N",
            help="cut the centre of N x N pixels out of images of a folder, the shorter side "
            "resized to N / 0.875",
        ),
    ] = None
    images: Annotated[
        int | None, arg(help="train on the first so many images; default: all of them")
    ] = None
    epochs: Annotated[int | None, arg(help="default: as the preset says")] = None
    dim: Annotated[int | None, arg(help="width of the tokens; default: as the preset says")] = None
    depth: Annotated[int | None, arg(help="number of blocks; default: as the preset says")] = None
    heads: Annotated[
        int | None, arg(help="of csan: attention heads; default: as the preset says")
    ] = None
    mlp_ratio: Annotated[
        float | None,
        arg(
            help="hidden width of csan's perceptrons by that of the tokens; other networks are "
            "so wide that there are as many parameters, with a kernel of 5; default: as the "
            "preset says"
        ),
    ] = None
    snapshots: Annotated[
        tuple[int, ...],
        arg(metavar="EPOCH", help="epochs to keep besides the start, the end of warm-up, the end"),
    ] = ()
    evaluate_every: Annotated[
        int, arg(help="epochs between two evaluations on all images, which take a while on CIFAR")
    ] = 1
    seed: Seed = 0
    device: Device = "auto"
    bf16: Annotated[bool, arg(help="bfloat16 autocast")] = False
    compile: Annotated[bool, arg(help="train with torch.compile")] = False
    data_root: DataRoot = None
    minutes: Minutes = None
    force: Annotated[bool, arg(help="train again what is already there")] = False


def main(options: Options) -> None:
    """Train as `options` say, print the last scores, and name the files."""
    train_all([options], deadline_in(options.minutes))


def train_all(several: Sequence[Options], deadline: float) -> None:
    """Train what several options say and is not there yet, as one program.

    They may differ in window, head_window, border, seed and out. Stops at the `deadline`, as
    `models.training.train_together` does.
    """
    from lossgeometry.running.devices import choose_device
    from lossgeometry.running.distributed import join
    from models.checkpoint import load_checkpoint
    from models.data.datasets import load_dataset
    from models.resuming import equally_far, same_training, state_files
    from models.training import train_together

    common = several[0]
    for options in several:
        if options.out.suffix != ".pt":
            raise InputError(f"out: {options.out} found, expected a name that ends in .pt")
    device = choose_device(common.device)
    team = join(device.type)
    _, dataset = choose_preset(common)
    train_set = load_dataset(dataset, "train", data_root=common.data_root).first(common.images)
    test_set = load_dataset(dataset, "test", data_root=common.data_root)
    starts = [untrained(options, train_set) for options in several]
    for epoch in common.snapshots:
        if not 0 <= epoch <= starts[0].recipe.epochs:
            raise InputError(f"snapshots: {epoch} found, expected 0 to {starts[0].recipe.epochs}")
    if common.evaluate_every < 1:
        raise InputError(f"evaluate-every: {common.evaluate_every} found, expected at least 1")

    def is_there(out: Path, start: Checkpoint) -> bool:
        if common.force:
            out.unlink(missing_ok=True)
        elif out.exists() and not same_training(load_checkpoint(out), start):
            raise InputError(
                f"out: {out} is there already, trained with other options; expected another "
                "name, or --force"
            )
        if common.force or out.exists():  # or of a training that was killed at its very end
            for path in state_files(out):
                path.unlink(missing_ok=True)
        return out.exists()

    def to_do() -> list[list[int]]:
        left = [k for k, out in enumerate(outs) if not is_there(out, starts[k])]
        data = [train_set.fingerprint, test_set.fingerprint]
        groups = equally_far([outs[k] for k in left], [starts[k] for k in left], data)
        return [[left[i] for i in group] for group in groups]

    outs = [options.out for options in several]
    with contextlib.ExitStack() as held:
        for out in outs:
            team.first(partial(_hold, held, out))
        groups = team.first(to_do)
        for k in sorted(set(range(len(outs))).difference(*groups)):
            print(f"{outs[k]} is already there; --force trains it again")
        for group in groups:
            trained = train_together(
                [starts[k] for k in group],
                [outs[k] for k in group],
                train_set,
                test_set,
                snapshots=common.snapshots,
                evaluate_every=common.evaluate_every,
                device=device,
                bf16=common.bf16,
                compile=common.compile,
                deadline=deadline,
                team=team,
            )
            for k, network in zip(group, trained, strict=True):
                report(outs[k], network)


def report(out: Path, network: Checkpoint) -> None:
    """Print the last scores of a training, and where it is."""
    last = {name: values[-1] for name, values in network.history.items()}
    for split in ("train", "test"):
        print(f"{split:5} NLL {last[f'{split}_nll']:.4f}  error {last[f'{split}_error']:.2%}")
    if network.epoch < network.recipe.epochs:
        done = f"{network.epoch} of {network.recipe.epochs} epochs"
        print(f"{out}: time is up after {done}; the same command goes on from there")
    else:
        print(f"wrote {out} and snapshots in {out.with_suffix('')}")


def _hold(held: contextlib.ExitStack, out: Path) -> None:
    held.enter_context(alone(out))


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keep other processes from training the same checkpoint; raises `InputError` if one does."""
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out.with_name(f".{out.name}.lock"), timeout=0):
            yield
    except Timeout as error:
        raise InputError(
            f"out: {out} is being trained by another process; expected another name, or to wait"
        ) from error


def choose_preset(options: Options) -> tuple[Preset, str]:
    """The preset and the dataset that `options` name, or that follow from one another."""
    from models.data.preparation import parse, prepared
    from models.recipes import PRESETS

    own = parse(options.dataset)[0] if options.dataset else None
    name = options.preset or own or "digits"
    if options.preset is None and (name.endswith((".h5", ".hdf5")) or Path(name).is_dir()):
        name = "cifar100"
    if name not in PRESETS:
        if options.preset is None:
            raise InputError(
                f"dataset: {name} is neither a file, a folder nor one of digits, cifar10, cifar100"
            )
        raise InputError(f"preset: {name!r} is unknown, expected one of {', '.join(PRESETS)}")
    return PRESETS[name], prepared(options.dataset or PRESETS[name].dataset, options.image_size)


def square(dataset: ImageDataset) -> int:
    """Pixels along each side of the images; raises `InputError` if they are not square."""
    height, width = dataset.images.shape[1:3]
    if height != width:
        raise InputError(f"dataset: images of {height} x {width} pixels, expected square ones")
    return height


def untrained(options: Options, train_set: ImageDataset) -> Checkpoint:
    """Initialise the model that `options` describe for the images of `train_set`."""
    import torch

    from lossgeometry.seeds import derive_seed, seeded
    from models.checkpoint import Checkpoint
    from models.description import require_integer
    from models.networks import build_network

    preset, dataset = choose_preset(options)
    recipe = preset.recipe
    if options.epochs is not None:
        if options.epochs <= recipe.warmup_epochs:
            raise InputError(
                f"epochs: {options.epochs} found, expected more than the "
                f"{recipe.warmup_epochs} epochs of warm-up"
            )
        recipe = replace(recipe, epochs=options.epochs)
    architecture = describe_network(options, preset, train_set)
    derive_seed(options.seed)  # is it usable?
    if options.images is not None:
        require_integer("images", options.images, 1, 2**40)
    with seeded(torch.device("cpu"), options.seed):
        model = build_network(architecture)
    return Checkpoint(
        model=model,
        architecture=architecture,
        dataset=dataset,
        images=options.images,
        recipe=recipe,
        epoch=0,
        seed=options.seed,
        history={},
    )


def describe_network(options: Options, preset: Preset, train_set: ImageDataset) -> dict[str, Any]:
    """The architecture that `options` ask for, as `models.networks.build_network` reads it.

    Networks are as large as the CSAN of the same options: those of kernels by the width of their
    perceptrons, which is that beside a kernel of `REFERENCE_KERNEL` whatever the kernel, so that a
    larger one takes nothing from the rest of the network; pyramids by the width of their tokens.

    Raises `InputError` if an option is given that the network does not have.
    """
    from models.networks import CSAN_OPTIONS, parameters_of, with_parameters, with_width

    name = options.network
    chosen = {key: getattr(options, key) for key in ("dim", "depth", "heads", "mlp_ratio")}
    csan: dict[str, Any] = {
        **preset.architecture,
        **{key: value for key, value in chosen.items() if value is not None},
        "image_size": square(train_set),
        "channels": train_set.images.shape[3],
        "classes": len(train_set.classes),
        "window": 8 if options.window is None else options.window,
        "head_window": options.head_window,
        "border": options.border or preset.architecture.get("border", "clamp"),
        "pooling": options.pooling,
    }
    _require_own(name, options)
    if name == "csan":
        return csan
    shared = {key: value for key, value in csan.items() if key not in CSAN_OPTIONS}
    shared["network"] = name
    if name in PYRAMIDS:
        if name == "resnet":
            for option in ("mlp_ratio", "position_std"):
                shared.pop(option, None)
        else:
            shared["heads"] = csan["heads"]
        if name == "vit":
            shared["pooling"] = options.pooling
        else:  # the last but one stage has the tokens of the others
            finer = 2 ** max(csan["depth"] // 2 - 2, 0)
            shared["patch_size"] = max(csan["patch_size"] // finer, 1)
        return with_width(shared, parameters_of(csan))
    size = 7 if options.kernel_size is None else options.kernel_size

    def of_kernel(size: int) -> dict[str, Any]:
        if name != "van":
            return {**shared, "kernel_size": size}
        return {**shared, "kernel_size": size, "dilation": 3 if size > 5 else 1}

    reference = with_parameters(of_kernel(REFERENCE_KERNEL), parameters_of(csan))
    own = {**of_kernel(size), "mlp_ratio": reference["mlp_ratio"]}
    return own if options.dilation is None else own | {"dilation": options.dilation}


def _require_own(network: str, options: Options) -> None:
    """Raise `InputError` if an option is given that the network does not have."""
    owners = {
        **dict.fromkeys(("window", "head_window", "border"), ("csan",)),
        "heads": ("csan", "vit", "pit", "swin"),
        "pooling": ("csan", "vit"),
        "kernel_size": KERNELS,
        "dilation": ("van",),
    }
    for name, networks in owners.items():
        value = getattr(options, name)
        if network not in networks and value != getattr(Options, name):
            raise InputError(f"{name}: {value} found, which {network} does not have")


if __name__ == "__main__":
    run(main, Options)
