import dataclasses
import errno
import fcntl
import json
import multiprocessing
import os
import threading

import h5py
import numpy as np
import pytest

from analysis.measurements.files import collect, collect_each, load, measurement_file
from analysis.measurements.recording import store, stored
from lossgeometry import InputError, open_measurement
from models import files, load_checkpoint, load_dataset
from models.files import locked, replacing
from models.train import Options, untrained
from tests.measured import write

ARRAYS = {"values": np.arange(3.0), "part/holes": np.array([np.nan, np.inf]), "scalar": np.array(2)}
OPTIONS = {"seed": 3, "objective": "train", "split": "train", "tol": 1e-3}


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "tiny.pt"
    start = untrained(Options(out=path, dim=3, depth=1), load_dataset("digits").first(4))
    start.save(path)
    return load_checkpoint(path)


def test_what_was_stored_is_read_again(checkpoint):
    store("some/train", ARRAYS, checkpoint=checkpoint, options=OPTIONS)
    found = stored("some/train", checkpoint=checkpoint, options=OPTIONS)
    assert found.arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found.arrays[name], array)
    assert found.options == OPTIONS
    assert found.checkpoint["sha256"] == checkpoint.sha256
    assert found.checkpoint["architecture"] == checkpoint.architecture
    assert found.checkpoint["recipe"] == checkpoint.recipe.options()
    assert found.versions["torch"]
    assert found.date.endswith("+00:00")


def test_other_options_or_other_weights_are_another_measurement(checkpoint):
    store("some/train", ARRAYS, checkpoint=checkpoint, options=OPTIONS)
    assert not stored("some/train", checkpoint=checkpoint, options=OPTIONS | {"seed": 4})
    for seed, enough in ((2, True), (4, False)):
        asked = OPTIONS | {"seed": seed}
        found = stored("some/train", checkpoint=checkpoint, options=asked, at_least=["seed"])
        assert (found is not None) == enough
    retrained = dataclasses.replace(checkpoint, sha256="0" * 64)
    assert not stored("some/train", checkpoint=retrained, options=OPTIONS)
    assert not stored("some/clean", checkpoint=checkpoint, options=OPTIONS)


def test_measurements_replace_their_namesake_and_nothing_else(checkpoint):
    for name in ("one", "two"):
        store(name, ARRAYS, checkpoint=checkpoint, options=OPTIONS)
    store("one", {"new": np.zeros(1)}, checkpoint=checkpoint, options=OPTIONS)
    path = measurement_file(checkpoint.path)
    assert load(path, "one").arrays.keys() == {"new"}
    assert load(path, "two").arrays.keys() == ARRAYS.keys()


def landscape_arrays():
    grid = np.linspace(-1, 1, 3)
    arrays = {f"surface/{name}": grid + grid[:, None] for name in ("nll", "error")}
    arrays |= {"surface/xs": grid, "surface/ys": grid, "surface/evaluated": np.ones((3, 3), bool)}
    arrays |= {"surface/settings": np.array(b'{"seed": 0}'), "cut/names": np.array([b"a", b"b"])}
    return arrays | {"cut/low": -np.ones(2), "cut/high": np.ones(2), "cut/points": np.zeros((0, 2))}


def test_arrays_say_what_they_are_whatever_is_stored_later(checkpoint):
    arrays, how = landscape_arrays(), dict(checkpoint=checkpoint, options=OPTIONS)
    store("unfinished/landscape/train", arrays, **how)
    store("landscape/train", arrays, in_place_of="unfinished/landscape/train", **how)
    store("another", ARRAYS, **how)
    path = measurement_file(checkpoint.path)
    with h5py.File(path) as file:
        assert sorted(file) == ["another", "landscape"]  # and nothing empty
        group = file["landscape/train"]
        assert group.attrs["format"] == "lossgeometry, version 2"
        assert group.attrs["description"].startswith("The loss along lines and on a surface")
        error = group["surface/error"]
        assert error.attrs["units"] == "fraction"
        assert [dim.label for dim in error.dims] == ["ys", "xs"]
        assert error.dims[1][0] == group["surface/xs"]
    surface = open_measurement(path, "landscape/train/surface")
    np.testing.assert_array_equal(surface["nll"].sel(ys=0.0), arrays["surface/nll"][1])
    tree = open_measurement(path)
    assert tree["landscape/train"].attrs["options"] == OPTIONS
    assert tree["landscape/train/cut/names"].values.tolist() == ["a", "b"]
    assert tree["another/part/holes"].shape == (2,)


