"""Image classification datasets as arrays: how they are stored, read and told apart.

The format on disk is one HDF5 file with, for each split in {train, test}, ``/SPLIT/images`` uint8
(N, height, width, channels) and ``/SPLIT/labels`` integer (N,), and the root attributes ``name``
(text) and ``classes`` (the class names). Folders of images are read, too: see
`models.data.folders`. Needs no PyTorch, but to decode or download images.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args

import h5py
import numpy as np
from h5py.h5d import DatasetID

from lossgeometry.errors import InputError
from models.data.preparation import Preparation, parse
from models.files import locked, replacing
from models.reading.hdf5 import opened

Array = TypeVar("Array", bound=Any)  # of NumPy, or a tensor
Split = Literal["train", "test"]
MAX_CLASSES = 2**16
DATA_ROOT = "LOCALITY_DATA"
DIGITS = Path(__file__).with_name("digits.h5")
DOWNLOADABLE = ("cifar10", "cifar100")
_FORMAT = (
    "expected /train and /test, each with images uint8 (N, height, width, channels) and labels (N,)"
)


@dataclass(frozen=True)
class Images(Generic[Array]):
    """One split of a labelled image dataset, with the statistics of its training split."""

    name: str
    images: Array  # uint8 (N, height, width, channels)
    labels: Array  # int64 (N,)
    classes: tuple[str, ...]
    mean: Array  # float32 (channels,), of the training split, pixels in [0, 1]
    std: Array  # float32 (channels,)

    def __len__(self) -> int:
        return len(self.labels)

    def first(self: Own, n: int | None) -> Own:
        """The first `n` images, normalised as before; None takes all."""
        if n is None:
            return self
        if not 1 <= n <= len(self):
            raise InputError(
                f"images: {n} found, expected from 1 to the {len(self)} of {self.name}"
            )
        return replace(self, images=self.images[:n], labels=self.labels[:n])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the images, their labels and the statistics, to tell whether they changed."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        for array in (self.images, self.labels, self.mean, self.std):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


Own = TypeVar("Own", bound=Images[Any])


def read_images(
    spec: str | Path, split: Split = "train", *, data_root: str | Path | None = None
) -> Images[np.ndarray]:
    """Read one split of a dataset, see `models.data.datasets.load_dataset`."""
    if split not in get_args(Split):
        raise InputError(f"split: {split!r} is unknown, expected one of {get_args(Split)}")
    name, preparation = parse(spec)
    dataset = _load(name, split, preparation, data_root)
    if preparation.mean is None or preparation.std is None:
        return dataset
    channels = len(dataset.mean)
    if len(preparation.mean) not in (1, channels):
        raise InputError(
            f"mean: {len(preparation.mean)} numbers found, expected 1 or the {channels} of the "
            f"channels of {dataset.name}"
        )
    mean, std = (
        np.full(channels, numbers, dtype=np.float32)
        for numbers in (preparation.mean, preparation.std)
    )
    return replace(dataset, mean=mean, std=std)


def _load(
    name: str, split: Split, preparation: Preparation, data_root: str | Path | None
) -> Images[np.ndarray]:
    """One split of a dataset, with the statistics of its training split."""
    path = _location(name, data_root)
    if preparation.image_size is not None and not path.is_dir():
        raise InputError(f"image-size: {name} found, expected a folder of images to resize")
    if not path.exists():
        if name not in DOWNLOADABLE:
            known = ", ".join(("digits", *DOWNLOADABLE))
            raise InputError(f"dataset: {name} is neither a file, a folder nor one of {known}")
        _download(name, path)
    before = _version(path)
    if path.is_dir():
        dataset = _read_images(path, split, replace(preparation, mean=None, std=None), before)
    else:
        dataset = _read(path, split)
    if _version(path) != before:
        raise InputError(f"{path}: changed while it was read, expected it to stay as it is")
    return dataset


def form(spec: str, *, data_root: str | Path | None = None) -> tuple[int, int]:
    """How many classes and channels a dataset has; the images of a folder are not decoded.

    Raises `InputError` as `read_images` does.
    """
    name, _ = parse(spec)
    if Path(name).is_dir():
        from models.data.folders import classes_and_channels  # with torchvision

        classes, channels = classes_and_channels(Path(name))
        return len(classes), channels
    dataset = read_images(name, data_root=data_root)
    return len(dataset.classes), dataset.images.shape[3]


def fingerprints(
    spec: str | Path, splits: Mapping[Split, int | None], *, data_root: str | Path | None = None
) -> dict[str, str]:
    """Fingerprints of the first so many images of each split as they are now; None takes all.

    Empty if the dataset is not there. Raises `InputError` if it is malformed.
    """
    name, _ = parse(spec)
    path = _location(name, data_root)
    if not path.exists():
        return {}
    version = _version(path)
    return {str(s): _fingerprint(str(spec), s, n, data_root, version) for s, n in splits.items()}


@lru_cache
def _fingerprint(
    spec: str,
    split: Split,
    images: int | None,
    data_root: str | Path | None,
    version: tuple[int, int, int],
) -> str:
    return read_images(spec, split, data_root=data_root).first(images).fingerprint


def official_corruptions(name: str, data_root: str | Path | None = None) -> Path | None:
    """Folder of the official corrupted test images of a dataset, if it is there."""
    folder = {"cifar10": "CIFAR-10-C", "cifar100": "CIFAR-100-C"}.get(name)
    path = _root(data_root) / folder if folder else None
    return path if path and (path / "labels.npy").exists() else None


def _root(data_root: str | Path | None) -> Path:
    return Path(data_root or os.environ.get(DATA_ROOT, "data"))


def _location(name: str, data_root: str | Path | None) -> Path:
    if name == "digits":
        return DIGITS
    if name in DOWNLOADABLE:
        return _root(data_root) / f"{name}.h5"
    return Path(name)


def _version(path: Path) -> tuple[int, int, int]:
    """What changes when a file, or one in a folder, is written to or replaced."""
    states = [place.stat() for place in (path, *path.rglob("*"))]
    sizes, times = sum(s.st_size for s in states), max(s.st_mtime_ns for s in states)
    return states[0].st_ino, sizes, times


def _read_images(
    path: Path, split: Split, preparation: Preparation, version: tuple[int, int, int]
) -> Images[np.ndarray]:
    images, labels, classes = train_images, *_ = _decoded(path, "train", preparation, version)
    if split != "train":
        images, labels, _ = _decoded(path, split, preparation, version)
    if images.shape[1:] != train_images.shape[1:]:
        raise InputError(
            f"{path}: images of shape {images.shape[1:]} in {split}, expected "
            f"{train_images.shape[1:]} as in train"
        )
    return _dataset(path.resolve().name, images, labels, classes, train_images)


@lru_cache(maxsize=2)  # the splits of a folder, whose images take long to decode
def _decoded(
    path: Path, split: Split, preparation: Preparation, version: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    from models.data.folders import read_folder  # with torchvision

    return read_folder(path, split, preparation)


def _read(path: Path, split: Split) -> Images[np.ndarray]:
    arrays = {}
    with opened(path, _FORMAT) as file:
        for name in {f"{split}/images", f"{split}/labels", "train/images", "train/labels"}:
            found = file.find(name)
            if not isinstance(found, DatasetID):
                raise InputError(f"{path}: there is no dataset /{name}, {_FORMAT}")
            arrays[name] = file.read(found)
        title = file.text("name", default=path.stem)
        classes = file.texts("classes")
    images, labels = arrays[f"{split}/images"], arrays[f"{split}/labels"]
    train_images = arrays["train/images"]
    for found, where in ((images, split), (train_images, "train")):
        if found.dtype != np.uint8 or found.ndim != 4 or found.size == 0:
            raise InputError(f"{path}: /{where}/images is {found.dtype} {found.shape}, {_FORMAT}")
    if images.shape[1:] != train_images.shape[1:]:
        raise InputError(
            f"{path}: images of shape {images.shape[1:]} in /{split}, expected "
            f"{train_images.shape[1:]} as in /train"
        )
    for found, where, n in (
        (labels, split, len(images)),
        (arrays["train/labels"], "train", len(train_images)),
    ):
        if found.shape != (n,) or found.dtype.kind not in "iu":
            raise InputError(
                f"{path}: /{where}/labels is {found.dtype} {found.shape}, expected "
                f"({n},) integers, one for each image"
            )
    count = len(classes) or int(arrays["train/labels"].max()) + 1
    if not 1 <= count <= MAX_CLASSES:
        raise InputError(f"{path}: {count} classes, expected 1 to {MAX_CLASSES}")
    classes = classes or tuple(str(i) for i in range(count))
    if labels.min() < 0 or labels.max() >= len(classes):
        raise InputError(
            f"{path}: /{split}/labels holds {labels.min()} to {labels.max()}, "
            f"expected 0 to {len(classes) - 1}"
        )
    return _dataset(title, images, labels, classes, train_images)


def _dataset(
    name: str,
    images: np.ndarray,
    labels: np.ndarray,
    classes: tuple[str, ...],
    train_images: np.ndarray,
) -> Images[np.ndarray]:
    # From the histogram of the 256 levels of each channel: exact, and no float copy of the images.
    levels = np.arange(256) / 255
    histograms = np.stack(
        [np.bincount(c, minlength=256) for c in train_images.reshape(-1, images.shape[-1]).T]
    )
    mean = histograms @ levels / histograms.sum(1)
    std = np.sqrt(histograms @ levels**2 / histograms.sum(1) - mean**2)
    return Images(
        name,
        images,
        labels.astype(np.int64),
        classes,
        mean.astype(np.float32),
        np.where(std > 0, std, 1).astype(np.float32),
    )


def _download(name: str, path: Path) -> None:
    """Let torchvision fetch a CIFAR dataset and keep it as HDF5 at `path`."""
    from torchvision import datasets

    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    with contextlib.ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(path))
            if path.exists():  # by now: another process has fetched it
                return
            splits = {
                s: source(path.parent, train=s == "train", download=True) for s in get_args(Split)
            }
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"dataset: {name} is not at {path} and cannot be downloaded ({error}); put the "
                f"file there, or name its folder with --data-root or ${DATA_ROOT}"
            ) from error
        with replacing(path) as partial, h5py.File(partial, "w") as file:
            file.attrs.update(name=name, classes=splits["train"].classes)
            for split, dataset in splits.items():
                file.create_dataset(f"{split}/images", data=dataset.data, chunks=(250, 32, 32, 3))
                file.create_dataset(f"{split}/labels", data=np.uint8(dataset.targets))
