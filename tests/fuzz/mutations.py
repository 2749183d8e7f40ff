"""Changes that are likely to hurt: of bytes, of pickles and their archives, of HDF5, of words."""

from __future__ import annotations

import io
import pickle
import pickletools
import random
import struct
import zipfile
import zlib
from itertools import pairwise

import h5py
import numpy as np

INTEGERS = (0, 1, -1, 2, 3, 7, 8, 127, 255, 256, 65535, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
INTEGERS += (2**32, 10**9, 10**12, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -(2**31), -(2**63))
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-300, 1e300, 5e-324, float("nan"), float("inf"), -1e18)
TEXTS = (
    "",
    "a",
    "clamp",
    "../../x",
    "/etc/passwd",
    "a\0b",
    "a\nb",
    "\x1b[2J",
    "$\\frac{",
    "é" * 40,
)
TEXTS += ("digits", "nan", "x" * 5000, "{seed.__class__}", "%s%n", "\ud800", "-1", "1e999", "null")


def anything(rng: random.Random, depth: int = 0) -> object:
    """A value of any type that a pickle or a JSON text can hold."""
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind == 5:
        return [anything(rng, depth + 1) for _ in range(rng.randrange(3))]
    if kind == 6:
        return {rng.choice(TEXTS): anything(rng, depth + 1) for _ in range(rng.randrange(3))}
    if kind == 7:
        value: object = []
        for _ in range(rng.choice((5, 100))):
            value = [value]
        return value
    return rng.choice((rng.choice(INTEGERS), rng.choice(FLOATS), rng.choice(TEXTS), None, True))


def mutate_bytes(rng: random.Random, whole: bytes) -> bytes:
    """Flip, overwrite, cut, double or move a few regions."""
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 5))):
        if not data:
            return b""
        i = rng.randrange(len(data))
        kind = rng.randrange(8)
        if kind <= 1:
            data[i] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[i] = rng.choice((0, 1, 255, rng.randrange(256)))
        elif kind <= 4:
            width = rng.choice((2, 4, 8))
            value = rng.choice(INTEGERS) % 2 ** (8 * width)
            data[i : i + width] = value.to_bytes(width, rng.choice(("little", "little", "big")))
        elif kind == 5:
            del data[i : i + rng.choice((1, 4, 64, len(data)))]
        else:
            j = rng.randrange(len(data))
            piece = data[j : j + rng.choice((1, 8, 100, 1000))]
            data[i : i + (0 if kind == 6 else len(piece))] = piece
    return bytes(data)


def operations(pickled: bytes) -> list[bytes]:
    """The operations of a pickle, each with its argument."""
    starts = [position for _, _, position in pickletools.genops(pickled)] + [len(pickled)]
    return [pickled[a:b] for a, b in pairwise(starts)]


def _number(rng: random.Random) -> bytes:
    value = rng.choice(INTEGERS)
    if rng.random() < 0.2:
        return pickle.BINFLOAT + struct.pack(">d", rng.choice(FLOATS))
    if -(2**31) <= value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    raw = value.to_bytes(9, "little", signed=True)
    return pickle.LONG1 + bytes([len(raw)]) + raw


def _text(rng: random.Random) -> bytes:
    raw = rng.choice(TEXTS).encode(errors="surrogatepass")
    return pickle.BINUNICODE + struct.pack("<I", len(raw)) + raw


GLOBALS = (b"cposix\nsystem\n", b"cos\nsystem\n", b"cbuiltins\neval\n", b"cbuiltins\nbytearray\n")
GLOBALS += (b"ctorch\nLongStorage\n", b"ctorch\nFloatTensor\n", b"c_codecs\nencode\n")
GLOBALS += (b"ctorch._utils\n_rebuild_parameter\n", b"ctorch._utils\n_rebuild_tensor_v2\n")
GLOBALS += (b"ctorch._utils\n_rebuild_sparse_tensor\n", b"ccollections\nOrderedDict\n")
ATTACKS = (
    b"cposix\nsystem\nX\x0e\x00\x00\x00touch executed\x85R.",
    b"cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R.",
    b"ctorch\nFloatTensor\n\x8a\x05\x00\x00\x00\x00\x10\x85R.",
    b"]r\xff\xff\xff\x7f.",
    b"\x96\xff\xff\xff\xff\x0f\x00\x00\x00.",
)
SINGLE = b".(]})t\x85\x86\x87RbQsuae0\x81\x8fN\x88\x89"