def test_files_without_a_format_are_read_by_the_names_of_today(tmp_path):
    path, new = tmp_path / "old.h5", landscape_arrays()
    new |= {"lines/0/xs": np.ones(3), "lines/0/nll": np.ones(3), "cutting/fit/done": np.ones(2)}
    old = {name: array for name, array in new.items() if name not in ("cut/low", "cut/high")}
    old["surface/done"], old["cut/marks"] = old.pop("surface/evaluated"), old.pop("cut/points")
    old["surface/attributes"] = np.frombuffer(old.pop("surface/settings").item(), np.uint8)
    ranges = {"names": ["a", "b"], "low": [-1.0, -1.0], "high": [1.0, 1.0]}
    del old["cut/names"]
    old["cut/ranges"] = np.frombuffer(json.dumps(ranges).encode(), np.uint8)
    for name in ("landscape/train", "unfinished/landscape_pca/train"):
        write(path, name, old)
        found = load(path, name).arrays
        assert found.keys() == new.keys()
        for key, array in new.items():
            assert found[key].dtype == array.dtype, key
            np.testing.assert_array_equal(found[key], array)
    rows = {"eigenvalues": np.ones((4, 2)), "done": np.ones(4, bool)}
    write(path, "unfinished/hessian/train", rows)
    assert load(path, "unfinished/hessian/train").arrays.keys() == rows.keys()
    write(path, "hessian/train", {"together": np.int64(3)})
    assert load(path, "hessian/train").arrays["batches_at_a_time"] == 3


def test_files_of_a_later_format_are_refused(checkpoint):
    store("one", ARRAYS, checkpoint=checkpoint, options=OPTIONS)
    path = measurement_file(checkpoint.path)
    with h5py.File(path, "a") as file:
        file["one"].attrs["format"] = "lossgeometry, version 3"
    with pytest.raises(InputError, match=r"one: 'lossgeometry, version 3' found, expected 'l"):
        load(path, "one")


def test_failure_while_writing_leaves_the_file_as_it_was(checkpoint, monkeypatch):
    store("one", ARRAYS, checkpoint=checkpoint, options=OPTIONS)
    path = measurement_file(checkpoint.path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        store("one", {"bad": np.array([object()])}, checkpoint=checkpoint, options=OPTIONS)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk is full")))
    with pytest.raises(OSError, match="disk is full"):
        store("one", {"new": np.zeros(1)}, checkpoint=checkpoint, options=OPTIONS)
    assert path.read_bytes() == before
    assert {p.suffix for p in path.parent.iterdir()} <= {".pt", ".h5", ".lock"}


def _store_many(path, names):
    checkpoint = load_checkpoint(path)
    for name in names:
        store(name, ARRAYS, checkpoint=checkpoint, options=OPTIONS)


def test_two_processes_do_not_lose_each_others_measurements(checkpoint):
    names = [[f"{who}{i}" for i in range(5)] for who in "ab"]  # a process each
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_store_many, args=(checkpoint.path, part)) for part in names
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    with h5py.File(measurement_file(checkpoint.path)) as file:
        assert sorted(file) == sorted(names[0] + names[1])


