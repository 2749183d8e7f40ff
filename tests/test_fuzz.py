"""Hostile and broken input: one line, no code, no hang, no memory to speak of."""

import json
import os
import pickle
import resource
import struct
import tracemalloc
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import analysis.claims
import analysis.figures
import analysis.hessian
import analysis.landscape.__main__
import analysis.published
import analysis.study
import models.train
from analysis.measurements import load
from analysis.plan import load_plan
from analysis.published import read_surface
from models import CSAN, InputError, load_checkpoint, load_dataset
from models.training import _restored, _saved_state
from models.weights import read_pickle
from tests.fuzz import bases
from tests.fuzz.__main__ import OUTCOMES, fuzz
from tests.fuzz.mutations import archive, entries_of

INPUTS = 2000
MEBIBYTE = 2**20


def test_random_inputs_end_in_success_or_one_line(tmp_path):
    _, shared, done = fuzz(INPUTS, 1, float("inf"), tmp_path / "kept", quiet=True)
    assert done == INPUTS
    total = dict.fromkeys(OUTCOMES, 0)
    for i, count in enumerate(shared.counts):
        total[OUTCOMES[i % len(OUTCOMES)]] += count
    assert sum(total.values()) == INPUTS
    assert total["refused"] > INPUTS / 3
    assert total["accepted"] > INPUTS / 20
    failed = {f.name: f.read_text() for f in (tmp_path / "kept").glob("*.txt")}
    assert not failed
    assert sum(total[key] for key in OUTCOMES[2:]) == 0


@pytest.fixture
def little_memory():
    """Whatever is done takes no hundred mebibytes, resident or allocated by Python."""
    tracemalloc.start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert grown < 100 * MEBIBYTE
    assert peak < 100 * MEBIBYTE


@pytest.fixture
def refused(tmp_path, monkeypatch, little_memory):
    """Writes a file, has it read, and returns the one line that refuses it."""
    monkeypatch.chdir(tmp_path)

    def refuse(read, name, content):
        Path(name).write_bytes(content)
        with pytest.raises(InputError) as error:
            read(Path(name))
        assert os.listdir() == [name], "nothing else is written, no code has run"
        assert Path(name).read_bytes() == content
        assert str(error.value).startswith(f"{name}: ")
        assert "\n" not in str(error.value)
        return str(error.value)

    return refuse


# --- archives and pickles


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
def test_archives_are_refused(refused, case):
    content, complaint = ARCHIVES[case]
    assert complaint in refused(read_pickle, "bad.pt", content)


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


# --- checkpoints


ARCHITECTURES = {
    "dim": (10**9, "dim"),
    "depth": (10**9, "depth"),
    "image_size": (10**9, "image_size"),
    "window": (10**30, "window: 1000000"),
    "head_window": (True, "head_window"),
    "heads": ("1", "heads: '1'"),
    "classes": (True, "classes: True"),
    "channels": (float("nan"), "channels: nan"),
    "mlp_ratio": (float("nan"), "mlp_ratio: nan"),
    "stochastic_depth": (1.0, "stochastic_depth: 1.0"),
    "border": ([[]], "border: a list"),
    "pooling": ("../x", "pooling: '../x'"),
    "patch_size": (0, "patch_size: 0"),
    "unknown": (1, "unknown"),
}


@pytest.mark.parametrize("key", ARCHITECTURES)
def test_architectures_of_strangers_are_refused(refused, key):
    value, complaint = ARCHITECTURES[key]
    content = bases.checkpoint_content()
    content["architecture"] = content["architecture"] | {key: value}
    assert complaint in refused(load_checkpoint, "bad.pt", bases.saved(content))


def test_sizes_that_fit_each_other_but_not_the_weights_are_refused(refused):
    content = bases.checkpoint_content()
    content["architecture"] = content["architecture"] | {"dim": 4096, "image_size": 64}
    complaint = refused(load_checkpoint, "bad.pt", bases.saved(content))
    assert "do not fit the architecture" in complaint


def test_weights_that_share_their_bytes_are_refused(refused):
    architecture = bases.ARCHITECTURE | {"dim": 64, "depth": 40, "mlp_ratio": 4.0}
    content = bases.checkpoint_content() | {"architecture": architecture}
    bytes_of_all = torch.zeros(4 * 64 * 64)
    content["state_dict"] = {
        name: bytes_of_all[: t.numel()].view(t.shape)
        for name, t in CSAN(**architecture).state_dict().items()
    }
    assert "share their bytes" in refused(load_checkpoint, "bad.pt", bases.saved(content))


def test_attention_of_absurd_size_is_refused(little_memory):
    with pytest.raises(InputError, match=r"image_size: 4096 .* attention scores"):
        CSAN(**bases.ARCHITECTURE | {"image_size": 4096})
    with pytest.raises(InputError, match=r"dim: 100000 .* weights"):
        CSAN(**bases.ARCHITECTURE | {"dim": 100_000})


