"""HDF5 files that link, inflate, nest, or lie."""

import json
import struct
import zlib

import h5py
import numpy as np
import pytest

from analysis.measurements.files import load
from lossgeometry import InputError
from models import load_dataset
from tests.fuzz import bases
from tests.hostile import MEBIBYTE


def edited(edit, image=None):
    """A measurement file, changed by `edit`."""
    with h5py.File.in_memory(image or bases.measurement_file()) as file:
        edit(file)
        file.flush()
        return file.id.get_file_image()


def replace(name, **options):
    def edit(file):
        del file[name]
        file.create_dataset(name, **options)

    return edit


def link(name, target):
    def edit(file):
        del file[name]
        file[name] = target

    return edit


def bomb(file):
    del file["history/epoch"]
    made = file.create_dataset("history/epoch", (3,), "f8", chunks=(3,), compression="gzip")
    packer = zlib.compressobj()
    first, again = (
        packer.compress(bytes(MEBIBYTE)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2)
    )
    made.id.write_direct_chunk((0,), first + 499 * again + packer.flush())


def loop(file):
    file["history/again"] = file["history"]


def deep(file):
    group = file["history"]
    for _ in range(100):
        group = group.create_group("deeper")


def virtual(file):
    del file["history/epoch"]
    layout = h5py.VirtualLayout((3,), "f8")
    layout[...] = h5py.VirtualSource("/dev/zero", "x", (3,))
    file.create_virtual_dataset("history/epoch", layout)


def attribute(key, value):
    def edit(file):
        file["history"].attrs[key] = value

    return edit


def named_type(file):
    file["type"] = h5py.string_dtype()
    value = file["history"].attrs["checkpoint"]
    del file["history"].attrs["checkpoint"]
    file["history"].attrs.create("checkpoint", value, dtype=file["type"])


def described(**changes):
    return attribute("checkpoint", json.dumps(bases.description() | changes))


def heap(index, length):
    """A file whose first heap has a first object like that."""
    content = bytearray(bases.measurement_file())
    start = content.find(b"GCOL")
    content[start + 5] = 1  # reserved, and not looked at by the library
    content[start + 16 : start + 32] = struct.pack("<HHIQ", index, 1, 0, length)
    return bytes(content)


@pytest.mark.parametrize(("index", "length"), [(0, 0), (1, 2**64 - 1), (1, 2**64 - 16), (0, 2**63)])
def test_heaps_without_end_are_refused(tmp_path, index, length):
    path = tmp_path / "in.h5"
    path.write_bytes(heap(index, length))
    with pytest.raises(InputError, match="it has a heap without end"):
        load(path, "history")


