"""Weights of strangers: what `torch.save` wrote, read without running anything in it.

``torch.load(weights_only=True)`` runs no code, but it believes what a file says about itself: a
few bytes can ask for any amount of memory, and a storage that claims to be longer than its bytes
is read beyond their end. Therefore the archive is checked first, and the pickle in it is gone
through by an unpickler that imports nothing: it makes tensors, each held against the bytes it is a
view of, and in the place of all other objects, where they are allowed, inert dictionaries. What
consists of tensors, numbers and text is then left to ``torch.load``; what else other frameworks
write beside the weights, such as an ``argparse.Namespace``, that would refuse, and it stays as it
was found. What stands beside the weights can be read without them, and without PyTorch.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

from lossgeometry.errors import InputError, shown

MAX_DIRECTORY = 2**24  # bytes of the list of entries, some 200,000 tensors
MAX_PICKLE = 2**22  # bytes of everything but the tensors; in memory it is up to 70 times that
MAX_DIMENSIONS = 64  # of a tensor, as in NumPy
_EXPECTED = "expected an archive of tensors, numbers and text that torch.save wrote"
_MEMBERS = re.compile(
    r"data\.pkl|data/\d+|byteorder|version|\.format_version|\.storage_alignment"
    r"|\.data/serialization_id"
)
_DTYPES = {  # of storages: name in PyTorch, and bytes of an element
    **dict(DoubleStorage=("float64", 8), FloatStorage=("float32", 4), HalfStorage=("float16", 2)),
    **dict(BFloat16Storage=("bfloat16", 2), BoolStorage=("bool", 1)),
    **dict(LongStorage=("int64", 8), IntStorage=("int32", 4), ShortStorage=("int16", 2)),
    **dict(CharStorage=("int8", 1), ByteStorage=("uint8", 1)),
    **dict(ComplexFloatStorage=("complex64", 8), ComplexDoubleStorage=("complex128", 16)),
}
_REBUILD = ("_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_parameter_with_state")
_OPERATIONS = (  # of protocol 2, which is torch.save's; none of them imports, see `_Unpickler`
    *(pickle.PROTO, pickle.STOP, pickle.GLOBAL, pickle.BINPERSID),
    *(pickle.MARK, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_TUPLE),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS),
    *(pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BINFLOAT, pickle.BINUNICODE),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET),
)


class _Refused(Exception):
    """Why a file is not loaded."""


def read_pickle(path: Path, *, stubs: bool = False, weights: bool = True) -> object:
    """Load what `torch.save` wrote: tensors, on the CPU, in dicts, lists and tuples.

    With `stubs`, whatever object of another kind is in it is a `Stub`; its class is not looked for.
    Without `weights`, there is an `Unread` in the place of every tensor, after the same checks.
    Nothing in the file is executed, and no more memory is used than some multiple of its size.

    Raises
    ------
    InputError
        If the file is missing, is damaged, or is not what it says it is: entries or tensors that
        claim to be larger than their bytes, compressed entries, other entries than those of
        `torch.save`. Without `stubs` also if there are other objects in it, which a reader that
        makes them would have to run code for.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "there is no such file"
        raise InputError(f"{path}: {found}, expected the file of a checkpoint")
    try:
        with path.open("rb") as file:
            _check_directory(file)
            with zipfile.ZipFile(file) as archive:
                unpickler = _Unpickler(archive, _entries(archive), stubs, weights)
                content = unpickler.load()
        if unpickler.found_objects or not weights:
            return content
        import torch

        return torch.load(path, map_location="cpu", weights_only=True)
    except _Refused as error:
        raise InputError(f"{path}: not a checkpoint ({error}), {_EXPECTED}") from error
    except OSError:
        raise
    except Exception as error:  # a damaged file fails in any way it likes
        raise InputError(f"{path}: not a checkpoint (it is damaged), {_EXPECTED}") from error


