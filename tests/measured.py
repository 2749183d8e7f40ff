"""Measurement files with everything that figures are drawn of."""

import json

import h5py
import numpy as np

from models.description import SCORES

EPOCHS = 12
CUT = dict(directions="random", lines=2)
METRICS = ("nll", "error")


def write(
    path,
    name,
    arrays,
    *,
    window=3,
    head_window=1,
    seed=0,
    epoch=EPOCHS,
    dim=48,
    recipe=None,
    dataset="digits",
    images=None,
    network=None,
    **options,
):
    """`network` are options of one that is no CSAN."""
    path.parent.mkdir(parents=True, exist_ok=True)
    csan = dict(window=window, head_window=head_window, border="clamp", pooling="gap")
    architecture = dict(patch_size=1, image_size=8, dim=dim) | (network or csan)
    checkpoint = dict(
        architecture=architecture,
        recipe=dict(epochs=EPOCHS, warmup_epochs=2) | (recipe or {}),
        dataset=dataset,
        images=images,
        epoch=epoch,
        seed=seed,
        sha256="0",
    )
    with h5py.File(path, "a") as file:
        group = file.create_group(name)
        for key, array in arrays.items():
            group[key] = array
        group.attrs.update(
            options=json.dumps(dict(objective="train", split="train", batch_size=16) | options),
            checkpoint=json.dumps(checkpoint),
            versions="{}",
            date="2026-01-01T00:00:00+00:00",
        )


def write_study(folder):
    """Of two windows and two seeds."""
    rng = np.random.default_rng(0)
    grid = np.linspace(-1, 1, 5)
    for window in (3, 8):
        for seed in (0, 1):
            own = folder if seed == 0 else folder / "seed1"
            file = own / f"csan{window}.h5"
            decay = np.exp(-np.arange(EPOCHS + 1.0)) + 0.01 * window + 0.001 * seed
            history = {"epoch": np.arange(EPOCHS + 1.0), **dict.fromkeys(SCORES, decay)}
            write(file, "history", history, window=window, seed=seed)
            spectrum = {
                "eigenvalues": rng.normal(5, 4, (10, 5)),
                "density/grid": np.linspace(-1, 9, 50),
                "density/density": np.exp(-np.linspace(-1, 9, 50)),
                "density/standard_error": np.full(50, 1e-3),
                "layers/names": np.array(["blocks.0.mlp", "head"], dtype=bytes),
                "layers/eigenvalues": np.array([[3.0, -1.0], [2.0, np.nan]]),
                **dict.fromkeys(("nep", "ape", "trace"), 1.0),
                **{f"{key}_standard_error": 0.1 for key in ("nep", "ape", "trace")},
            }
            write(file, "hessian/train", spectrum, window=window, seed=seed)
            for epoch in (0, 2):
                early = own / f"csan{window}" / f"epoch{epoch:03d}.h5"
                write(early, "hessian/train", spectrum, window=window, seed=seed, epoch=epoch)
        file = folder / f"csan{window}.h5"
        for kind in ("", "_pca", "_bezier"):
            write(file, f"landscape{kind}/train", landscape(grid, kind), window=window, **CUT)


def landscape(grid, kind):
    bowl = 1 + grid**2 + grid[:, None] ** 2
    bowl[0, 0] = np.inf
    arrays = {
        **{f"{part}/{m}": 1 + grid**2 for part in ("line", "test_line") for m in ("nll", "error")},
        "line/l2": 1 + grid**2,
        **{f"surface/{key}": bowl for key in ("nll", "l2")},
        "surface/evaluated": bowl > 1.5,
        "surface/settings": text(interpolated=True, evaluations=9, objective_error=0.01),
        **{f"{part}/xs": grid for part in ("line", "test_line", "surface")},
        "surface/ys": grid,
        "cut/names": np.array([b"direction 1", b"direction 2"]),
        "cut/points": np.zeros((0, 2)) if not kind else np.array([[-1, 0.5], [0.5, 1], [0, 0]]),
    }
    if not kind:
        arrays |= {f"lines/{i}/nll": 1 + (i + 1) * grid**2 for i in range(2)}
    if kind == "_pca":
        arrays["cut/extras/polar/distances"] = np.array([2.0, 1.0, 0.0])
        arrays["cut/extras/polar/angles"] = np.array([0.0, 0.5, np.nan])
        arrays["cut/extras/polar/turns"] = np.array([0.3])
    if kind == "_bezier":
        paths = {f"{p}/{m}": 1 - (grid - 1) * grid for p in ("linear", "bezier") for m in METRICS}
        arrays |= {f"cut/extras/{key}": array for key, array in (paths | {"ts": grid}).items()}
    return arrays