EPOCH = "history/epoch"
FILES = {
    "external link": (link(EPOCH, h5py.ExternalLink("/etc/passwd", "/")), "link to somewhere else"),
    "soft link": (link(EPOCH, h5py.SoftLink("/history/train_nll")), "link to somewhere else"),
    "type elsewhere": (named_type, "the attribute checkpoint has its type elsewhere"),
    "group elsewhere": (link("history", h5py.SoftLink("/outcomes")), "link to somewhere else"),
    "external storage": (
        replace(EPOCH, shape=(3,), dtype="f8", external=[("/etc/passwd", 0, 24)]),
        "lies in other files",
    ),
    "virtual": (virtual, "lies in other files"),
    "huge": (replace(EPOCH, shape=(10**15,), dtype="f8", chunks=(1000,)), "too large"),
    "no bytes": (replace(EPOCH, shape=(10**6,), dtype="f8"), "of 8000000 bytes has 0"),
    "no chunks": (replace(EPOCH, shape=(10**6,), dtype="f8", chunks=(1000,)), "0 chunks of 1000"),
    "large chunk": (
        replace(EPOCH, shape=(3,), dtype="f8", chunks=(10**8,), maxshape=(None,)),
        "large",
    ),
    "bomb": (bomb, "inflates to more"),
    "filter": (replace(EPOCH, data=np.zeros(100), compression="lzf"), "something else than gzip"),
    "text": (replace(EPOCH, data="x"), "no array of numbers"),
    "objects": (replace(EPOCH, data=["x"], dtype=h5py.string_dtype()), "no array of numbers"),
    "references": (replace(EPOCH, shape=(3,), dtype=h5py.ref_dtype), "no array of numbers"),
    "compound": (replace(EPOCH, data=np.zeros(3, dtype="f8,f8")), "no array of numbers"),
    "complex": (replace(EPOCH, data=np.zeros(3, dtype=complex)), "no array of numbers"),
    "null": (replace(EPOCH, data=h5py.Empty("f8")), "is empty"),
    "loop": (loop, "there twice"),
    "deep": (deep, "16 deep"),
    "lengths": (replace("history/train_nll", data=np.zeros(4)), "train_nll: 'float64 (4,)'"),
    "flags": (replace("history/train_nll", data=np.zeros(3, bool)), "train_nll: 'bool (3,)'"),
    "too large": (replace("history/train_nll", data=np.full(3, 1e200)), "train_nll: 1e+200"),
    "backwards": (replace(EPOCH, data=np.zeros(3)), "increasing"),
    "nested": (attribute("options", "[" * 100_000), "recursion"),
    "no dictionary": (attribute("options", "[1]"), "options: a list"),
    "number": (attribute("options", 5), "no text"),
    "list": (attribute("versions", ["{}"]), "no text"),
    "bytes": (attribute("date", np.void(b"x")), "no text"),
    "digits": (attribute("options", "9" * 5000), "4300"),
    "no architecture": (described(architecture=None), "architecture"),
    "window": (described(architecture=bases.ARCHITECTURE | {"window": "3"}), "window: '3'"),
    "path": (described(architecture=bases.ARCHITECTURE | {"border": "x/../../y"}), "border"),
    "recipe": (described(recipe=bases.RECIPE | {"epochs": 1e9}), "epochs"),
    "dataset": (described(dataset="\x1b[31m"), "dataset"),
    "epoch": (described(epoch=None), "epoch"),
}


@pytest.mark.parametrize("case", FILES)
def test_measurement_files_are_refused(refused, case):
    edit, complaint = FILES[case]
    content = edited(edit)
    assert complaint in refused(lambda path: load(path, "history"), "bad.h5", content)


def test_large_attributes_are_refused(refused):
    def edit(file):
        file["history"].attrs.create("options", "x" * 60_000, dtype=h5py.string_dtype())
        file["history"].attrs.create("date", np.zeros(4000), dtype="f8")

    assert "bad.h5" in refused(lambda path: load(path, "history"), "bad.h5", edited(edit))


def test_files_that_are_not_edited_are_read(tmp_path):
    for version in ("earliest", "latest"):
        path = tmp_path / f"{version}.h5"
        path.write_bytes(bases.measurement_file(version))
        for name in bases.OPTIONS:
            assert load(path, name)


def test_dataset_files_are_refused(refused):
    image = bases.dataset_file()
    for edit, complaint in (
        (link("train/images", h5py.ExternalLink("/etc/passwd", "/")), "link to somewhere else"),
        (replace("train/images", shape=(10**9, 8, 8, 1), dtype="u1", chunks=True), "too large"),
        (replace("train/labels", shape=(10**9,), dtype="u1"), "has 0"),
        (lambda file: file.attrs.__setitem__("name", [1, 2]), "no text"),
        (lambda file: file.attrs.__setitem__("classes", "abc"), "no list of texts"),
        (lambda file: file.attrs.__setitem__("classes", np.zeros(3)), "no list of texts"),
    ):
        content = edited(edit, image)
        assert complaint in refused(lambda path: load_dataset(path, "test"), "bad.h5", content)
