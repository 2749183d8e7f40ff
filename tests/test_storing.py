"""Results show, save and load themselves; files say what their arrays are."""

import subprocess
import sys
from pathlib import Path

import h5py
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import xarray
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from torch import Tensor

import lossgeometry
from lossgeometry import (
    Bezier,
    CurvatureHistory,
    Eigenpairs,
    Estimate,
    Flatness,
    InputError,
    MaxEigenvalueSpectrum,
    Plane,
    PolarTrajectory,
    Slice,
    SpectralDensity,
    Trajectory,
    open_measurement,
)
from lossgeometry.algorithms.estimate import NormEstimate
from lossgeometry.layout import RESULTS
from lossgeometry.storing import Result

XS, YS = np.linspace(-1, 1, 5), np.linspace(0, 1, 4)
DIRECTION = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor(0.5)}
BOWL = XS**2 + YS[:, None]
SETTINGS = {"mode": "train", "examples": 3, "adaptive": 0.1, "interpolated": False}
BOTH = {"test/nll": XS**2, "train/nll": 2 * XS**2, "l2": XS + 1}
ROWS = dict.fromkeys(RESULTS["CurvatureHistory"], np.array([1.0, np.nan]))
ROWS |= dict.fromkeys(("eigenvalues", "errors"), np.ones((2, 3)))
ROWS |= dict.fromkeys(("steps", "matvecs"), np.array([5, 10]))


