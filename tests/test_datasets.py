import h5py
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from lossgeometry import InputError
from models import load_dataset
from models.data import arrays
from models.data.arrays import fingerprints


def write(path, **arrays):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name.replace("__", "/")] = array


@pytest.fixture
def parts():
    rng = np.random.default_rng(0)
    return {
        f"{split}__{name}": array
        for split, n in (("train", 30), ("test", 10))
        for name, array in (
            ("images", rng.integers(0, 256, (n, 6, 6, 3), dtype=np.uint8)),
            ("labels", rng.integers(0, 4, n)),
        )
    }


def test_digits_are_those_of_scikit_learn_stratified():
    digits = load_digits()
    split = dict(test_size=360, stratify=digits.target, random_state=0)
    expected = train_test_split(15 * digits.images, digits.target, **split)
    train, test = load_dataset("digits"), load_dataset("digits", "test")
    found = (train.images[..., 0], test.images[..., 0], train.labels, test.labels)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert train.classes == test.classes == tuple(map(str, digits.target_names))


def test_inputs_are_normalised_by_the_training_split(tmp_path, parts):
    write(tmp_path / "data.h5", **parts)
    train = load_dataset(tmp_path / "data.h5")
    pixels = parts["train__images"].astype(np.float64) / 255
    np.testing.assert_allclose(train.mean, pixels.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(train.std, pixels.std((0, 1, 2)), rtol=1e-6)
    test = load_dataset(tmp_path / "data.h5", "test")
    expected = (parts["test__images"] / 255 - pixels.mean((0, 1, 2))) / pixels.std((0, 1, 2))
    np.testing.assert_allclose(test.inputs.permute(0, 2, 3, 1), expected, atol=1e-5)


def test_first_images(tmp_path, parts):
    write(tmp_path / "data.h5", **parts)
    train = load_dataset(tmp_path / "data.h5")
    assert torch.equal(train.first(7).inputs, train.inputs[:7])
    for n in (0, 31):
        with pytest.raises(InputError, match=f"images: {n} found"):
            train.first(n)


def test_downloaded_datasets_are_looked_for_in_the_data_root(tmp_path, parts, monkeypatch):
    write(tmp_path / "cifar10.h5", **parts)
    assert len(load_dataset("cifar10", data_root=tmp_path)) == 30
    monkeypatch.setenv("LOCALITY_DATA", str(tmp_path))
    assert len(load_dataset("cifar10", "test")) == 10


def test_download_is_kept_as_hdf5(tmp_path, monkeypatch):
    """The conversion, with torchvision's download replaced by what it leaves behind."""
    from torchvision import datasets

    rng = np.random.default_rng(0)

    class Downloaded:
        classes = [f"class{i}" for i in range(10)]

        def __init__(self, root, train, download):
            self.data = rng.integers(0, 256, (300 if train else 260, 32, 32, 3), dtype=np.uint8)
            self.targets = rng.integers(0, 10, len(self.data)).tolist()

    monkeypatch.setattr(datasets, "CIFAR10", Downloaded)
    train = load_dataset("cifar10", data_root=tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").glob("[!.]*")] == ["cifar10.h5"]
    assert train.images.shape == (300, 32, 32, 3)
    assert train.classes == tuple(Downloaded.classes)


def test_failed_download_says_what_to_do(tmp_path, monkeypatch):
    from torchvision import datasets

    def unreachable(*args, **kwargs):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(datasets, "CIFAR100", unreachable)
    with pytest.raises(InputError, match=r"cannot be downloaded \(no route to host\).*--data-root"):
        load_dataset("cifar100", data_root=tmp_path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"train__images": None}, "there is no dataset /train/images"),
        ({"test__labels": None}, "there is no dataset /test/labels"),
        ({"test__images": np.zeros((10, 6, 6, 3))}, "/test/images is float64"),
        ({"test__images": np.zeros((10, 6, 6), np.uint8)}, r"/test/images is uint8 \(10, 6, 6\)"),
        ({"test__images": np.zeros((10, 5, 5, 3), np.uint8)}, r"expected \(6, 6, 3\)"),
        ({"test__labels": np.zeros(9, int)}, r"/test/labels is int64 \(9,\), expected \(10,\)"),
        ({"test__labels": np.full(10, 4)}, "holds 4 to 4, expected 0 to 3"),
        ({"test__labels": np.full(10, -1)}, "holds -1 to -1, expected 0 to"),
    ],
)
def test_malformed_files_are_refused(tmp_path, parts, change, complaint):
    parts = {k: v for k, v in {**parts, **change}.items() if v is not None}
    write(tmp_path / "data.h5", **parts)
    with pytest.raises(InputError, match=complaint) as error:
        load_dataset(tmp_path / "data.h5", "test")
    assert str(error.value).startswith(str(tmp_path / "data.h5"))
    assert "\n" not in str(error.value)


def test_unknown_names_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"nowhere is neither .* nor one of digits, cifar10"):
        load_dataset("nowhere")
    with pytest.raises(InputError, match="split: 'validation' is unknown"):
        load_dataset("digits", "validation")
    (tmp_path / "text.h5").write_text("not HDF5")
    with pytest.raises(InputError, match="not a usable HDF5 file"):
        load_dataset(tmp_path / "text.h5")


def test_fingerprint_is_that_of_the_images_and_labels_that_are_used(tmp_path, parts):
    path = tmp_path / "data.h5"

    def now(**changes):
        write(path, **{**parts, **changes})
        return fingerprints(path, {"train": None, "test": 5})

    before = now()
    assert now() == before
    assert before["train"] == load_dataset(path).fingerprint
    assert before["test"] == load_dataset(path, "test").first(5).fingerprint
    labels, images = parts["train__labels"].copy(), parts["test__images"].copy()
    labels[-1] = (labels[-1] + 1) % 4
    assert now(train__labels=labels)["train"] != before["train"]
    assert now(train__labels=labels)["test"] == before["test"]
    images[5] ^= 1  # not among the first five
    assert now(test__images=images) == before
    images[4] ^= 1
    assert now(test__images=images)["test"] != before["test"]
    assert fingerprints(tmp_path / "none.h5", {"train": None}) == {}
    assert fingerprints("cifar10", {"train": None}, data_root=tmp_path) == {}


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, parts, monkeypatch):
    path = tmp_path / "data.h5"
    write(path, **parts)
    read = arrays._read

    def written_to(path, split):
        dataset = read(path, split)
        write(path, **parts)
        return dataset

    monkeypatch.setattr(arrays, "_read", written_to)
    with pytest.raises(InputError, match=f"^{path}: changed while it was read"):
        load_dataset(path)