def mutate_pickle(rng: random.Random, base: list[bytes]) -> bytes:
    """Change numbers, texts, functions and the order of operations."""
    ops = list(base)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if len(ops) == 1:
            break  # nothing is left to change
        i = rng.randrange(1, len(ops))
        kind, op = rng.randrange(10), ops[i][:1]
        if kind <= 4:  # of the same kind, where it has an argument
            if op == pickle.GLOBAL:
                ops[i] = rng.choice(GLOBALS)
            elif op in b"KMJ\x8aG\x88\x89N":
                ops[i] = _number(rng)
            elif op == pickle.BINUNICODE:
                ops[i] = _text(rng)
            elif op in b"hj":
                ops[i] = pickle.BINGET + bytes([rng.randrange(256)])
            else:
                ops[i] = bytes([rng.choice(SINGLE)])
        elif kind == 5:
            del ops[i]
        elif kind == 6:
            ops.insert(i, rng.choice(base))
        elif kind == 7:
            ops.insert(i, rng.choice((_number(rng), _text(rng), bytes([rng.choice(SINGLE)]))))
        elif kind == 8:
            j = rng.randrange(1, len(ops))
            ops[i], ops[j] = ops[j], ops[i]
        else:
            ops[i:] = [rng.choice(ATTACKS)]
    return b"".join(ops)


def archive(entries: list[tuple[str, bytes]], rng: random.Random | None = None) -> bytes:
    """A zip archive as `torch.save` writes it; with `rng`, one that lies."""
    out, directory = io.BytesIO(), io.BytesIO()
    victim = rng.randrange(len(entries)) if rng else -1
    count = len(entries)
    for i, (name, content) in enumerate(entries):
        raw, method, crc = name.encode(), 0, zlib.crc32(content)
        sizes, flags, stored, offset = [len(content)] * 2, 0, content, out.tell()
        if i == victim and rng is not None:
            lie = rng.randrange(8)
            if lie == 0:
                sizes[1] = rng.choice(INTEGERS) % 2**32
            elif lie == 1:
                sizes = [rng.choice(INTEGERS) % 2**32] * 2
            elif lie == 2:
                offset = rng.choice((0, offset + 1, 2**31, rng.randrange(offset + 1)))
            elif lie == 3:
                packer = zlib.compressobj(9, wbits=-15)
                stored = packer.compress(content) + packer.flush()
                method, sizes[0] = 8, len(stored)
            elif lie == 4:
                flags = rng.randrange(2**16)
            elif lie == 5:
                crc ^= 1
            elif lie == 6:
                raw = rng.choice((b"../../x", b"/x", b"a/data.pkl", raw + b"\0x", b"", b"\xff" * 9))
            else:
                method = rng.choice((1, 8, 12, 14, 99))
        head = struct.pack("<HHHHHIIIHH", 20, flags, method, 0, 0, crc, *sizes, len(raw), 0)
        out.write(b"PK\x03\x04" + head + raw + stored)
        directory.write(b"PK\x01\x02" + struct.pack("<H", 20) + head)
        directory.write(struct.pack("<HHHII", 0, 0, 0, 0, offset % 2**32) + raw)
    listed, start = directory.getvalue(), out.tell()
    out.write(
        listed + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, count, count, len(listed), start, 0)
    )
    return out.getvalue()


def entries_of(whole: bytes) -> list[tuple[str, bytes]]:
    """Names and contents of a zip archive."""
    with zipfile.ZipFile(io.BytesIO(whole)) as found:
        return [(name, found.read(name)) for name in found.namelist()]


def mutate_archive(rng: random.Random, base: list[tuple[str, bytes]], ops: list[bytes]) -> bytes:
    """A checkpoint with a changed pickle, changed entries or a lying directory."""
    kind = rng.randrange(10)
    entries = list(base)
    if kind <= 5:
        changed = mutate_pickle(rng, ops)
        return archive([(n, changed if n.endswith("data.pkl") else c) for n, c in entries])
    if kind == 6:
        return archive(entries, rng)
    if kind == 7:
        i, j = rng.randrange(len(entries)), rng.randrange(len(entries))
        change = rng.randrange(4)
        if change == 0:
            del entries[i]
        elif change == 1:
            entries.insert(i, entries[j])
        elif change == 2:
            entries[i] = (entries[i][0], mutate_bytes(rng, entries[i][1]))
        else:
            entries[i] = (entries[i][0] + rng.choice((".pkl", "/x", "0")), entries[i][1])
        return archive(entries) if entries else b""
    return mutate_bytes(rng, archive(entries))