def random(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


WORTH = (random(4, 2), random(4, 2), random(4, 2), random(4, 2) > 0.5)
DENSITY = SpectralDensity(random(3, 4).numpy(), random(3, 4).numpy() + 1, 9, 1e-7)
DIRECTIONS = [DIRECTION, {name: tensor + 1 for name, tensor in DIRECTION.items()}]
EXAMPLES = [
    Slice(XS, None, BOTH, np.ones(5, bool), SETTINGS),
    Slice(XS, YS, {"nll": BOWL, "error": BOWL / 9}, BOWL > 0.1, {}),
    Eigenpairs(random(2), random(9, 2).float(), random(2), random(2), random(2) > 0.5, 12),
    MaxEigenvalueSpectrum(*WORTH, torch.arange(4), 1, 0.0, 0.0, float("nan"), 0.1),
    DENSITY,
    DENSITY.estimate(DENSITY.grid(9)),
    Estimate(3.0, 0.5, float("inf"), 0.0, 10),
    Estimate(random(7), random(7), 9.5, 0.0, 10),
    NormEstimate(3.0, 0.5, 10, 0.0, 10),
    Flatness(*random(4, 3).numpy()),
    CurvatureHistory(**ROWS),
    lossgeometry.Path(np.array([0, 0.5, 1]), {"nll": np.arange(3.0), "error": np.zeros(3)}),
    Bezier(DIRECTION, np.arange(8.0)),
    Plane(DIRECTIONS, np.eye(3, 2)),
    Trajectory(DIRECTIONS, np.array([0.7, 0.2]), random(4, 2).numpy()),
    PolarTrajectory(np.arange(3.0)[::-1], np.array([0, 0.5, np.nan]), np.array([0.3])),
]


def named(results):
    return pytest.mark.parametrize("result", results, ids=lambda r: type(r).__name__)


def require_same(found, expected):
    """Of one type, down to the entries and to the last bit."""
    assert type(found) is type(expected)
    if isinstance(expected, Result):
        require_same(vars(found) | {"_rules": 0}, vars(expected) | {"_rules": 0})
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            require_same(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            require_same(*pair)
    elif isinstance(expected, Tensor | np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()
    else:
        assert found == expected or found != found != expected


def test_every_result_is_among_the_examples():
    classes = [value for value in vars(lossgeometry).values() if isinstance(value, type)]
    classes += [getattr(lossgeometry, name) for name in lossgeometry.__all__]
    results = {c for c in classes if isinstance(c, type) and issubclass(c, Result)}
    assert results | {NormEstimate} == {type(example) for example in EXAMPLES}


@named(EXAMPLES)
def test_what_was_saved_is_loaded(result, tmp_path):
    path = tmp_path / "new" / "result.h5"
    result.save(path)
    require_same(type(result).load(path), result)
    assert [p.name for p in path.parent.iterdir()] == ["result.h5"]
    if type(result) is NormEstimate:
        require_same(Estimate.load(path), result)


@named(EXAMPLES)
def test_every_array_says_what_it_is(result, tmp_path):
    result.save(tmp_path / "result.h5")

    def look(name, item):
        if isinstance(item, h5py.Dataset):
            assert item.attrs["description"]
            assert all(dimension.label for dimension in item.dims)

    with h5py.File(tmp_path / "result.h5") as file:
        assert file.attrs["format"] == "lossgeometry, version 2"
        assert file.attrs["type"] == type(result).__name__
        file.visititems(look)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_slice_is_loaded_as_it_was(data, tmp_path):
    xs, ys = (np.arange(data.draw(st.integers(1, 4)), dtype=float) for _ in range(2))
    surface = data.draw(st.booleans())
    shape = (len(ys), len(xs)) if surface else (len(xs),)
    plain = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1)
    names = st.from_regex(r"[\w é×-]{1,9}(/[\w-]{1,9})?", fullmatch=True).filter(
        lambda name: name.partition("/")[0] not in ("xs", "ys", "evaluated", "settings")
    )
    values = arrays_of.arrays(float, shape)
    metrics = data.draw(st.dictionaries(names, values, min_size=1, max_size=3))
    if len({name.partition("/")[0] for name in metrics}) < len(metrics):
        return  # a set and a metric of one name
    about = data.draw(st.dictionaries(plain, st.booleans() | st.integers() | plain, max_size=3))
    done = data.draw(arrays_of.arrays(bool, shape))
    result = Slice(xs, ys if surface else None, metrics, done, about)
    result.save(tmp_path / "slice.h5")
    require_same(Slice.load(tmp_path / "slice.h5"), result)


def test_a_metric_called_like_something_else_is_refused(tmp_path):
    for name in ("ys", "settings"):
        slice_ = Slice(XS, None, {name: XS}, np.ones(5, bool), {})
        with pytest.raises(InputError, match=rf"^metrics: '{name}', expected another name$"):
            slice_.save(tmp_path / "slice.h5")
    assert not list(tmp_path.iterdir())


@named(EXAMPLES)
def test_a_result_is_shown_at_a_glance(result):
    text, table = repr(result), result._repr_html_()
    assert text.startswith(f"{type(result).__name__}\n  ")
    assert len(text) < 1200
    assert table.count("<tr>") == len(text.splitlines()) - 1
    drawn = hasattr(result, "plot")
    assert ('src="data:image/png;base64,' in table) == drawn
    if drawn:
        ax = result.plot()
        assert ax.lines or ax.collections
        assert result.plot(ax) is ax
        plt.close("all")


def test_a_glance_says_how_large_it_is_and_what_is_lacking():
    assert "  angles     0, 0.5, nan" in repr(EXAMPLES[-1])
    assert "  nll        4 × 5 float64, 0 to 2" in repr(EXAMPLES[1])
    assert f"  evaluated  4 × 5 bool, {(BOWL > 0.1).sum()} of 20 true" in repr(EXAMPLES[1])
    holes = lossgeometry.Path(np.linspace(0, 1, 9), {"<b>": np.array([np.nan, np.inf, *range(7)])})
    assert "<b>  9 float64, 0 to 6, 2 not finite" in repr(holes)
    assert "<b>" not in holes._repr_html_()
    assert "directions          2 × 7 numbers in 2 tensors" in repr(EXAMPLES[-2])


def test_files_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "file.h5"
    expected = "expected a saved Eigenpairs"
    for write, found in (
        (lambda: None, "No such file"),
        (lambda: path.write_text("no HDF5"), "file signature not found"),
        (lambda: h5py.File(path, "w").close(), "an HDF5 file of another format found"),
        (lambda: EXAMPLES[0].save(path), "Slice found"),
        (lambda: edited(lambda f: f.attrs.update(format="new")), "of 'new' found"),
        (lambda: edited(lambda f: f.pop("matvecs")), "matvecs"),
        (lambda: edited(lambda f: replaced(f, "errors", np.ones(3))), "errors: 'float64 (3,)'"),
        (lambda: edited(lambda f: replaced(f, "converged", np.ones(2))), "expected bool rank"),
        (lambda: path.write_bytes(path.read_bytes()[:-500]), "truncated"),
    ):

        def edited(edit):
            EXAMPLES[2].save(path)
            with h5py.File(path, "a") as file:
                edit(file)

        def replaced(file, name, array):
            del file[name]
            file[name] = array

        write()
        with pytest.raises(InputError) as error:
            Eigenpairs.load(path)
        assert str(error.value).startswith(f"{path}: ")
        assert found in str(error.value)
        assert str(error.value).endswith(expected)


def test_histories_of_the_first_version_are_read(tmp_path):
    with h5py.File(tmp_path / "rows.h5", "w") as file:
        file.attrs["format"] = "lossgeometry curvature history, version 1"
        for name, array in ROWS.items():
            file[name] = array
    require_same(CurvatureHistory.load(tmp_path / "rows.h5"), CurvatureHistory(**ROWS))


def test_others_see_coordinates(tmp_path):
    """In what xarray reads through h5netcdf, without anything of this package."""
    EXAMPLES[1].save(tmp_path / "surface.h5")
    with xarray.open_dataset(tmp_path / "surface.h5", engine="h5netcdf") as found:
        assert found["nll"].dims == ("ys", "xs")
        np.testing.assert_array_equal(found["nll"].sel(ys=1.0), BOWL[-1])
        np.testing.assert_array_equal(found["xs"], XS)
        assert found["xs"].attrs["description"] == "steps along the first direction"


def test_opens_a_saved_result_with_its_labels(tmp_path):
    EXAMPLES[0].save(tmp_path / "line.h5")
    tree = open_measurement(tmp_path / "line.h5")
    assert tree["train/nll"].dims == ("xs",)
    np.testing.assert_array_equal(tree["train/nll"].xs, XS)
    assert tree.attrs["settings"] == SETTINGS
    assert tree["l2"].attrs["units"] == "loss"
    one = open_measurement(str(tmp_path / "line.h5"), "train").to_dataset()
    np.testing.assert_array_equal(one["nll"], 2 * XS**2)
    for name, found in (("text", "file signature"), ("none", "No such file")):
        path = tmp_path / f"{name}.h5"
        if name == "text":
            path.write_text("no HDF5")
        with pytest.raises(
            InputError, match=rf"^{path}: .*{found}.*, expected an HDF5 file of results$"
        ):
            open_measurement(path)
    with pytest.raises(InputError, match=r"no 'train/nll' found, expected one of test, train$"):
        open_measurement(tmp_path / "line.h5", "train/nll")


def test_says_what_to_install_without_xarray(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "xarray", None)
    with pytest.raises(InputError, match="pip install xarray"):
        open_measurement(tmp_path / "any.h5")


def test_opens_what_is_shipped():
    tree = open_measurement(Path(__file__).parent.parent / "checkpoints" / "csan8.h5")
    assert {"hessian/train", "landscape/train", "history"} <= {n.path[1:] for n in tree.subtree}
    assert tree["landscape/train"].attrs["options"]["lines"] == 8


def test_measurements_are_opened_without_pytorch():
    program = "import sys; sys.modules['torch'] = None; import lossgeometry; "
    program += "print(lossgeometry.open_measurement('checkpoints/csan8.h5', 'history')['epoch'][1])"
    how = dict(capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", program], **how)
    assert done.returncode == 0, done.stderr
    assert "1." in done.stdout


def test_half_precision_that_numpy_lacks_is_stored_in_single(tmp_path):
    half = {name: tensor.bfloat16() for name, tensor in DIRECTION.items()}
    Plane([half, half], np.eye(3, 2)).save(tmp_path / "plane.h5")
    found, _ = Plane.load(tmp_path / "plane.h5").directions
    for name, tensor in half.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], tensor.float())
