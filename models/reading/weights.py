"""Weights of strangers: what `torch.save` wrote, read without running anything in it.

``torch.load(weights_only=True)`` runs no code, but it believes what a file says about itself: a
few bytes can ask for any amount of memory, and a storage that claims to be longer than its bytes
is read beyond their end. Therefore the archive is checked first, then the pickle in it is gone
through with stand-ins in the place of tensors, and only what passes both is loaded.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import torch

from lossgeometry.errors import InputError, shown

MAX_DIRECTORY = 2**24  # bytes of the list of entries, some 200,000 tensors
MAX_PICKLE = 2**22  # bytes of everything but the tensors; in memory it is up to 70 times that
MAX_DIMENSIONS = 64  # of a tensor, as in NumPy
_EXPECTED = "expected an archive of tensors, numbers and text that torch.save wrote"
_MEMBERS = re.compile(
    r"data\.pkl|data/\d+|byteorder|version|\.format_version|\.storage_alignment"
    r"|\.data/serialization_id"
)
_ITEM_SIZES = {
    **dict(DoubleStorage=8, FloatStorage=4, HalfStorage=2, BFloat16Storage=2),
    **dict(LongStorage=8, IntStorage=4, ShortStorage=2, CharStorage=1, ByteStorage=1),
    **dict(BoolStorage=1, ComplexFloatStorage=8, ComplexDoubleStorage=16),
}
_OPERATIONS = (  # what torch.save needs; those that make objects of any other class are not among
    *(pickle.PROTO, pickle.STOP, pickle.GLOBAL, pickle.REDUCE, pickle.BUILD, pickle.BINPERSID),
    *(pickle.MARK, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_TUPLE),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS),
    *(pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BINFLOAT, pickle.BINUNICODE),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET),
)


class _Refused(Exception):
    """Why a file is not loaded."""


def read_pickle(path: Path) -> object:
    """Load what `torch.save` wrote: tensors, on the CPU, in dicts, lists and tuples.

    Raises
    ------
    InputError
        If the file is missing, is damaged, would run code, or is not what it says it is: entries
        or tensors that claim to be larger than their bytes, compressed entries, other entries than
        those of `torch.save`. Nothing in the file is executed, and no more memory is used than
        some multiple of its size.
    """
    if not path.is_file():
        raise InputError(f"{path}: there is no such file, expected a checkpoint")
    try:
        with path.open("rb") as file:
            pickled, sizes = _inspect(file)
        _DryRun(pickled, sizes).load()
        return torch.load(path, map_location="cpu", weights_only=True)
    except _Refused as error:
        raise InputError(f"{path}: not a checkpoint ({error}), {_EXPECTED}") from error
    except OSError:
        raise
    except Exception as error:  # a damaged file fails in any way it likes
        raise InputError(f"{path}: not a checkpoint (it is damaged), {_EXPECTED}") from error


def _inspect(file: BinaryIO) -> tuple[bytes, dict[str, int]]:
    """The pickle of an archive, and the bytes of each storage, by its key."""
    _check_directory(file)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        folder = entries[0].filename.partition("/")[0] + "/" if entries else ""
        sizes: dict[str, int] = {}
        for entry in entries:
            name = entry.filename.removeprefix(folder)
            if entry.orig_filename != folder + name or not _MEMBERS.fullmatch(name):
                raise _Refused(f"its entry {shown(entry.orig_filename)} is none of torch.save's")
            if name in sizes:
                raise _Refused(f"its entry {name} is there twice")
            if entry.compress_type or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
                raise _Refused(f"its entry {name} is compressed or encrypted")
            sizes[name] = entry.file_size
        if sum(sizes.values()) > archive.start_dir:
            raise _Refused("its entries claim to be larger than the file")
        if not 0 < sizes.get("data.pkl", 0) <= MAX_PICKLE:
            raise _Refused(f"data.pkl of {sizes.get('data.pkl', 0)} bytes")
        if (broken := archive.testzip()) is not None:
            raise _Refused(f"its entry {shown(broken)} is damaged")
        pickled = archive.read(folder + "data.pkl")
    return pickled, {k[5:]: size for k, size in sizes.items() if k.startswith("data/")}


def _check_directory(file: BinaryIO) -> None:
    """The list of entries is where it has to be: right before the end, and of modest size."""
    length = file.seek(0, io.SEEK_END)
    file.seek(max(length - 98, 0))
    tail = file.read()
    if len(tail) < 22 or tail[-22:-18] != b"PK\x05\x06" or tail[-2:] != b"\0\0":
        raise _Refused("not a zip archive, or a truncated one")
    end = length - 22
    size, start = struct.unpack("<II", tail[-10:-2])
    if tail[-42:-38] == b"PK\x06\x07":  # an archive of 64 bits, as all of torch.save
        if tail[-98:-94] != b"PK\x06\x06":
            raise _Refused("its list of entries is damaged")
        end = length - 98
        size, start = struct.unpack("<QQ", tail[-58:-42])
    if size > MAX_DIRECTORY or start + size != end:
        raise _Refused("its list of entries is damaged, or too long")


class _Storage(NamedTuple):
    """Stands for the bytes of tensors."""

    kind: str
    elements: int


class _Tensor:
    """Stands for a tensor."""

    __slots__ = ()


class _Dict(dict[object, object]):
    """Stands for an OrderedDict, the one object that may have an attribute."""


def _rebuild_tensor(
    storage: object,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: object,
    hooks: object,
) -> _Tensor:
    """Check a tensor against the storage that it is to be a view of."""
    if not isinstance(storage, _Storage) or type(requires_grad) is not bool or hooks != {}:
        raise _Refused("a tensor without storage")
    if type(size) is not tuple or type(stride) is not tuple or len(size) != len(stride):
        raise _Refused("a tensor without a size")
    if any(type(n) is not int or not 0 <= n < 2**63 for n in (offset, *size, *stride)):
        raise _Refused("a tensor of negative or absurd size")
    elements = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    beyond = last >= storage.elements if elements else offset > storage.elements
    if elements > storage.elements or beyond or len(size) > MAX_DIMENSIONS:
        raise _Refused(f"a tensor of more elements than the {storage.elements} it has")
    return _Tensor()


def _rebuild_parameter(data: object, requires_grad: object, hooks: object) -> _Tensor:
    if not isinstance(data, _Tensor) or type(requires_grad) is not bool or hooks != {}:
        raise _Refused("a parameter without data")
    return data


_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): lambda: _Dict(),
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", kind): kind for kind in _ITEM_SIZES},
}


class _DryRun(pickle._Unpickler):
    """Goes through a pickle as `torch.load` will, and makes stand-ins of tensors."""

    read: Callable[[int], bytes]
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, pickled: bytes, sizes: dict[str, int]) -> None:
        super().__init__(io.BytesIO(pickled))
        self._sizes = sizes
        self._storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise _Refused(f"it would run code: {shown(f'{module}.{name}')}")
        return _GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage":
            raise _Refused("a reference to something else than a storage")
        _, kind, key, device, elements = pid
        if type(kind) is not str or kind not in _ITEM_SIZES or type(device) is not str:
            raise _Refused("a storage of unknown kind")
        if type(key) is not str or key not in self._sizes or type(elements) is not int:
            raise _Refused("a storage that is not in it")
        if elements * _ITEM_SIZES[kind] != self._sizes[key]:
            raise _Refused(f"a storage of {shown(elements)} elements in {self._sizes[key]} bytes")
        storage = self._storages.setdefault(key, _Storage(kind, elements))
        if storage != (kind, elements):
            raise _Refused("a storage of two kinds")
        return storage

    def _proto(self) -> None:
        if self.read(1) != b"\x02":
            raise _Refused("a pickle of another protocol than 2")

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Keys of other types can be made to have all the same hash.
            if type(key) is not str and (type(key) is not int or not 0 <= key < 2**32):
                raise _Refused("a dict whose keys are neither text nor small numbers")
            self.stack[-1][key] = value

    def _build(self) -> None:
        state = self.stack.pop()
        if type(self.stack[-1]) is not _Dict or type(state) is not dict or "_metadata" not in state:
            raise _Refused("an object with attributes")
        if len(state) > 1:
            raise _Refused("a dict with attributes")

    dispatch: ClassVar[dict[int, Any]] = {
        **{code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPERATIONS},
        pickle.PROTO[0]: _proto,
        pickle.SETITEM[0]: _setitem,
        pickle.SETITEMS[0]: _setitems,
        pickle.BUILD[0]: _build,
    }
