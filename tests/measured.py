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
    **options,
):
    path.parent.mkdir(parents=True, exist_ok=True)
    architecture = dict(window=window, head_window=head_window, patch_size=1, image_size=8, dim=dim)
    architecture |= dict(border="clamp", pooling="gap")
    checkpoint = dict(
        architecture=architecture,
        recipe=dict(epochs=EPOCHS, warmup_epochs=2) | (recipe or {}),
        dataset=dataset,
        images=None,
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
        "surface/done": bowl > 1.5,
        "surface/attributes": text(interpolated=True, evaluations=9, objective_error=0.01),
        **{f"{part}/xs": grid for part in ("line", "test_line", "surface")},
        "surface/ys": grid,
        "cut/ranges": text(names=["direction 1", "direction 2"], low=[-1, -1], high=[1, 1]),
        "cut/marks": np.zeros((0, 2)) if not kind else np.array([[-1, 0.5], [0.5, 1], [0, 0]]),
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
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
