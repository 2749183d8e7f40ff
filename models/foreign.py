"""Weights that another training framework saved, as a `Checkpoint`."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from lossgeometry.errors import InputError, one_line
from models.checkpoint import Checkpoint
from models.data.preparation import parse
from models.factory import build_model
from models.reading.weights import read_pickle
from models.recipes import Recipe

_DEPTH = 64  # of dictionaries in one another
# What PyTorch's wrappers put into the names of the parameters, and where a module itself has them.
_WRAPPERS = re.compile(
    r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
    r"|__dict__\._modules|__dict__\._parameters|__dict__\._buffers)\."
)


def load_foreign(
    path: str | Path, *, model: str, dataset: str, classes: int, channels: int, recipe: Recipe
) -> Checkpoint:
    """Load weights into the model of a spec, in float32, in evaluation mode, on the CPU.

    Parameters
    ----------
    path : str or path
        A ``.safetensors`` file, or what ``torch.save`` wrote: a state dict, or whatever else of
        dictionaries has one inside, beside objects of any kind; or a folder as Hugging Face's
        libraries write it, with one of these. Nothing in the file is executed.
    model : str
        A spec of `models.factory.build_model`.
    dataset : str
        A spec of `models.data.datasets.load_dataset`; the one of the checkpoint also says what
        timm's ``pretrained_cfg`` of the model says of how images are prepared, if this does not.
    classes, channels : int
        Of the dataset.
    recipe : Recipe
        What the training minimised.

    Raises
    ------
    InputError
        If the model cannot be built, or the weights cannot be read or do not fit it.
    """
    path = _weights_file(Path(path))
    built = build_model(model, classes=classes, channels=channels)
    load_weights(built, path)
    images, preparation = parse(dataset)
    preparation = preparation.completed(getattr(built, "pretrained_cfg", None), channels)
    return Checkpoint(
        model=built.float().eval(),
        architecture={"model": model},
        dataset=preparation.spec(images),
        images=None,
        recipe=recipe,
        epoch=0,  # unknown, as the seed and the history are
        seed=0,
        history={},
        path=path,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the tensors of a file that have the names of the state dict of `model`.

    What precedes the names is found out: ``state_dict.module.`` as well as a model in the midst of
    a Lightning module. Where several sets of tensors fit alike, averaged ones (their prefix has
    "ema" in it) come after others, and later ones after earlier ones.

    Raises
    ------
    InputError
        If the file cannot be read, or its tensors do not fit; `model` may then hold some of them.
    """
    tensors = read_tensors(path)
    expected = model.state_dict()
    derived = {name for name, _ in model.named_buffers()} - expected.keys()  # some save them, too
    prefix = _find_prefix(tensors, expected)
    if prefix is None:
        raise InputError(
            f"{path}: its {len(tensors)} tensors ({_first(tensors)}) have other names than those "
            f"of the model, expected {len(expected)} ({_first(expected)})"
        )
    state = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and name.removeprefix(prefix) not in derived
    }
    complaints = [
        f"{name} is {_describe(state[name])}, expected {_describe(tensor)}"
        for name, tensor in expected.items()
        if name in state and not _alike(state[name], tensor)
    ]
    if not complaints:
        try:
            found = model.load_state_dict(state, strict=False)
        except Exception as error:  # hooks of the model, tensors of odd kinds
            raise InputError(f"{path}: does not fit the model: {one_line(error)}") from error
        for what, names in (("missing", found.missing_keys), ("unexpected", found.unexpected_keys)):
            if names:
                complaints.append(f"{len(names)} {what} ({_first(names)})")
    if complaints:
        rest = f" and {len(complaints) - 3} more" if len(complaints) > 3 else ""
        raise InputError(f"{path}: does not fit the model: {'; '.join(complaints[:3])}{rest}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file by their names, those of dictionaries in dictionaries joined by dots.

    Raises `InputError` if the file cannot be read or holds no tensors.
    """
    if not path.is_file():
        raise InputError(f"{path}: there is no such file, expected the weights of --model")
    safe = path.suffix == ".safetensors"
    content = _read_safetensors(path) if safe else read_pickle(path, stubs=True)
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()  # a dictionary may hold itself
    waiting = [("", content, 0)]
    for prefix, value, depth in waiting:
        if isinstance(value, Tensor):
            tensors[_WRAPPERS.sub("", prefix.removesuffix("."))] = value
        elif isinstance(value, Mapping) and depth < _DEPTH and id(value) not in seen:
            seen.add(id(value))
            waiting += [(f"{prefix}{key}.", inner, depth + 1) for key, inner in value.items()]
    if not tensors:
        raise InputError(f"{path}: there are no tensors in it, expected the weights of --model")
    return tensors


def _weights_file(path: Path) -> Path:
    """The path itself, or the file in it if it is a folder."""
    if not path.is_dir():
        return path
    names = ("model.safetensors", "pytorch_model.bin")
    for name in names:
        if (path / name).is_file():
            return path / name
    raise InputError(f"{path}: a folder, expected a file, or {' or '.join(names)} in it")


def _read_safetensors(path: Path) -> object:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise InputError(
            f"{path}: safetensors is not installed, expected pip install safetensors"
        ) from error
    try:
        return load_file(path)
    except SafetensorError as error:
        reason = one_line(error)
        raise InputError(f"{path}: not a readable safetensors file ({reason})") from error


def _find_prefix(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """What precedes the `expected` names in those of `tensors`, such as ``state_dict.module.``.

    The one under which most names and shapes are found; None if there is no name at all.
    """
    deepest = max(name.count(".") for name in expected) + 1
    fitting: Counter[str] = Counter()
    for name, tensor in tensors.items():
        parts = name.rsplit(".", deepest)
        for i in range(max(len(parts) - deepest, 0), len(parts)):
            tail = ".".join(parts[i:])
            if tail in expected:
                same = tensor.shape == expected[tail].shape
                fitting[name[: len(name) - len(tail)]] += 2 if same else 1
    if not fitting:
        return None
    return max(fitting, key=lambda prefix: (fitting[prefix], "ema" not in prefix.lower()))


def _alike(found: Tensor, expected: Tensor) -> bool:
    """Whether it can be copied as it is meant: floating point numbers are, of any precision."""
    real = found.is_floating_point() or not expected.is_floating_point()
    return found.shape == expected.shape and real


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _first(names: Iterable[str]) -> str:
    names = [one_line(name, 80) for name in names]
    return ", ".join(names[:2]) + (" ..." if len(names) > 2 else "")