def test_collects_measurements_from_files_and_folders(checkpoint):
    path = measurement_file(checkpoint.path)
    store("one", ARRAYS, checkpoint=checkpoint, options=OPTIONS)
    store("unfinished/two", ARRAYS, checkpoint=checkpoint, options=OPTIONS)
    assert [m.path for m in collect([path.parent], "one")] == [path]
    assert [m.path for m in collect([path], "one")] == [path]
    again = path.parent / ".." / path.parent.name
    assert len(collect([path, path.parent, again], "one")) == 1
    assert collect([path.parent], "two") == []
    store("two", ARRAYS, checkpoint=checkpoint, options=OPTIONS, in_place_of="unfinished/two")
    assert load(path, "unfinished/two") is None
    assert load(path, "two")


def test_what_is_beside_a_damaged_measurement_is_collected(checkpoint):
    path = measurement_file(checkpoint.path)
    for name in ("one", "two", "three"):
        store(name, ARRAYS, checkpoint=checkpoint, options=OPTIONS)
    with h5py.File(path, "a") as file:
        file["two"].attrs["options"] = "["
    names, left_out = ["three", "two", "one"], []
    found = collect_each([path.parent], names, left_out)
    kept = {name: [m.name for m in members] for name, members in found.items()}
    assert kept == {"three": ["three"], "two": [], "one": ["one"]}
    (error,) = left_out
    assert str(error).startswith(f"{path}: not a usable")
    with pytest.raises(InputError, match=f"^{path}: not a usable"):
        collect_each([path.parent], names)


def test_damaged_files_are_named(checkpoint):
    path = measurement_file(checkpoint.path)
    path.write_bytes(b"not HDF5")
    with pytest.raises(InputError, match=f"^{path}: not a usable"):
        load(path, "one")
    with pytest.raises(InputError, match=f"^{path}: not a usable"):
        store("one", ARRAYS, checkpoint=checkpoint, options=OPTIONS)
    assert path.read_bytes() == b"not HDF5"
    path.unlink()
    with h5py.File(path, "w") as file:
        file["one/values"] = 1.0
    with pytest.raises(InputError, match=f"^{path}: not a usable"):
        load(path, "one")


def test_missing_file_or_group_is_no_measurement(checkpoint):
    path = measurement_file(checkpoint.path)
    assert load(path, "one") is None
    store("one", ARRAYS, checkpoint=checkpoint, options=OPTIONS)
    assert load(path, "two") is None


def test_replacing_makes_folders_and_is_all_or_nothing(tmp_path):
    path = tmp_path / "new" / "file"
    with replacing(path) as partial:
        partial.write_text("one")
    assert path.read_text() == "one"
    with pytest.raises(KeyError), replacing(path) as partial:
        partial.write_text("two")
        raise KeyError
    assert path.read_text() == "one"
    assert list(path.parent.iterdir()) == [path]


def test_files_do_not_grow_with_progress(checkpoint):
    rng = np.random.default_rng(0)
    path = measurement_file(checkpoint.path)
    store("whole", ARRAYS, checkpoint=checkpoint, options=OPTIONS)
    sizes = []
    for _ in range(12):
        progress = {"a": rng.normal(size=3000), "b": rng.normal(size=500)}
        store("unfinished/x", progress, checkpoint=checkpoint, options=OPTIONS)
        sizes.append(path.stat().st_size)
    assert max(sizes[1:]) - min(sizes[1:]) < 5000
    assert load(path, "whole").arrays.keys() == ARRAYS.keys()


@pytest.mark.parametrize("content", [b"", b"not HDF5", None])
def test_a_damaged_file_is_refused_and_left_as_it_is(checkpoint, content):
    store("one", {"a": np.arange(5000.0)}, checkpoint=checkpoint, options=OPTIONS)
    path = measurement_file(checkpoint.path)
    content = path.read_bytes()[:-2000] if content is None else content
    path.write_bytes(content)
    for call in (
        lambda: load(path, "one"),
        lambda: store("one", ARRAYS, checkpoint=checkpoint, options=OPTIONS),
    ):
        with pytest.raises(InputError, match=f"^{path}: .*it is left as it is: move it away"):
            call()
        assert path.read_bytes() == content