def text(**value):
    return np.bytes_(json.dumps(value))


def _convolution(network, kernel_size):
    return dict(network=network, kernel_size=kernel_size)


# What the members of a comparison of families are called, and their options.
MEMBERS = {
    **{f"CSAN {'global' if w == 8 else f'{w}×{w}'}": dict(window=w) for w in (3, 5, 8)},
    **{
        f"{name} {'global' if k == 15 else f'{k}×{k}'}": dict(network=_convolution(network, k))
        for name, network in (
            *(("ConvNeXt", "convnext"), ("RepLKNet", "replknet")),
            *(("VAN", "van"), ("gated", "gated")),
        )
        for k in (3, 5, 15)
    },
    **{name: dict(network=dict(network=name.lower())) for name in ("ResNet", "PiT", "Swin")},
    **{f"ViT ({p.upper()})": dict(network=dict(network="vit", pooling=p)) for p in ("cls", "gap")},
}
# Train NLL, error, NEP and APE. D1, D5, F4 and F6 hold, D2 does not; nothing is known of the rest.
FAMILIES = {
    **dict.fromkeys(MEMBERS, (0.3, 0.05, 0.1, 20.0)),
    "CSAN global": (0.6, 0.10, 0.1, 20.0),
    "ConvNeXt global": (0.1, 0.04, 0.1, 20.0),
    "ResNet": (0.1, 0.02, 0.05, 90.0),
    "ViT (CLS)": (0.5, 0.09, 0.4, 10.0),
}


def write_families(folder, truth=None, *, seeds=5, images=400, batches=40, landscapes=()):
    """Networks whose values scatter about the `truth`, as a study of several families leaves them.

    The first seeds of the members named in `landscapes` have surfaces and trajectories, too.
    """
    grid = np.linspace(-1, 1, 9)
    for i, (name, (nll, error, nep, ape)) in enumerate((truth or FAMILIES).items()):
        stem = name.lower().translate(str.maketrans("", "", " ×()"))
        for seed in range(seeds):
            rng = np.random.default_rng((i, seed))
            file = folder / f"seed{seed}" / f"{stem}.h5"
            how = dict(MEMBERS[name], seed=seed)
            end, wrong = nll + rng.normal(0, 0.01), rng.random(images) < error
            decay = end + 2 * np.exp(-np.arange(EPOCHS + 1.0))
            history = {"epoch": np.arange(EPOCHS + 1.0), "train_nll": decay, "test_nll": decay}
            history |= {"train_error": 0 * decay, "test_error": np.full(len(decay), wrong.mean())}
            write(file, "history", history, **how)
            outcomes = {"train/nll": np.full(images, end), "train/correct": np.ones(images, bool)}
            outcomes |= {"test/nll": np.full(images, end), "test/correct": ~wrong}
            write(file, "outcomes", outcomes, **how)
            for epoch, path in ((2, file.with_suffix("") / "epoch002.h5"), (EPOCHS, file)):
                size = rng.gamma(4, ape / 4, (batches, 5))
                eigenvalues = np.where(rng.random(size.shape) < nep, -size, size)
                spectrum = {"eigenvalues": eigenvalues, "nep": (eigenvalues < 0).mean()}
                spectrum |= {"ape": eigenvalues[eigenvalues > 0].mean()}
                spectrum |= {"density/grid": grid, "density/density": np.exp(-(grid**2))}
                spectrum |= {"density/standard_error": np.full(len(grid), 0.01), "trace": ape}
                spectrum |= {f"{key}_standard_error": 0.1 for key in ("nep", "ape", "trace")}
                write(path, "hessian/train", spectrum, epoch=epoch, **how)
            if name in landscapes and seed == 0:
                for kind in ("", "_pca"):
                    arrays = landscape(grid, kind)
                    arrays["surface/nll"] = nll * arrays["surface/nll"]
                    write(file, f"landscape{kind}/train", arrays, **how, **CUT)