CONTENTS = {
    "epochs": ("recipe", "epochs", 10**18, "epochs: 1000000000000000000"),
    "no epochs": ("recipe", "epochs", -1, "epochs: -1"),
    "rate": ("recipe", "learning_rate", float("nan"), "learning_rate: nan"),
    "decay": ("recipe", "weight_decay", "0.1", "weight_decay: '0.1'"),
    "batch": ("recipe", "batch_size", 0, "batch_size: 0"),
    "smoothing": ("recipe", "label_smoothing", 2.0, "label_smoothing: 2.0"),
    "flip": ("recipe", "flip", 1, "flip: 1"),
    "clip": ("recipe", "clip_norm", [1], "clip_norm: a list"),
    "history": ("history", "train_nll", ["x", 1.0, 2.0], "train_nll"),
    "column": ("history", "test_error", [0.5], "test_error"),
    "empty": ("history", "epoch", [], "epoch"),
    "version": ("versions", "torch", 2, "versions"),
    "seed": (None, "seed", -1, "seed: -1"),
    "large seed": (None, "seed", 2**70, "seed: 1180591620717411303424"),
    "epoch": (None, "epoch", 3, "epoch: 3"),
    "bool": (None, "epoch", True, "epoch: True"),
    "images": (None, "images", -5, "images: -5"),
    "dataset": (None, "dataset", "a\nb", "dataset"),
    "formula": (None, "dataset", "$\\frac{$", "dataset"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_values_of_strangers_are_refused(refused, case):
    part, key, value, complaint = CONTENTS[case]
    content = bases.checkpoint_content()
    if part is None:
        content[key] = value
    else:
        content[part] = content[part] | {key: value}
    assert complaint in refused(load_checkpoint, "bad.pt", bases.saved(content))


def test_states_of_strangers_are_refused(refused):
    start = load_checkpoint_of(bases.checkpoint_content() | {"epoch": 0})
    optimizer = torch.optim.AdamW(start.model.parameters(), fused=True)
    content = bases.resume_content(start, optimizer)

    def resume(path):
        return _restored(_saved_state(path, start, []), path, start, optimizer)

    moments = dict(content["optimizer"]["state"])
    for changed in (
        {"epoch": 10**18},
        {"epoch": float("nan")},
        {"history": {"epoch": [1]}},
        {"model": {}},
        {"optimizer": {"state": {}}},
        {"optimizer": {"state": moments | {0: {"step": torch.zeros(1)}}}},
        {"optimizer": []},
    ):
        assert "damaged" in refused(resume, "resume.pt", bases.saved(content | changed))
    assert "other options" in refused(resume, "resume.pt", bases.saved(content | {"run": "x"}))
    Path("resume.pt").write_bytes(bases.saved(content))
    assert resume(Path("resume.pt")).epoch == 1


def load_checkpoint_of(content):
    Path("resume.pt").write_bytes(bases.saved(content))
    return load_checkpoint("resume.pt")


# --- HDF5


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
    packed = b"".join(packer.compress(bytes(MEBIBYTE)) for _ in range(500)) + packer.flush()
    made.id.write_direct_chunk((0,), packed)


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


# --- commands


HOSTILE = ["loop", "bomb", "nested", "path", "lengths", "external link"]


@pytest.mark.parametrize("command", [analysis.figures, analysis.claims])
@pytest.mark.parametrize("case", HOSTILE)
def test_figures_and_claims_refuse_hostile_files(tmp_path, monkeypatch, call_module, command, case):
    monkeypatch.chdir(tmp_path)
    Path("found").mkdir()
    Path("found/bad.h5").write_bytes(edited(FILES[case][0]))
    code, _, err = call_module(command, "--measurements", "found", "--out", "figures")
    assert code == 2
    assert err.startswith("error: found/bad.h5: ")
    assert err.count("\n") == 1
    assert [p.name for p in Path().rglob("*") if p.is_file() and p.suffix != ".png"] == ["bad.h5"]


def test_figures_are_drawn_of_the_files_that_mutations_start_from(
    tmp_path, monkeypatch, call_module
):
    """Or nothing would be tested."""
    monkeypatch.chdir(tmp_path)
    bases.write_measurements(tmp_path)
    code, out, err = call_module(analysis.figures, "--measurements", ".", "--out", "figures")
    assert code == 0, err
    drawn = {Path(line.split()[-1]).name for line in out.splitlines()}
    assert {"landscape_digits_surfaces.png", "claims_digits.png", "nll_digits.png"} <= drawn


LANDSCAPE, STUDY = analysis.landscape.__main__, analysis.study
WORDS = {
    "tol": (analysis.hessian, "--tol nan", "tol: nan"),
    "infinite tol": (analysis.hessian, "--tol inf", "tol: inf"),
    "negative tol": (analysis.hessian, "--tol -1", "tol: -1.0"),
    "batches": (analysis.hessian, f"--batches {10**12}", f"batches: {10**12}"),
    "steps": (analysis.hessian, f"--steps {10**100}", "steps: 1000"),
    "seed": (analysis.hessian, f"--seed {2**63}", "seed: 9223372036854775808"),
    "digits": (analysis.hessian, f"--seed {'9' * 5000}", "seed"),
    "span": (LANDSCAPE, "--span inf", "span: inf"),
    "no span": (LANDSCAPE, "--span nan", "span: nan"),
    "adaptive": (LANDSCAPE, "--adaptive nan", "adaptive: nan"),
    "infinite": (LANDSCAPE, "--adaptive inf", "adaptive: inf"),
    "points": (LANDSCAPE, f"--points {10**9 + 1}", "points: 1000000001"),
    "rate": (STUDY, "digits --rate nan", "rate: nan"),
    "infinite rate": (STUDY, "digits --rate inf", "rate: inf"),
    "processes": (STUDY, f"digits --processes {10**9}", "processes: 1000000000"),
    "epochs": (models.train, f"--out x.pt --epochs {10**18}", "epochs: 1000000000000000000"),
    "dim": (models.train, f"--out x.pt --dim {10**30}", "dim"),
    "depth": (models.train, f"--out x.pt --depth {10**9}", "depth: 1000000000"),
    "large seed": (models.train, f"--out x.pt --seed {10**40}", "seed"),
    "table": (analysis.published, "table.csv", "table.csv"),
}


@pytest.mark.parametrize("case", WORDS)
def test_absurd_options_are_one_line(tmp_path, monkeypatch, call_module, little_memory, case):
    monkeypatch.chdir(tmp_path)
    module, words, complaint = WORDS[case]
    code, _, err = call_module(module, *words.split())
    assert code == 2
    assert complaint in err
    assert err.count("\n") == 1
    assert os.listdir() == []


STUDIES = {
    "nested": ("x = " + "[" * 100_000, "not a TOML file"),
    "digits": (f"threads = {'9' * 5000}", "not a TOML file"),
    "threads": (f"threads = {10**30}\n[[grid]]\nout='a.pt'", "threads"),
    "bool": ("threads = true\n[[grid]]\nout='a.pt'", "threads"),
    "many": (
        "[[grid]]\nout='{seed}.pt'\n"
        + "\n".join(f"{k} = [{', '.join('1' * 1000)}]" for k in ("seed", "window", "dim", "depth")),
        "1000000000000 trainings",
    ),
    "none": ("[[grid]]\nout='a.pt'\nwindow=[]", "0 trainings"),
    "format": ("[[grid]]\nout='{seed:>999999999}.pt'\nseed=1", "out"),
    "class": ("[[grid]]\nout='{seed.__class__}'\nseed=1", "out"),
    "help": ("[[grid]]\nout='a.pt'\nhelp=true", "'help'"),
    "disguise": ("[[grid]]\nout='a.pt'\ndataset='--help'", "'--help'"),
    "NUL": ('[[grid]]\nout="a\\u0000b.pt"', "out"),
    "command": ("[[grid]]\nout='a.pt'\n[[measure]]\ncommand=['nll']", "command = a list"),
    "measure": ("[[grid]]\nout='a.pt'\nmeasure=[{x=1}]", "measure names a dict"),
    "date": ("[[grid]]\nout='a.pt'\nseed=1979-05-27", "'seed'"),
    "dim": (f"[[grid]]\nout='a.pt'\ndim={10**9}", "dim"),
    "images": ("[[grid]]\nout='a.pt'\nimages=-1", "images: -1"),
}


@pytest.mark.parametrize("case", STUDIES)
def test_studies_of_strangers_are_refused(refused, case):
    content, complaint = STUDIES[case]
    found = refused(lambda path: load_plan(str(path)), "bad.toml", content.encode())
    assert complaint in found


TABLES = {
    "binary": b"\x1f\x8b\x08\x00" + bytes(50),
    "nan": b"nan,0,1,1,1\n0,0,1,1,1\n",
    "infinite": b"inf,0,1,1,1\n0,0,1,1,1\n",
    "point": b"0,0,1,1,1\n",
    "line": b"0,0,1,1,1\n1,0,1,1,1\n",
    "holes": b"0,0,1,1,1\n1,1,1,1,1\n",
    "twice": b"0,0,1,1,1\n" * 4,
    "columns": b"0,0\n",
    "ragged": b"0,0,1,1,1\n0\n",
    "digits": b"9" * 100_000,
    "empty": b"",
}


@pytest.mark.parametrize("case", TABLES)
def test_tables_of_strangers_are_refused(refused, case):
    refused(read_surface, "bad.csv", TABLES[case])


def test_packed_tables_are_not_unpacked(refused):
    import gzip

    refused(read_surface, "bad.csv.gz", gzip.compress(bases.TABLE.encode()))
