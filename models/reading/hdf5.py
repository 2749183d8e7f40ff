"""HDF5 files of strangers: read within themselves, and within memory in proportion to their size.

The HDF5 library follows links to other files, loads filters from plugins, inflates a chunk to any
length and allocates what a header says. Here only arrays of numbers and short bytes are read, and
text, over hard links inside one file, each after what it claims was held against what is stored.
"""

from __future__ import annotations

import contextlib
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
from h5py import h5a, h5d, h5i, h5l, h5o, h5s, h5t, h5z
from h5py.h5d import DatasetID
from h5py.h5g import GroupID

from lossgeometry.errors import InputError, shown
from models.files import patiently

FREE = 2**26  # bytes of arrays that a file may hold whatever its size,
RATIO = 16  # and how often its own size beyond that
MAX_DEPTH = 16  # of groups
MAX_OBJECTS = 100_000
MAX_TEXT = 2**20  # bytes
MAX_TEXTS = 2**16  # in a list of texts
_FILTERS = {h5z.FILTER_DEFLATE, h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32}


class _Refused(Exception):
    """Why a file is not read."""


@contextlib.contextmanager
def opened(path: Path, expected: str) -> Iterator[HostileFile]:
    """Open an HDF5 file for reading.

    Raises
    ------
    InputError
        If it is not an HDF5 file or is damaged, also when that shows later, in the body of the
        ``with``. The message is "PATH: not a usable HDF5 file (WHY), EXPECTED".
    """
    try:
        whole = path.read_bytes()  # a mapped file that is truncated ends the process
        _check_bytes(whole)
        with patiently(lambda: h5py.File(path, "r"), BlockingIOError, path) as file:
            yield HostileFile(file, whole)
    except InputError as error:  # of what it holds
        raise (
            error if str(error).startswith(str(path)) else InputError(f"{path}: {error}")
        ) from error
    except Exception as error:  # a damaged file fails in any way it likes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path}: not a usable HDF5 file ({reason}), {expected}") from error