def test_measurements_of_other_images_do_not_count(checkpoint, capsys):
    store("one", ARRAYS, checkpoint=checkpoint, options=OPTIONS, data={"train": "a", "test": "b"})
    store("old", ARRAYS, checkpoint=checkpoint, options=OPTIONS)

    def found(name, **now):
        return stored(name, checkpoint=checkpoint, options=OPTIONS, data=lambda: now) is not None

    assert found("one", train="a", test="b")
    assert found("one")  # the dataset is not there
    assert found("old", train="c", test="b")  # of whatever it is
    assert capsys.readouterr().out == ""
    assert not found("one", train="c", test="b")
    assert "one is of other images: digits has changed since" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["mkstemp", "fsync", "replace", "chmod"])
def test_errors_of_the_system_name_the_file(tmp_path, monkeypatch, name):
    path = tmp_path / "some.file"
    path.write_text("old")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "whatever", "another name")

    monkeypatch.setattr(files.tempfile if name == "mkstemp" else os, name, full)
    with pytest.raises(OSError, match="No space left") as error, replacing(path) as partial:
        partial.write_text("new")
    assert error.value.filename == str(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_folder_is_brought_to_disk_after_the_name(tmp_path, monkeypatch):
    happened = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        happened.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", lambda *names: (happened.append("name"), replace(*names)))
    with replacing(tmp_path / "file") as partial:
        partial.write_text("new")
    assert happened == [str(partial), "name", str(tmp_path)]


def test_leftovers_of_killed_processes_are_removed_unless_someone_writes(tmp_path):
    left = tmp_path / ".a.h5.12345678.partial"
    others = [tmp_path / name for name in (".b.h5.12345678.partial", "a.h5.partial", ".a.h5.lock")]
    for path in (left, *others):
        path.touch()
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_SH)  # as someone who is writing
    with replacing(tmp_path / "a.h5") as partial:
        partial.write_text("one")
    assert left.exists()
    os.close(folder)
    with replacing(tmp_path / "a.h5") as partial:
        partial.write_text("two")
    assert not left.exists()
    assert all(path.exists() for path in others)


def test_waiting_for_a_lock_is_said_and_ends(tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.h5"
    monkeypatch.setattr(files, "ANNOUNCE", 0.0)
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    with locked(path):
        with pytest.raises(  # noqa: SIM117
            InputError, match=f"^{path}: in use by another process for more than"
        ):
            with locked(path):
                pass
        assert capsys.readouterr().err == f"{path}: in use by another process, waiting for it\n"
        monkeypatch.setattr(files, "PATIENCE", 60.0)
        done = threading.Event()

        def late():
            with locked(path):
                done.set()

        thread = threading.Thread(target=late)
        thread.start()
        assert not done.wait(0.1)
    thread.join()
    assert done.is_set()


def test_weights_of_one_name_have_measurement_files_of_their_own(checkpoint):
    kinds = [checkpoint.path.with_suffix(suffix) for suffix in (".pt", ".pth", ".safetensors")]
    files = [measurement_file(path) for path in kinds]
    assert [path.name for path in files] == ["tiny.h5", "tiny.pth.h5", "tiny.safetensors.h5"]
    # All of them shared the first once: what is in there is found.
    store("one", ARRAYS, checkpoint=checkpoint, options=OPTIONS)
    other = dataclasses.replace(checkpoint, path=kinds[2])
    assert stored("one", checkpoint=other, options=OPTIONS).path == files[0]
    another = dataclasses.replace(other, sha256="1" * 64)
    assert stored("one", checkpoint=another, options=OPTIONS) is None
    store("one", {"mine": np.ones(2)}, checkpoint=another, options=OPTIONS)
    assert load(files[0], "one").arrays.keys() == ARRAYS.keys()