def _entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The entries of an archive, all undamaged, by their names without that of the folder."""
    found: dict[str, zipfile.ZipInfo] = {}
    entries = archive.infolist()
    folder = entries[0].filename.partition("/")[0] + "/" if entries else ""
    for entry in entries:
        name = entry.filename.removeprefix(folder)
        if entry.orig_filename != folder + name or not _MEMBERS.fullmatch(name):
            raise _Refused(f"its entry {shown(entry.orig_filename)} is none of torch.save's")
        if name in found:
            raise _Refused(f"its entry {name} is there twice")
        if entry.compress_type or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
            raise _Refused(f"its entry {name} is compressed or encrypted")
        found[name] = entry
    if sum(entry.file_size for entry in entries) > archive.start_dir:
        raise _Refused("its entries claim to be larger than the file")
    size = found["data.pkl"].file_size if "data.pkl" in found else 0
    if not 0 < size <= MAX_PICKLE:
        raise _Refused(f"data.pkl of {size} bytes")
    if (broken := archive.testzip()) is not None:
        raise _Refused(f"its entry {shown(broken)} is damaged")
    if "byteorder" in found and archive.read(found["byteorder"]) != sys.byteorder.encode():
        raise _Refused("its bytes are in another order than those of this machine")
    return found


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


class Stub(dict[object, object]):
    """Stands for an object of any class, and is inert, whatever is done to it.

    Its items are those of the object, if it is a mapping; ``__dict__`` is the state of others.
    """

    __slots__ = ()

    def __init__(self, *_: object) -> None:
        super().__init__()

    def __call__(self, *_: object) -> Stub:
        """What comes out of it, as of a method or of a nested class."""
        return Stub()

    def append(self, _: object) -> None:
        """Of a kind of list: not kept."""

    extend = append


class _Dict(dict[object, object]):
    """Stands for an OrderedDict, the one object that may have an attribute without being a stub."""


class Unread:
    """Stands for a tensor that is not read."""


class _Storage:
    """The numbers that tensors are views of. No tensor itself: nothing else may be done to it."""

    def __init__(self, kind: str, elements: int, content: Tensor | None) -> None:
        self.kind, self.elements = kind, elements
        self.content = content  # (elements,), if it is read


def _made(weights: bool) -> type[Tensor | Unread]:
    """The class of what is made of a tensor."""
    if not weights:
        return Unread
    from torch import Tensor

    return Tensor


def _numbers(raw: bytes, dtype: str) -> Tensor:
    import torch

    content = torch.empty(len(raw), dtype=torch.uint8)
    content.numpy()[:] = np.frombuffer(raw, np.uint8)
    return content.view(getattr(torch, dtype))


class _Unpickler(pickle._Unpickler):
    """Makes tensors, and calls nothing but the functions and `Stub` of this module."""

    read: Callable[[int], bytes]
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(
        self,
        archive: zipfile.ZipFile,
        entries: Mapping[str, zipfile.ZipInfo],
        stubs: bool,
        weights: bool,
    ) -> None:
        super().__init__(io.BytesIO(archive.read(entries["data.pkl"])))
        self._archive = archive
        self._entries = entries
        self._stubs, self._weights = stubs, weights
        self.found_objects = False  # that are left to nobody else
        self._storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return name
        if module == "torch._utils" and name in _REBUILD:
            self.found_objects |= name == "_rebuild_parameter_with_state"  # state of any kind
            return self._tensor if name == "_rebuild_tensor_v2" else self._parameter
        if self._stubs and module.startswith("torch") and name.startswith("_rebuild"):
            raise _Refused(f"a tensor of a kind that is not read: {shown(f'{module}.{name}')}")
        if (module, name) == ("collections", "OrderedDict"):
            return _Dict
        self._found(f"it would run code: {shown(f'{module}.{name}')}")
        return Stub

    def persistent_load(self, pid: Any) -> _Storage:
        if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage":
            raise _Refused("a reference to something else than a storage")
        _, kind, key, device, elements = pid
        if type(kind) is not str or kind not in _DTYPES or type(device) is not str:
            raise _Refused("a storage of unknown kind")
        if type(key) is not str or f"data/{key}" not in self._entries or type(elements) is not int:
            raise _Refused("a storage that is not in it")
        entry, (dtype, size) = self._entries[f"data/{key}"], _DTYPES[kind]
        if elements * size != entry.file_size:
            raise _Refused(f"a storage of {shown(elements)} elements in {entry.file_size} bytes")
        if key not in self._storages:
            content = _numbers(self._archive.read(entry), dtype) if self._weights else None
            self._storages[key] = _Storage(kind, elements, content)
        if self._storages[key].kind != kind:
            raise _Refused("a storage of two kinds")
        return self._storages[key]

    def _tensor(
        self,
        storage: object,
        offset: Any,
        size: Any,
        stride: Any,
        requires_grad: object,
        hooks: object,
    ) -> Tensor | Unread:
        """A view of a storage, checked against it; it requires no gradient."""
        if not isinstance(storage, _Storage) or type(requires_grad) is not bool or hooks != {}:
            raise _Refused("a tensor without storage")
        if type(size) is not tuple or type(stride) is not tuple or len(size) != len(stride):
            raise _Refused("a tensor without a size")
        if any(type(n) is not int or not 0 <= n < 2**63 for n in (offset, *size, *stride)):
            raise _Refused("a tensor of negative or absurd size")
        elements, available = math.prod(size), storage.elements
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        beyond = last >= available if elements else offset > available
        if elements > available or beyond or len(size) > MAX_DIMENSIONS:
            raise _Refused(f"a tensor of more elements than the {available} it has")
        if storage.content is None:
            return Unread()
        return storage.content.as_strided(size, stride, offset)

    def _parameter(
        self, data: object, requires_grad: object, hooks: object, *_: object
    ) -> Tensor | Unread:
        if (
            not isinstance(data, _made(self._weights))
            or type(requires_grad) is not bool
            or hooks != {}
        ):
            raise _Refused("a parameter without data")
        return data

    def _proto(self) -> None:
        if self.read(1) != b"\x02":
            raise _Refused("a pickle of another protocol than 2")

    def _reduce(self) -> None:
        args = self.stack.pop()
        if type(args) is not tuple:  # of a tensor, one would be made of each element
            raise _Refused("an object made of something else than arguments")
        self.stack[-1] = self.stack[-1](*args)

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise _Refused("items of something else than a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Keys of other types can be made to have all the same hash.
            if type(key) is str or (type(key) is int and 0 <= key < 2**32):
                self.stack[-1][key] = value
            else:
                self._found("a dict whose keys are neither text nor small numbers")

    def _build(self) -> None:
        state = self.stack.pop()
        if type(self.stack[-1]) is Stub:
            self.stack[-1]["__dict__"] = state  # not its items: many objects may share one state
        elif type(self.stack[-1]) is not _Dict or type(state) is not dict:
            raise _Refused("an object with attributes")
        elif state.keys() != {"_metadata"}:
            self._found("a dict with attributes")

    def _found(self, what: str) -> None:
        """Something that is none of tensors, numbers and text in containers."""
        if not self._stubs:
            raise _Refused(what)
        self.found_objects = True

    dispatch: ClassVar[dict[int, Any]] = {
        **{code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPERATIONS},
        **dict.fromkeys((pickle.REDUCE[0], pickle.NEWOBJ[0]), _reduce),
        pickle.PROTO[0]: _proto,
        pickle.SETITEM[0]: _setitem,
        pickle.SETITEMS[0]: _setitems,
        pickle.BUILD[0]: _build,
    }