class HostileFile:
    """What can be trusted to be read from a file that cannot be trusted."""

    def __init__(self, file: h5py.File, whole: bytes) -> None:
        self._file = file
        self._whole = whole
        self._allowance = FREE + RATIO * len(whole)
        self._checked: set[str] = set()  # names of attributes

    def find(self, name: str) -> GroupID | DatasetID | None:
        """The group or array at a path; None if there is none."""
        found: GroupID | DatasetID = self._file.id
        for part in filter(None, name.encode().split(b"/")):
            if not isinstance(found, GroupID) or not found.links.exists(part):
                return None
            found = _member(found, part)
        return found

    def arrays(self, group: GroupID) -> dict[str, np.ndarray]:
        """All arrays in a group and in the groups below, by their paths in it."""
        found: dict[str, np.ndarray] = {}
        seen: set[int] = set()
        waiting = [("", group)]
        while waiting:
            prefix, parent = waiting.pop()
            if prefix.count("/") > MAX_DEPTH:
                raise _Refused(f"groups in each other, {MAX_DEPTH} deep")
            for part in parent:
                path = prefix + part.decode(errors="surrogateescape")
                member = _member(parent, part)
                address = h5o.get_info(member).addr
                if address in seen or len(seen) >= MAX_OBJECTS:
                    raise _Refused(f"{shown(path)} is there twice, or too much is")
                seen.add(address)
                if isinstance(member, GroupID):
                    waiting.append((f"{path}/", member))
                else:
                    found[path] = self.read(member)
        return found

    def read(self, dataset: DatasetID) -> np.ndarray:
        """The whole of an array of numbers or of bytes of a fixed length."""
        dtype, shape, name = dataset.dtype, dataset.shape, shown(h5i.get_name(dataset).decode())
        if dtype.kind not in "biufS" or (dtype.kind != "S" and dtype.itemsize > 8):
            raise _Refused(f"{name} is {dtype}, no array of numbers")
        if shape is None:
            raise _Refused(f"{name} is empty")
        properties = dataset.get_create_plist()
        layout = properties.get_layout()
        if layout == h5d.VIRTUAL or properties.get_external_count():
            raise _Refused(f"{name} lies in other files")
        filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
        if not set(filters) <= _FILTERS or len(set(filters)) < len(filters):
            raise _Refused(f"{name} is compressed by something else than gzip")
        claimed, stored = math.prod(shape) * dtype.itemsize, dataset.get_storage_size()
        if stored > len(self._whole) or (layout != h5d.CHUNKED and claimed > stored):
            raise _Refused(f"{name} of {claimed} bytes has {stored}")
        chunk = math.prod(properties.get_chunk()) * dtype.itemsize if layout == h5d.CHUNKED else 0
        self._allowance -= max(claimed, chunk)
        if self._allowance < 0:
            raise _Refused(f"{name} of {shape} is too large for a file of {len(self._whole)} bytes")
        if layout == h5d.CHUNKED:
            self._check_chunks(dataset, properties.get_chunk(), chunk, filters)
        array = np.empty(shape, dtype)
        dataset.read(h5s.ALL, h5s.ALL, array)
        return array

    def _check_chunks(
        self, dataset: DatasetID, steps: tuple[int, ...], size: int, filters: list[int]
    ) -> None:
        """All chunks are there, and hold no more than a chunk does."""
        chunks: list[tuple[tuple[int, ...], int]] = []
        dataset.chunk_iter(lambda info: chunks.append((info.chunk_offset, info.size)))
        name = shown(h5i.get_name(dataset).decode())
        needed = math.prod(-(-n // step) for n, step in zip(dataset.shape, steps, strict=True))
        if len(chunks) != needed or sum(length for _, length in chunks) > len(self._whole):
            raise _Refused(f"{name} has {len(chunks)} chunks of {needed}")
        if h5z.FILTER_DEFLATE not in filters:
            return
        bit = 1 << filters.index(h5z.FILTER_DEFLATE)
        for offset, _ in chunks:
            skipped, raw = dataset.read_direct_chunk(offset)
            longest = size + 4  # with a checksum
            if not skipped & bit and len(_inflate(raw, longest + 1)) > longest:
                raise _Refused(f"{name} inflates to more than it says")

    def text(self, key: str, of: GroupID | None = None, *, default: str | None = None) -> str:
        """Text of an attribute of a group, by default that of the file."""
        found = self._texts(key, self._file.id if of is None else of, dimensions=0)
        if not found and default is None:
            raise _Refused(f"there is no attribute {key}")
        return found[0] if found else str(default)

    def texts(self, key: str) -> tuple[str, ...]:
        """The texts of an attribute of the file that is a list of them; empty if there is none."""
        return self._texts(key, self._file.id, dimensions=1)

    def _texts(self, key: str, item: GroupID, dimensions: int) -> tuple[str, ...]:
        if not h5a.exists(item, key.encode()):
            return ()
        attribute = h5a.open(item, key.encode())
        kind, shape = attribute.get_type(), attribute.shape
        if not isinstance(kind, h5t.TypeStringID) or shape is None or len(shape) != dimensions:
            raise _Refused(f"the attribute {key} is no {'list of texts' if dimensions else 'text'}")
        count = math.prod(shape)
        length = 0 if kind.is_variable_str() else kind.get_size()
        if count > MAX_TEXTS or count * length > MAX_TEXT:
            raise _Refused(f"the attribute {key} is too long")
        if kind.is_variable_str():
            if key not in self._checked:
                _check_lengths(self._whole, key.encode() + b"\0")
            self._checked.add(key)
        values = np.atleast_1d(np.asarray(h5py.Group(item).attrs[key], dtype=object)).tolist()
        texts = tuple(v.decode() if isinstance(v, bytes) else str(v) for v in values)
        if sum(map(len, texts)) > MAX_TEXT:
            raise _Refused(f"the attribute {key} is too long")
        return texts


def _check_bytes(whole: bytes) -> None:
    """What the library would loop over without end: heaps with objects that lead nowhere.

    Heaps are found by their signature and version, wherever they are.
    """
    if not whole:
        raise _Refused("it is empty")
    widths = whole[13:15] if whole[8:9] in (b"\0", b"\1") else whole[9:11]
    if whole[:8] != b"\x89HDF\r\n\x1a\n" or widths != b"\x08\x08":
        raise _Refused("it does not begin as an HDF5 file of 64 bits")
    start = whole.find(b"GCOL\1")
    while start >= 0:
        position, end = start + 16, start + int.from_bytes(whole[start + 8 : start + 16], "little")
        while position + 16 <= min(end, len(whole)):
            index, length = struct.unpack_from("<H6xQ", whole, position)
            extent = 16 + -(-length // 8) * 8 if index else length
            if extent == 0 or extent > end - position:  # the library's sum of both wraps around
                raise _Refused("it has a heap without end")
            position += extent
        start = whole.find(b"GCOL\1", start + 1)


def _check_lengths(whole: bytes, name: bytes) -> None:
    """Texts of variable length are no longer than `MAX_TEXT`, in any attribute of this name.

    The library allocates what their references say before it looks for them. The references are in
    the message of the attribute: version, flags, sizes of the name, of the datatype and of the
    dataspace; in version 3 an encoding; then these three, in version 1 padded; then the data.
    """
    found = 0
    start = whole.find(name)
    while start >= 0:
        for head, known in ((start - 8, (1, 2)), (start - 9, (3,))):
            if head < 0 or whole[head] not in known:
                continue
            version, flags, *sizes = struct.unpack_from("<BBHHH", whole, head)
            if sizes[0] != len(name):
                continue
            lengths = [-(-size // 8) * 8 for size in sizes] if version == 1 else sizes
            kind, space = start + lengths[0], start + lengths[0] + lengths[1]
            if flags:
                raise _Refused(f"the attribute {name[:-1].decode()} has its type elsewhere")
            if whole[kind] & 15 != h5t.VLEN:
                continue
            found += 1
            first = space + (8 if whole[space] == 1 else 4)
            axes = struct.unpack_from(f"<{whole[space + 1]}Q", whole, first)
            count, data = math.prod(axes), space + lengths[2]
            if count > MAX_TEXTS or data + 16 * count > len(whole):
                raise _Refused(f"the attribute {name[:-1].decode()} is too long")
            texts = (whole[data + 16 * i : data + 16 * i + 4] for i in range(count))
            if sum(int.from_bytes(text, "little") for text in texts) > MAX_TEXT:
                raise _Refused(f"the attribute {name[:-1].decode()} is too long")
        start = whole.find(name, start + 1)
    if not found:
        raise _Refused(f"the attribute {name[:-1].decode()} is not where it should be")


def _inflate(raw: bytes, length: int) -> bytes:
    """The first so many bytes."""
    return zlib.decompressobj().decompress(raw, length)


def _member(group: GroupID, name: bytes) -> GroupID | DatasetID:
    """A member of a group; raises if it is elsewhere."""
    if group.links.get_info(name).type != h5l.TYPE_HARD:
        raise _Refused(
            f"{shown(name.decode(errors='surrogateescape'))} is a link to somewhere else"
        )
    member = h5o.open(group, name)
    if not isinstance(member, GroupID | DatasetID):
        raise _Refused(
            f"{shown(name.decode(errors='surrogateescape'))} is neither a group nor an array"
        )
    return member
