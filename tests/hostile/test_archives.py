"""Archives and pickles that lie, compress, or run code."""

import argparse
import os
import pickle
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from models.reading.weights import Unread, read_pickle
from tests.fuzz import bases
from tests.fuzz.mutations import archive, entries_of
from tests.hostile import MEBIBYTE


def pickled(content):
    """An archive around a pickle."""
    return archive([("x/data.pkl", content), ("x/version", b"3\n")])


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


class RunsCode:
    def __reduce__(self):
        return (os.system, ("touch executed",))


STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
TENSOR = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE
HOOKS = b"\x89ccollections\nOrderedDict\n)RtR."


def tensor(elements, offset, size, stride):
    """A pickle of one tensor in a storage of so many elements."""

    def number(n):
        return b"\x8a\x09" + n.to_bytes(9, "little", signed=True)

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    return (
        TENSOR + number(elements) + b"tQ" + number(offset) + numbers(size) + numbers(stride) + HOOKS
    )


def with_storage(content, stored=16):
    return archive([("x/data.pkl", content), ("x/data/0", bytes(stored))])


HUGE = 10**12
ARCHIVES = {
    "code": (pickled(pickle.dumps(RunsCode(), 2)), "it would run code: 'posix.system'"),
    "a list": (pickled(b"\x80\x02cbuiltins\nlist\n)R."), "it would run code: 'builtins.list'"),
    "bytearray": (
        pickled(b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x10\x85R."),
        "would run code",
    ),
    "tensor class": (pickled(b"\x80\x02ctorch\nFloatTensor\nK\x01\x85R."), "it would run code"),
    "protocol": (pickled(b"\x80\x04N."), "protocol"),
    "memo": (pickled(b"\x80\x02]r\xff\xff\xff\x7f0."), "damaged"),
    "length": (pickled(b"\x80\x02\x96" + (2**40).to_bytes(8, "little") + b"."), "damaged"),
    "attributes": (
        pickled(b"\x80\x02ccollections\nOrderedDict\n)R}" + text("items") + b"NsbN."),
        "attributes",
    ),
    "keys": (pickled(b"\x80\x02}G\0\0\0\0\0\0\0\0Ns."), "keys are neither text"),
    "storage": (with_storage(tensor(HUGE, 0, [4], [1])), "elements in 16 bytes"),
    "short storage": (with_storage(tensor(4, 0, [4], [1]), 15), "elements in 15 bytes"),
    "size": (with_storage(tensor(4, 0, [HUGE], [1])), "more elements"),
    "stride 0": (with_storage(tensor(4, 0, [HUGE], [0])), "more elements"),
    "offset": (with_storage(tensor(4, 1, [4], [1])), "more elements"),
    "stride": (with_storage(tensor(4, 0, [2], [HUGE])), "more elements"),
    "negative size": (with_storage(tensor(4, 0, [-4], [1])), "negative"),
    "negative offset": (with_storage(tensor(4, -1, [1], [1])), "negative"),
    "negative stride": (with_storage(tensor(4, 3, [4], [-1])), "negative"),
    "dimensions": (with_storage(tensor(4, 0, [1] * 200, [1] * 200)), "more elements"),
    "two kinds": (
        with_storage(
            b"\x80\x02](" + STORAGE + b"K\x04tQ" + STORAGE.replace(b"Float", b"Int") + b"K\x04tQe."
        ),
        "two kinds",
    ),
    "no storage": (pickled(tensor(4, 0, [4], [1])), "not in it"),
    "empty": (b"", "not a zip archive"),
    "text": (b"weights" * 100, "not a zip archive"),
    "no pickle": (archive([("x/version", b"3")]), "data.pkl of 0 bytes"),
    "outside": (archive([("x/data.pkl", b"\x80\x02N."), ("../x", b"")]), "none of torch.save's"),
    "script": (archive([("x/data.pkl", b"\x80\x02N."), ("x/constants.pkl", b"")]), "none of"),
    "twice": (archive([("x/data.pkl", b"\x80\x02N.")] * 2), "there twice"),
    "large pickle": (pickled(b"\x80\x02N." + bytes(5 * MEBIBYTE)), "data.pkl of"),
}


@pytest.mark.parametrize("case", ARCHIVES)
@pytest.mark.parametrize("weights", [True, False])
def test_archives_are_refused(refused, case, weights):
    content, complaint = ARCHIVES[case]
    assert complaint in refused(partial(read_pickle, weights=weights), "bad.pt", content)


INERT = {  # what is read where objects beside the weights are: as something that does nothing
    "code": {},
    "a list": {},
    "bytearray": {},
    "tensor class": {},
    "attributes": None,
    "keys": {},
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_with_stubs_archives_are_refused_or_inert(refused, case):
    content, complaint = ARCHIVES[case]
    if case not in INERT:
        assert complaint in refused(partial(read_pickle, stubs=True), "bad.pt", content)
        return
    Path("bad.pt").write_bytes(content)
    assert read_pickle(Path("bad.pt"), stubs=True) == INERT[case]
    assert os.listdir() == ["bad.pt"], "no code has run"


ONE = tensor(4, 0, [4], [1])[:-1]  # a tensor on the stack
OBJECT = b"cany\nthing\n"
MISUSED = {
    "arguments": (ONE + b"q\x00" + OBJECT + b"h\x00R.", "something else than arguments"),
    "no arguments": (b"\x80\x02" + OBJECT + b"]R.", "something else than arguments"),
    "called": (ONE + b")R.", "damaged"),
    "items": (ONE + b"K\x00K\x01s.", "items of something else than a dict"),
    "items of a class": (b"\x80\x02" + OBJECT + b"K\x00K\x01s.", "items of something else"),
    "appended to": (ONE + b"K\x00a.", "damaged"),
    "state": (ONE + b"}b.", "an object with attributes"),
    "state of a class": (b"\x80\x02" + OBJECT + b"}b.", "an object with attributes"),
    "storage": (b"\x80\x02" + STORAGE + b"K\x04tQ" + b"K\x00K\x01s.", "items of something else"),
    "another kind": (
        TENSOR.replace(b"_v2", b"_v3") + b"K\x04tQ)tR.",
        "a tensor of a kind that is not read: 'torch._utils._rebuild_tensor_v3'",
    ),
    "order": (b"\x80\x02N.", "in another order"),
}


@pytest.mark.parametrize("case", MISUSED)
def test_with_stubs_nothing_is_done_to_tensors_and_classes(refused, case):
    content, complaint = MISUSED[case]
    entries = [("x/data.pkl", content), ("x/data/0", bytes(16))]
    if case == "order":
        entries.append(("x/byteorder", b"big" if sys.byteorder == "little" else b"little"))
    assert complaint in refused(partial(read_pickle, stubs=True), "bad.pt", archive(entries))


def test_a_state_of_many_objects_is_there_once(tmp_path, little_memory):
    state = (
        b"}q\x00(" + b"".join(b"J" + i.to_bytes(4, "little") + b"N" for i in range(50_000)) + b"u"
    )
    content = b"\x80\x02" + OBJECT + b"q\x01" + state + b"](" + b"h\x01)\x81h\x00b" * 50_000 + b"e."
    (tmp_path / "x.pt").write_bytes(pickled(content))
    found = read_pickle(tmp_path / "x.pt", stubs=True)
    assert len(found) == 50_000
    assert found[0]["__dict__"] is found[-1]["__dict__"]


@pytest.mark.parametrize("lie", range(60))
def test_lying_directories_are_refused_or_harmless(refused, lie):
    import random

    whole = bases.saved(bases.checkpoint_content())
    lying = archive(entries_of(whole), random.Random(lie))
    if lying != archive(entries_of(whole)):
        refused(read_pickle, "bad.pt", lying)


def test_too_many_entries_are_refused(refused):
    entries = [("x/data.pkl", b"\x80\x02N.")]
    directory = archive(entries)[:-22]
    end = b"PK\x05\x06" + bytes(8) + (2**31).to_bytes(4, "little") + bytes(6)
    assert "list of entries" in refused(read_pickle, "bad.pt", directory + end)


def test_a_compressed_archive_is_refused(refused):
    import io
    import zipfile

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", b"\x80\x02N." + bytes(MEBIBYTE))
    assert "compressed" in refused(read_pickle, "bad.pt", out.getvalue())


def test_weights_of_torch_save_are_read(tmp_path):
    layer = torch.nn.BatchNorm2d(3).bfloat16()
    shared = torch.arange(6.0)
    content = {"state": layer.state_dict(), "parts": [shared[:2], shared[2:].view(2, 2).T]}
    content |= {"parameter": layer.weight, "n": [1, 2**40, None, True, "é", (1.5,)]}
    torch.save(content, tmp_path / "x.pt")
    found = read_pickle(tmp_path / "x.pt")
    torch.testing.assert_close(found["state"], layer.state_dict())
    torch.testing.assert_close(found["parts"], content["parts"])
    torch.testing.assert_close(found["parameter"], layer.weight)
    assert found["n"] == content["n"]
    without = read_pickle(tmp_path / "x.pt", weights=False)
    assert without["n"] == content["n"]
    assert isinstance(without["parameter"], Unread)
    assert set(without["state"]) == set(found["state"])


def test_numbers_of_every_kind_are_read_beside_other_objects(tmp_path):
    kinds = (
        "float64 float32 float16 bfloat16 bool int64 int32 int16 int8 uint8 complex64 complex128"
    )
    content = {kind: torch.eye(3).to(getattr(torch, kind)) for kind in kinds.split()}
    content |= {f"no {kind}": torch.empty(0, dtype=found.dtype) for kind, found in content.items()}
    torch.save(content | {"object": argparse.Namespace(lr=0.1)}, tmp_path / "x.pt")
    found = read_pickle(tmp_path / "x.pt", stubs=True)
    torch.testing.assert_close({name: found[name] for name in content}, content, rtol=0, atol=0)