def edit_hdf5(rng: random.Random, file: h5py.File) -> None:
    """Change an object, a link or an attribute of a file that is open for writing."""
    names: list[str] = []
    file.visit(names.append)
    name = rng.choice(names)
    parent = file[name].parent
    item = file[name]
    kind = rng.randrange(16)
    if kind == 0:
        del file[name]
    elif kind == 1:
        del file[name]
        parent[name.rpartition("/")[2]] = h5py.SoftLink(rng.choice(("/", "/none", name, ".")))
    elif kind == 2:
        del file[name]
        parent[name.rpartition("/")[2]] = h5py.ExternalLink(rng.choice(("in.h5", "/dev/zero")), "/")
    elif kind == 3:
        group = item if isinstance(item, h5py.Group) else parent
        group[rng.choice(("loop", "surface", "again"))] = file[rng.choice(names)]
    elif kind == 4:
        group = item if isinstance(item, h5py.Group) else parent
        for _ in range(rng.choice((2, 20, 40))):
            group = group.create_group("deeper")
        group["x"] = 1
    elif kind <= 8:  # another array
        path = name
        if isinstance(item, h5py.Group):
            path = f"{name}/{rng.choice(('new', 'xs', 'done'))}"
        if path in file:
            del file[path]
        shape = rng.choice(((), (0,), (1,), (2, 2), (3,), (5,), (3, 3), (2, 0)))
        dtype = rng.choice(("u1", "i8", "f4", "f8", "f2", "?", "S3", "c16", "O", "V4", "U"))
        if dtype in ("O", "U"):
            file.create_dataset(path, shape, dtype=h5py.string_dtype())
        else:
            data = np.full(shape, rng.choice((0, 1, 255)), dtype="u1")
            values = rng.choice((data.astype(dtype) if dtype != "V4" else np.zeros(shape, "V4"),))
            if dtype[0] == "f" and rng.random() < 0.5:
                values = np.full(shape, rng.choice(FLOATS), dtype="f8")
            file[path] = values
    elif kind == 9:
        if isinstance(item, h5py.Dataset):
            del file[name]
            huge = rng.choice(((10**9,), (2**40,), (10**6, 10**6), (2**62, 2)))
            chunks = rng.choice((None, True, tuple(min(n, 1000) for n in huge)))
            if rng.random() < 0.3:
                file.create_dataset(name, huge, dtype="u1", chunks=chunks, compression="gzip")
            else:
                file.create_dataset(name, huge, dtype="u1", chunks=chunks)
    elif kind == 10:
        if isinstance(item, h5py.Dataset):
            shape = item.shape or (4,)
            del file[name]
            chunks = tuple(max(n, 1) for n in shape)
            made = file.create_dataset(name, shape, "u1", chunks=chunks, compression="gzip")
            bomb = zlib.compress(bytes(rng.choice((10, 100_000, 3_000_000))))
            made.id.write_direct_chunk((0,) * len(shape), rng.choice((bomb, b"", b"junk")))
    elif kind == 11:
        if isinstance(item, h5py.Dataset):
            shape, dtype = item.shape, item.dtype
            del file[name]
            if rng.random() < 0.5:
                external = [("in.h5", 0, h5py.h5f.UNLIMITED)]
                file.create_dataset(name, shape or (1,), dtype, external=external)
            else:
                layout = h5py.VirtualLayout(shape or (1,), dtype)
                layout[...] = h5py.VirtualSource("in.h5", names[-1], shape or (1,))
                file.create_virtual_dataset(name, layout)
    else:
        holders = [n for n in names if len(file[n].attrs)] or [""]
        owner = file[rng.choice(holders)] if holders != [""] else file
        keys = list(owner.attrs) or ["name", "classes"]
        key = rng.choice(keys)
        if kind == 12:
            owner.attrs.pop(key, None)
        elif kind == 13:
            owner.attrs[key] = rng.choice(
                (
                    1,
                    2.5,
                    np.zeros(3),
                    b"bytes",
                    ["a", "b"],
                    "[" * 20000,
                    "{}",
                    "[]",
                    "null",
                    "1e999",
                )
            )
        else:
            owner.attrs[key] = _edited_json(rng, str(owner.attrs[key]))


def _edited_json(rng: random.Random, text: str) -> str:
    """Another value of one entry."""
    import json

    try:
        content = json.loads(text)
    except ValueError:
        return rng.choice(TEXTS[:4])
    target = content
    while isinstance(target, dict) and target:
        key = rng.choice(list(target))
        if not isinstance(target[key], dict) or rng.random() < 0.3:
            if rng.random() < 0.2:
                del target[key]
            else:
                target[key] = anything(rng)
            break
        target = target[key]
    try:
        return json.dumps(content)
    except RecursionError:
        return "[" * 50000
