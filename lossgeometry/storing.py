"""Results as things: shown at a glance, saved and loaded, opened with their labels."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import h5py
import numpy as np

from lossgeometry.errors import InputError, one_line, shown
from lossgeometry.layout import FORMAT, RESULTS, form_of, image, require_forms, write
from lossgeometry.running.saving import write_whole

if TYPE_CHECKING:
    import xarray
    from torch import Tensor
    from typing_extensions import Self

FEW = 6  # entries that are shown one by one

R = TypeVar("R")

_FIRST = "lossgeometry curvature history, version 1"


class Result:
    """What the engine returns: a dataclass that shows, saves and loads itself."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    _projection: ClassVar[str | None] = None  # of the axes that `plot` draws into
    _shown: ClassVar[tuple[str, ...]] = ()  # what is shown beside the fields

    @property
    def _kind(self) -> str:
        """By which `RESULTS` has the forms of its arrays."""
        return type(self).__name__

    def _derived(self) -> dict[str, Any]:
        """What is stored beside the fields, for those who read the file without this package."""
        return {}

    def save(self, path: str | Path) -> None:
        """Write an HDF5 file, whole or not at all, whose arrays say what they are.

        Raises `InputError` if a metric has the name of something else that is stored.
        """
        arrays = to_arrays(self)
        tensors = [f.name for f in fields(self) if hasattr(getattr(self, f.name), "detach")]

        def fill(file: h5py.File) -> None:
            write(file, arrays, RESULTS[self._kind])
            file.attrs.update(format=FORMAT, type=type(self).__name__)
            file.attrs["description"] = str(type(self).__doc__).partition("\n")[0].replace("`", "")
            file.attrs.update(order=list(arrays), tensors=" ".join(tensors))

        write_whole(path, image(fill))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; tensors are on the CPU.

        Raises `InputError` if the file is of another kind, or damaged.
        """
        with _opened(path, f"a saved {cls.__name__}") as file:
            kind = _kind(file)
            known = {own.__name__: own for own in (cls, *cls.__subclasses__())}
            if kind not in known:
                raise ValueError(f"{kind} found")
            arrays, order = _arrays(file), list(file.attrs.get("order", ()))
            arrays = {name: arrays.pop(name) for name in order} | arrays
            result = from_arrays(known[kind], arrays, str(file.attrs.get("tensors", "")).split())
            require_forms(arrays, RESULTS[result._kind])
            return result

    def __repr__(self) -> str:
        rows = list(self._rows())
        width = max(len(name) for name, _ in rows)
        return "\n  ".join([type(self).__name__, *(f"{n:{width}}  {text}" for n, text in rows)])

    def _repr_html_(self) -> str:
        """A table, and the picture if there is one, for notebooks."""
        forms, lines = RESULTS[self._kind], []
        for name, text in self._rows():
            form = form_of(name, forms)
            about = (form.description, form.units) if form else ("", "")
            cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in (name, text, *about))
            lines.append(f"<tr>{cells}</tr>")
        table = f"<table><caption>{type(self).__name__}</caption>{''.join(lines)}</table>"
        return f"<div>{table}{self._picture()}</div>"

    def _picture(self) -> str:
        if not hasattr(self, "plot"):
            return ""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 3.5), layout="constrained")
        self.plot(figure.add_subplot(projection=self._projection))
        content = io.BytesIO()
        figure.savefig(content, format="png")
        code = base64.b64encode(content.getvalue()).decode()
        return f'<img alt="{type(self).__name__}" src="data:image/png;base64,{code}">'

    def _rows(self) -> Iterator[tuple[str, str]]:
        """The name of each array, and what can be said of it in a few words."""
        for name in (*(field.name for field in fields(self)), *self._shown):
            value = getattr(self, name)
            if name == "metrics":
                yield from ((metric, _glance(array)) for metric, array in value.items())
            elif value is not None:
                yield name, _glance(value)


def _glance(value: Any) -> str:
    if isinstance(value, list):  # of directions
        return f"{len(value)} × {_glance(value[0])}"
    if isinstance(value, Mapping):
        if value and all(hasattr(entry, "numel") for entry in value.values()):
            numbers = sum(entry.numel() for entry in value.values())
            return f"{numbers:,} numbers in {len(value)} tensors"
        return one_line(", ".join(f"{key} {entry}" for key, entry in value.items()), 80)
    array = _array(value)
    shape = f"{' × '.join(map(str, array.shape))} {array.dtype}"
    if array.ndim < 2 and array.size <= FEW and array.dtype != bool:
        return ", ".join(f"{entry:.6g}" for entry in array.ravel().tolist())
    if array.dtype == bool:
        return f"{shape}, {int(array.sum())} of {array.size} true"
    finite = array[np.isfinite(array)]
    extent = f", {finite.min():.4g} to {finite.max():.4g}" if finite.size else ""
    lacking = array.size - finite.size
    return shape + extent + (f", {lacking} not finite" if lacking else "")


def parameters(tensors: Mapping[str, Tensor]) -> np.ndarray:
    """Names and shapes, which cut a vector of all entries into tensors, as they are stored."""
    return np.array(json.dumps({name: list(t.shape) for name, t in tensors.items()}).encode())


def to_arrays(result: Any) -> dict[str, np.ndarray]:
    """The arrays of a result, by the names that they are stored under."""
    arrays: dict[str, Any] = {}
    for field in fields(result):
        value, name = getattr(result, field.name), field.name
        match field.type:
            case "dict[str, np.ndarray]":
                taken = arrays.keys() | {f.name for f in fields(result)}
                if twice := taken & value.keys():
                    raise InputError(f"metrics: {shown(min(twice))}, expected another name")
                arrays |= value
            case "dict[str, Any]":
                arrays[name] = json.dumps(value).encode()
            case "Direction":
                arrays[name], arrays["parameters"] = _vector(value), parameters(value)
            case "list[Direction]":
                arrays[name] = np.stack([_vector(direction) for direction in value])
                arrays["parameters"] = parameters(value[0])
            case _ if value is not None:
                arrays[name] = _array(value)
    derived = result._derived() if isinstance(result, Result) else {}
    return {name: _array(array) for name, array in (arrays | derived).items()}


def from_arrays(cls: type[R], arrays: Mapping[str, np.ndarray], tensors: Collection[str] = ()) -> R:
    """Inverse of `to_arrays`; fields that are named in `tensors` are tensors."""
    left, values = dict(arrays), dict[str, Any]()
    for field in fields(cls):  # type: ignore[arg-type]
        name = field.name
        match field.type:
            case "dict[str, np.ndarray]":
                values[name] = left  # in the end
            case "dict[str, Any]":
                values[name] = json.loads(left.pop(name).tobytes())
            case "Direction":
                values[name] = _direction(left[name], left)
            case "list[Direction]":
                values[name] = [_direction(vector, left) for vector in left[name]]
            case kind if kind.endswith("| None"):
                values[name] = left.pop(name, None)
            case _:
                array = left.pop(name)
                values[name] = array if array.ndim else array.item()
        if name in tensors:
            values[name] = _tensor(values[name])
    return cls(**values)


def _vector(direction: Mapping[str, Tensor]) -> np.ndarray:
    return np.concatenate([_array(t).ravel() for t in direction.values()])


def _array(value: Any) -> np.ndarray:
    """Of a tensor, too; in single precision if it is of bfloat16, which NumPy does not have."""
    if not hasattr(value, "detach"):
        return np.asarray(value)
    tensor = value.float() if str(value.dtype) == "torch.bfloat16" else value
    return tensor.detach().cpu().numpy()


def _direction(vector: np.ndarray, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    shapes = json.loads(arrays["parameters"].tobytes())
    ends = np.cumsum([np.prod(shape, dtype=int) for shape in shapes.values()])
    pieces = np.split(vector, ends[:-1])
    return {
        name: _tensor(piece.reshape(shape))
        for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
    }


def _tensor(array: Any) -> Tensor:
    import torch

    return torch.as_tensor(array)


@contextlib.contextmanager
def _opened(path: str | Path, expected: str) -> Iterator[h5py.File]:
    """A file; what is wrong with it, also later, is an `InputError`."""
    try:
        with h5py.File(path) as file:
            yield file
    except Exception as error:  # a damaged file fails in any way it likes
        raise InputError(f"{path}: {one_line(error)}, expected {expected}") from error


def _kind(file: h5py.File) -> str:
    """The type of result that a file holds, in words if there is none."""
    form = file.attrs.get("format")
    if form == _FIRST:
        return "CurvatureHistory"
    if form != FORMAT:
        return f"an HDF5 file of {'another format' if form is None else shown(form)}"
    return str(file.attrs.get("type", "measurements"))


def _arrays(file: h5py.File) -> dict[str, np.ndarray]:
    found: dict[str, Any] = {}
    file.visititems(
        lambda name, item: (
            found.update({name: np.asarray(item[()])}) if isinstance(item, h5py.Dataset) else None
        )
    )
    return found


def open_measurement(path: str | Path, name: str | None = None) -> xarray.DataTree:
    """Open a saved result or stored measurements as arrays with names, coordinates and units.

    Needs xarray.

    Parameters
    ----------
    path
        Of an HDF5 file that a result's ``save`` or a command of the study wrote.
    name
        Of a group in it, such as "landscape/train" or "landscape/train/surface"; by default the
        whole file.

    Returns
    -------
    xarray.DataTree
        A node for each group. Its arrays have the names of their axes, their coordinates and the
        attributes "description" and "units"; its attributes say how it was measured.
        ``tree["nll"]`` is an ``xarray.DataArray``, ``tree.to_dataset()`` the arrays of one group.

    Raises
    ------
    InputError
        If the file is not HDF5 or has no such group, or xarray is not installed.

    See Also
    --------
    Eigenpairs.load : reads a file as the result that was saved; all results have it.
    report : several results as one page.

    Examples
    --------
    >>> import tempfile, torch
    >>> from lossgeometry import line, open_measurement
    >>> from torch.nn.functional import mse_loss
    >>> model, batch = torch.nn.Linear(2, 1), (torch.ones(4, 2), torch.zeros(4, 1))
    >>> direction = {"bias": torch.ones(1)}
    >>> path = tempfile.mkdtemp() + "/line.h5"
    >>> line(model, {"mse": mse_loss}, batch, direction, [-1.0, 0.0, 1.0]).save(path)
    >>> mse = open_measurement(path)["mse"]
    >>> mse.dims, mse.xs.values
    (('xs',), array([-1.,  0.,  1.]))
    """
    try:
        import xarray
    except ImportError as error:
        raise InputError("xarray is not installed, expected pip install xarray") from error
    with _opened(path, "an HDF5 file of results") as file:
        group = file.get(name or "/")
        if isinstance(group, h5py.Group):
            nodes = {"/": _labelled(group)}
            group.visititems(
                lambda key, item: (
                    nodes.update({key: _labelled(item)}) if isinstance(item, h5py.Group) else None
                )
            )
            return xarray.DataTree.from_dict(nodes)
        places = sorted({place.rpartition("/")[0] for place in _arrays(file)} - {""})
    expected = f"one of {', '.join(places)}" if places else "no name"
    raise InputError(f"{path}: no {shown(name)} found, expected {expected}")


def _labelled(group: h5py.Group) -> xarray.Dataset:
    """The arrays right in a group."""
    import xarray

    arrays, about = {}, {key: _text(value) for key, value in group.attrs.items()}
    for key, item in group.items():
        if not isinstance(item, h5py.Dataset):
            continue
        value = item[()]
        if item.dtype.kind == "S":
            value = np.char.decode(value, "utf-8")
        if item.dtype.kind == "S" and not item.shape:
            about[key] = _text(str(value))
            continue
        axes = [dim.label or f"{item.name[1:]} {i}" for i, dim in enumerate(item.dims)]
        said = {k: item.attrs[k] for k in ("description", "units") if k in item.attrs}
        arrays[key] = xarray.Variable(axes, value, said)
    return xarray.Dataset(arrays, attrs=about)


def _text(value: Any) -> Any:
    """An attribute, whose dictionary is stored as text."""
    return json.loads(value) if isinstance(value, str) and value.startswith("{") else value
