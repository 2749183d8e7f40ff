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
from h5py import h5a, h5d, h5l, h5t, h5z

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
        _check_bytes(path)
        with patiently(lambda: h5py.File(path, "r"), BlockingIOError, path) as file:
            yield HostileFile(file, path)
    except InputError as error:  # of what it holds
        raise (
            error if str(error).startswith(str(path)) else InputError(f"{path}: {error}")
        ) from error
    except Exception as error:  # a damaged file fails in any way it likes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path}: not a usable HDF5 file ({reason}), {expected}") from error


class HostileFile:
    """What can be trusted to be read from a file that cannot be trusted."""

    def __init__(self, file: h5py.File, path: Path) -> None:
        self._file = file
        self._path = path
        self._size = path.stat().st_size
        self._allowance = FREE + RATIO * self._size

    def find(self, name: str) -> h5py.Group | h5py.Dataset | None:
        """The group or dataset at a path; None if there is none."""
        found = self._file
        for part in filter(None, name.split("/")):
            if not isinstance(found, h5py.Group) or not found.id.links.exists(part.encode()):
                return None
            found = _member(found, part)
        return found

    def arrays(self, group: h5py.Group) -> dict[str, np.ndarray]:
        """All arrays in a group and in the groups below, by their paths in it."""
        found: dict[str, np.ndarray] = {}
        seen: set[int] = set()
        waiting = [("", group)]
        while waiting:
            prefix, parent = waiting.pop()
            if prefix.count("/") > MAX_DEPTH:
                raise _Refused(f"groups in each other, {MAX_DEPTH} deep")
            for part in parent:
                member = _member(parent, part)
                address = h5py.h5o.get_info(member.id).addr
                if address in seen or len(seen) >= MAX_OBJECTS:
                    raise _Refused(f"{shown(prefix + part)} is there twice, or too much is")
                seen.add(address)
                if isinstance(member, h5py.Group):
                    waiting.append((f"{prefix}{part}/", member))
                else:
                    found[prefix + part] = self.read(member)
        return found

    def read(self, dataset: h5py.Dataset) -> np.ndarray:
        """The whole of a dataset of numbers or of bytes of a fixed length."""
        dtype, name = dataset.dtype, shown(dataset.name)
        if dtype.kind not in "biufS" or (dtype.kind != "S" and dtype.itemsize > 8):
            raise _Refused(f"{name} is {dtype}, no array of numbers")
        if dataset.shape is None:
            raise _Refused(f"{name} is empty")
        properties = dataset.id.get_create_plist()
        layout = properties.get_layout()
        if layout == h5d.VIRTUAL or properties.get_external_count():
            raise _Refused(f"{name} lies in other files")
        filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
        if not set(filters) <= _FILTERS or len(set(filters)) < len(filters):
            raise _Refused(f"{name} is compressed by something else than gzip")
        claimed, stored = math.prod(dataset.shape) * dtype.itemsize, dataset.id.get_storage_size()
        if stored > self._size or (layout != h5d.CHUNKED and claimed > stored):
            raise _Refused(f"{name} of {claimed} bytes has {stored}")
        chunk = math.prod(properties.get_chunk()) * dtype.itemsize if layout == h5d.CHUNKED else 0
        self._allowance -= max(claimed, chunk)
        if self._allowance < 0:
            raise _Refused(
                f"{name} of {dataset.shape} is too large for a file of {self._size} bytes"
            )
        if layout == h5d.CHUNKED:
            self._check_chunks(dataset, chunk, filters)
        return dataset[()]

    def _check_chunks(self, dataset: h5py.Dataset, size: int, filters: list[int]) -> None:
        """All chunks are there, and hold no more than a chunk does."""
        chunks: list[tuple[tuple[int, ...], int]] = []
        dataset.id.chunk_iter(lambda info: chunks.append((info.chunk_offset, info.size)))
        needed = math.prod(
            -(-n // step) for n, step in zip(dataset.shape, dataset.chunks, strict=True)
        )
        if len(chunks) != needed or sum(length for _, length in chunks) > self._size:
            raise _Refused(f"{shown(dataset.name)} has {len(chunks)} chunks of {needed}")
        if h5z.FILTER_DEFLATE not in filters:
            return
        bit = 1 << filters.index(h5z.FILTER_DEFLATE)
        for offset, _ in chunks:
            skipped, raw = dataset.id.read_direct_chunk(offset)
            longest = size + 4  # with a checksum
            if not skipped & bit and len(_inflate(raw, longest + 1)) > longest:
                raise _Refused(f"{shown(dataset.name)} inflates to more than it says")

    def text(self, key: str, of: h5py.Group | None = None, *, default: str | None = None) -> str:
        """Text of an attribute of a group, by default that of the file."""
        found = self._texts(key, self._file if of is None else of, dimensions=0)
        if not found and default is None:
            raise _Refused(f"there is no attribute {key}")
        return found[0] if found else str(default)

    def texts(self, key: str) -> tuple[str, ...]:
        """The texts of an attribute of the file that is a list of them; empty if there is none."""
        return self._texts(key, self._file, dimensions=1)

    def _texts(self, key: str, item: h5py.Group, dimensions: int) -> tuple[str, ...]:
        if not h5a.exists(item.id, key.encode()):
            return ()
        attribute = h5a.open(item.id, key.encode())
        kind, shape = attribute.get_type(), attribute.shape
        if not isinstance(kind, h5t.TypeStringID) or shape is None or len(shape) != dimensions:
            raise _Refused(f"the attribute {key} is no {'list of texts' if dimensions else 'text'}")
        count = math.prod(shape)
        length = 0 if kind.is_variable_str() else kind.get_size()
        if count > MAX_TEXTS or count * length > MAX_TEXT:
            raise _Refused(f"the attribute {key} is too long")
        if kind.is_variable_str():
            _check_lengths(self._path, key.encode() + b"\0")
        values = np.atleast_1d(np.asarray(item.attrs[key], dtype=object)).tolist()
        texts = tuple(v.decode() if isinstance(v, bytes) else str(v) for v in values)
        if sum(map(len, texts)) > MAX_TEXT:
            raise _Refused(f"the attribute {key} is too long")
        return texts


def _check_bytes(path: Path) -> None:
    """What the library would loop over without end: heaps with objects that lead nowhere.

    Heaps are found by their signature and version, wherever they are.
    """
    if not path.stat().st_size:
        raise _Refused("it is empty")
    whole = path.read_bytes()  # a mapped file that is truncated ends the process
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


def _check_lengths(path: Path, name: bytes) -> None:
    """Texts of variable length are no longer than `MAX_TEXT`, in any attribute of this name.

    The library allocates what their references say before it looks for them. The references are in
    the message of the attribute: version, flags, sizes of the name, of the datatype and of the
    dataspace; in version 3 an encoding; then these three, in version 1 padded; then the data.
    """
    found = 0
    whole = path.read_bytes()  # a mapped file that is truncated ends the process
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


def _member(group: h5py.Group, name: str) -> h5py.Group | h5py.Dataset:
    """A member of a group; raises if it is elsewhere."""
    encoded = name.encode(errors="surrogateescape")
    if group.id.links.get_info(encoded).type != h5l.TYPE_HARD:
        raise _Refused(f"{shown(name)} is a link to somewhere else")
    member = group[name]
    if not isinstance(member, h5py.Group | h5py.Dataset):
        raise _Refused(f"{shown(name)} is neither a group nor an array")
    return member
