"""Figures from measurements alone: which are drawn, with what on them, and without PyTorch."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest

from analysis import drawing, figures
from analysis.drawing import families, landscapes
from analysis.drawing.everything import draw_all
from analysis.drawing.hessians import draw_hessian_comparison, draw_hessian_training
from analysis.drawing.nll import draw_nll
from analysis.measurements import labels
from analysis.measurements.comparisons import with_siblings
from analysis.measurements.files import collect
from lossgeometry import InputError, plots
from tests.measured import CUT, EPOCHS, MEMBERS, landscape, write, write_families


def test_draws_every_figure_once(folder, tmp_path, monkeypatch):
    """And renders one of each kind: that is what takes long."""
    rendered, render = set(), drawing.render
    which = r"csan\d|-?epoch\d+|_(pca|bezier)(?!.*contours)|\.\w+\.partial$"

    def render_kinds(figure, path, extension):
        if (kind := re.sub(which, "", path.name)) not in rendered:
            render(figure, path, extension)
        rendered.add(kind)

    monkeypatch.setattr(drawing, "render", render_kinds)
    written = draw_all(folder, tmp_path / "figures")
    assert {path.name for path in written} == {
        *(f"hessian_csan{w}{e}.png" for w in (3, 8) for e in ("", "-epoch000", "-epoch002")),
        *(f"hessian_csan{w}{e}_layers.png" for w in (3, 8) for e in ("", "-epoch000", "-epoch002")),
        *(f"hessian_digits_epoch{e:03d}.png" for e in (0, 2, 12)),
        "hessian_digits_training.png",
        *(
            f"landscape{kind}_digits_{figure}.png"
            for kind in ("", "_pca", "_bezier")
            for figure in ("lines", "train_and_test", "contours", "surfaces")
        ),
        "landscape_digits_flatness.png",
        "landscape_pca_digits_polar.png",
        "landscape_bezier_digits_paths.png",
        "nll_digits.png",
        "windows_digits.png",
        "claims_digits.png",
    }
    assert set(written) == set((tmp_path / "figures").iterdir())
    written += draw_nll(collect([folder], "history"), tmp_path, ("svg", "pdf"))
    assert len(rendered) == 18
    for path in (path for path in written if path.stat().st_size):
        signature = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[path.suffix]
        assert path.read_bytes().startswith(signature)


def drawn_landscapes(folder, monkeypatch):
    """The figures of the landscapes measured in `folder`, by name, unwritten."""
    figures = {}
    with monkeypatch.context() as patched:
        patched.setattr(
            landscapes,
            "save",
            lambda figure, out, name, formats: figures.setdefault(name, figure) and [],
        )
        landscapes.draw_landscapes(collect([folder], "landscape/train"), folder)
    return figures


def test_many_seeds_share_panels_entries_and_intervals(folder, monkeypatch):
    grid = np.linspace(-1, 1, 5)
    for seed in (1, 2, 3):
        for window in (3, 8):
            file = folder / f"seed{seed}" / f"csan{window}.h5"
            arrays = landscape(grid, "")
            arrays |= {f"lines/{i}/nll": 1 + (i + 1 + seed) * grid**2 for i in range(2)}
            arrays["line/nll"] = 1 + (1 + seed) * grid**2
            write(file, "landscape/train", arrays, window=window, seed=seed, **CUT)
    figures = drawn_landscapes(folder, monkeypatch)
    for panels, axes in (("contours", 2 * 2 + 2), ("surfaces", 2 * 2), ("train_and_test", 2 * 2)):
        figure = figures[f"landscape_digits_{panels}"]
        assert len(figure.axes) == axes
        assert "first seed of each" in figure.get_suptitle().replace("\n", " ")
    first, *_ = figures["landscape_digits_train_and_test"].axes[0].lines
    np.testing.assert_allclose(first.get_ydata(), 1 + grid**2)
    lines = figures["landscape_digits_lines"]
    assert [len(ax.lines) for ax in lines.axes] == [8, 8, 8]
    assert [text.get_text() for text in lines.legends[0].texts] == [
        "csan3: 3×3",
        "csan8: 8×8 (global)",
    ]
    flatness = figures["landscape_digits_flatness"]
    curvature = flatness.axes[0]
    ticks = [text.get_text().replace("\n", " ") for text in curvature.get_xticklabels()]
    assert ticks == ["3×3, 4 seeds", "8×8 (global), 4 seeds"]
    dots, mean = curvature.lines[:2]
    np.testing.assert_allclose(np.sort(dots.get_ydata()), [3, 5, 7, 9])  # twice the mean factor
    assert mean.get_ydata() == pytest.approx([6])
    assert "first seed" not in flatness.get_suptitle()


def test_more_networks_than_are_read_side_by_side_take_more_rows(tmp_path, monkeypatch):
    grid = np.linspace(-1, 1, 5)
    for window in (2, 3, 4, 5, 8):
        file = tmp_path / f"csan{window}.h5"
        write(file, "landscape/train", landscape(grid, ""), window=window, **CUT)
    figures = drawn_landscapes(tmp_path, monkeypatch)
    for panels, blocks in (("contours", 2), ("surfaces", 2), ("train_and_test", 1)):
        axes = [ax for ax in figures[f"landscape_digits_{panels}"].axes if ax.get_title()]
        places = [ax.get_subplotspec() for ax in axes]
        assert len(axes) == 5 * blocks
        assert max(place.colspan.stop for place in places) == 3
        assert max(place.rowspan.stop for place in places) == 2 * blocks


def test_trainings_that_are_not_seeds_of_one_another_are_not_taken_for_such(folder, tmp_path):
    grid = np.linspace(-1, 1, 5)
    for place, options in (
        ("another", dict(seed=1)),
        ("wide", dict(seed=2, dim=96)),
        ("early", dict(seed=3, epoch=2)),
    ):
        file = folder / place / "csan3.h5"
        write(file, "landscape/train", landscape(grid, ""), window=3, **options, **CUT)
    found = collect([folder], "landscape/train")
    kinds = labels.by_architecture(found)
    assert {label: [m.path.parent.name for m in kinds[label]] for label in kinds} == {
        "3×3, dim 48, epoch 12": ["checkpoints", "another"],
        "3×3, dim 96, epoch 12": ["wide"],
        "3×3, dim 48, epoch 2": ["early"],
        "8×8 (global)": ["checkpoints"],
    }
    assert sorted(labels.captions(found))[:2] == ["csan3: 3×3, seed 0", "csan3: 3×3, seed 1"]
    written = landscapes.draw_landscapes(found, tmp_path / "figures", ["vtu"])
    assert len(set(written)) == len(found) == 5


def test_snapshots_are_drawn_in_the_order_of_their_epochs(folder, tmp_path, monkeypatch):
    drawn, plot = [], plots.plot_over_training

    def record(epochs, *arguments, **options):
        drawn.append(epochs.tolist())
        return plot(epochs, *arguments, **options)

    monkeypatch.setattr(plots, "plot_over_training", record)
    draw_hessian_training(collect([folder], "hessian/train"), tmp_path)
    assert drawn == [[0, 2, EPOCHS]] * len(drawn)
    assert len(drawn) == 3 * 4  # NEP, APE and trace of two windows and two seeds


def test_says_what_is_missing(tmp_path):
    with pytest.raises(InputError, match=f"measurements: no HDF5 file in {tmp_path}"):
        draw_all(tmp_path, tmp_path)
    with pytest.raises(InputError, match="formats: 'gif' found, expected some of png, svg, pdf"):
        draw_all(tmp_path, tmp_path, ["gif"])


def test_names_and_labels(folder):
    found = {labels.name(m, folder): m for m in collect([folder], "hessian/train")}
    snapshots = {f"csan{w}-epoch{e:03d}" for w in (3, 8) for e in (0, 2)}
    of_seed_1 = {f"seed1-{name}" for name in ("csan3", "csan8", *snapshots)}
    assert set(found) == {"csan3", "csan8"} | snapshots | of_seed_1
    assert labels.label(found["csan3"]) == "3×3"
    assert labels.label(found["csan8"]) == "8×8 (global)"
    assert labels.stage(found["csan3-epoch002"]) == "end of warm-up (epoch 2)"
    assert labels.stage(found["csan8"]) == "end of training (epoch 12)"


def test_windows_keep_their_colours():
    both = labels.colors(["3×3", "8×8 (global)"])
    assert labels.colors(["8×8 (global)"])["8×8 (global)"] == both["8×8 (global)"]
    assert len(set(labels.colors(["3×3", "5×5", "8×8", "4×4", "6×6"]).values())) == 5


def test_seeds_are_pooled_and_other_recipes_are_not(folder):
    write(folder / "other.h5", "history", {}, window=3, seed=2, dim=96)
    groups = labels.by_architecture(collect([folder], "history"))
    assert {text: len(members) for text, members in groups.items()} == {
        "3×3, dim 48": 2,
        "3×3, dim 96": 1,
        "8×8 (global)": 2,
    }
    assert labels.seeds(groups) == "1 to 2 seeds"


def test_recipes_with_an_option_that_others_lack_are_told_apart(folder):
    write(folder / "timm.h5", "history", {}, window=3, recipe=dict(randaugment="timm"))
    groups = labels.by_architecture(collect([folder], "history"))
    assert {text: len(members) for text, members in groups.items()} == {
        "3×3, randaugment None": 2,
        "3×3, randaugment timm": 1,
        "8×8 (global)": 2,
    }


def test_datasets_of_one_file_name_are_told_apart(tmp_path):
    """Each has a figure of its own, in which no curve is of the other."""
    epochs = np.arange(EPOCHS + 1.0)
    for folder in ("a", "b"):
        curves = {"epoch": epochs, "train_nll": np.exp(-epochs), "test_error": np.exp(-epochs)}
        dataset = f"{folder}/images.h5"
        write(tmp_path / folder / "csan3.h5", "history", curves, dataset=dataset)
    histories = collect([tmp_path], "history")
    assert [labels.dataset(m) for m in histories] == ["a/images", "b/images"]
    names = [path.name for path in draw_nll(histories, tmp_path / "figures")]
    assert names == ["nll_a-images.png", "nll_b-images.png"]


def test_what_was_measured_differently_is_not_compared(folder, tmp_path, capsys):
    write(folder / "k1.h5", "hessian/train", {"eigenvalues": np.ones((1, 1))}, k=1)
    found = collect([folder], "hessian/train")
    assert len(labels.measured_alike(found)) == len(found) - 1
    layers = replace(found[0], options={**found[0].options, "layers": True})
    assert labels.measured_alike([layers, *found])[0] is layers
    ends = [m for m in found if m.checkpoint["epoch"] == EPOCHS]
    draw_hessian_comparison(ends, tmp_path)
    without = f"hessian_digits_epoch012 is without {folder / 'k1.h5'}, measured with k 1 not None\n"
    assert capsys.readouterr().err == without
    curves = dict.fromkeys(("epoch", "train_nll", "test_error"), np.ones(1))
    write(folder / "short.h5", "history", curves, recipe=dict(epochs=6))
    draw_nll(collect([folder], "history"), tmp_path)
    without = f"nll_digits is without {folder / 'short.h5'}, of 6 epochs not 12\n"
    assert capsys.readouterr().err == without


def test_what_is_of_other_weights_is_left_out(folder, capsys):
    (folder / "csan3.pt").write_bytes(b"trained again")
    found = collect([folder], "history")
    assert {m.path for m in found} == {*folder.rglob("csan?.h5")} - {folder / "csan3.h5"}
    said = f"{folder}/csan3.h5:/history is left out: of other weights than {folder}/csan3.pt\n"
    assert capsys.readouterr().err == said


def test_figures_of_a_folder_show_what_is_in_it(folder):
    write(folder / "other.h5", "hessian/train", {}, dataset="cifar10")
    found = collect([folder], "hessian/train")
    digits = [m.path for m in found if m.checkpoint["dataset"] == "digits"]
    (one,) = (m for m in found if m.path == folder / "csan3" / "epoch002.h5")
    assert [m.path for m in with_siblings([one])] == digits
    (one,) = (m for m in found if m.path == folder / "seed1" / "csan3.h5")
    assert [m.path for m in with_siblings([one])] == [p for p in digits if "seed1" in p.parts]


def test_odd_files_are_left_out_and_named(folder, tmp_path, monkeypatch, call_module):
    monkeypatch.chdir(tmp_path)
    (kept,) = folder.glob("csan3.h5")
    for path in {*folder.rglob("*.h5")} - {kept}:
        path.unlink()
    with h5py.File(kept, "a") as file:
        del file["landscape_pca"], file["landscape_bezier"], file["hessian"]
    call = partial(call_module, figures, "--measurements", "checkpoints", "--out")
    assert call("whole")[0] == 0
    (folder / "bad.h5").write_bytes(b"not HDF5")
    write(folder / "odd.h5", "landscape/train", {"line/xs": np.arange(3.0)}, **CUT)
    code, _, err = call("rest")
    assert code == 2
    bad, odd = err.splitlines()
    assert bad.startswith("error: checkpoints/bad.h5: not a usable HDF5 file")
    assert odd.startswith("error: checkpoints/odd.h5:/landscape/train has no ")
    whole, rest = ({p.name: p.read_bytes() for p in Path(f).iterdir()} for f in ("whole", "rest"))
    assert rest == whole


def test_checkpoints_of_one_name_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = np.linspace(-1, 1, 5)
    for place, dim in (("runs/a", 48), ("runs/b", 96), ("checkpoints", 24)):
        write(Path(place, "best.h5"), "landscape/train", landscape(grid, ""), dim=dim, **CUT)
    write(Path("runs/safe.tensors.h5"), "landscape/train", landscape(grid, ""), dim=12, **CUT)
    found = collect([Path("runs"), Path("checkpoints")], "landscape/train")
    assert labels.names(found) == ["a-best", "b-best", "safe.tensors", "best"]
    assert [labels.name(m) for m in found] == [
        *("runs-a-best", "runs-b-best", "runs-safe.tensors", "best")
    ]
    for texts in (labels.captions(found), labels.entries(found)):
        assert len(set(texts)) == len(found)
    assert labels.origin(found[:2]) == "runs"
    assert labels.origin(found[3:]) == ""
    one, other = (
        {p.name for p in landscapes.draw_landscapes([m], tmp_path, ["vtu"], origin=origin)}
        for m in found[:2]
        for origin in [labels.origin([m])]
    )
    assert not one & other


@pytest.fixture(scope="module")
def dispute(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work") / "checkpoints" / "dispute"
    write_families(folder, landscapes=("ViT (CLS)", "ResNet"), seeds=3, images=50, batches=6)
    return folder


def drawn_families(measurements, monkeypatch):
    """Figures by their names, which have not been written."""
    drawn = {}
    monkeypatch.setattr(
        families, "save", lambda figure, out, name, _: [drawn.setdefault(name, figure)]
    )
    families.draw_families(measurements, Path("figures"))
    return drawn


def all_of(folder):
    return [m for kind in families.KINDS for m in collect([folder], kind)]


def test_figures_of_families(dispute, monkeypatch):
    monkeypatch.chdir(dispute.parent.parent)
    folder = Path("checkpoints")
    drawn = drawn_families(all_of(folder), monkeypatch)
    assert set(drawn) == {
        f"{stem}_digits_dispute" for stem in ("ranges", "figure1", "figure4", "figure5", "figure6")
    }
    ranges = drawn["ranges_digits_dispute"]
    nll, _ = ranges.axes
    assert [text.get_text() for text in nll.get_xticklabels()] == ["3×3", "5×5", "global"]
    assert [text.get_text() for text in ranges.legends[0].texts] == [
        *("CSAN", "ConvNeXt", "RepLKNet", "VAN", "gated")
    ]
    ends = {
        container.get_label(): dict(zip(*np.round(container[0].get_data(), 1), strict=True))
        for container in nll.containers
    }
    # From global, which is drawn first, to 3; those of five families are side by side.
    assert list(ends["CSAN"].values()) == [0.6, 0.3, 0.3]
    assert list(ends["ConvNeXt"].values()) == [0.1, 0.3, 0.3]
    plane = drawn["figure5_digits_dispute"]
    assert "digits, dispute" in plane.get_suptitle()
    labels_of_plane = {text.get_text() for text in plane.legends[0].texts}
    assert labels_of_plane == {
        *("CSAN", "ConvNeXt", "RepLKNet", "VAN", "gated", "ResNet", "ViT (CLS)", "ViT (GAP)"),
        *("PiT", "Swin", "global", "5×5", "3×3"),
    }
    arrows = [text for text in plane.axes[0].texts if text.arrow_patch]
    assert len(arrows) == 5 * 2
    one, *_ = arrows
    assert one.xyann[0] == pytest.approx(0.6, abs=0.02)  # from global attention
    assert one.xy[0] == pytest.approx(0.3, abs=0.02)
    assert len(drawn["figure1_digits_dispute"].axes) == 2 + 1 + 2


def test_less_data_is_drawn_beside_all_of_it(dispute, monkeypatch):
    monkeypatch.chdir(dispute.parent.parent)
    vit = dict(network=MEMBERS["ViT (CLS)"]["network"], epoch=2)
    few = Path("checkpoints/few/vit.h5")
    spectrum = {"eigenvalues": np.ones((3, 5)), "nep": 0.0, "ape": 1.0}
    write(few, "hessian/train", spectrum, images=144, **vit)
    write(few.with_name("end.h5"), "hessian/train", spectrum, images=99, **{**vit, "epoch": 12})
    drawn = drawn_families(all_of(Path("checkpoints")), monkeypatch)
    entries = {
        name: [text.get_text() for text in drawn[name].axes[0].get_legend().texts]
        for name in ("figure4_digits_dispute", "figure6_digits_dispute")
    }
    assert [text.rpartition(" (")[0] for text in entries["figure4_digits_dispute"]] == [
        *("ResNet", "ViT (CLS)", "ViT (CLS), 144 images")
    ]
    assert [text.rpartition(" (")[0] for text in entries["figure6_digits_dispute"]] == [
        *("ViT (CLS)", "ViT (GAP)")
    ]


def test_what_has_not_been_measured_is_not_drawn(dispute, monkeypatch):
    monkeypatch.chdir(dispute.parent.parent)
    some = [m for m in all_of(dispute) if labels.network(m) in ("csan", "vit")]
    assert set(drawn_families(some, monkeypatch)) == {
        f"{stem}_digits_dispute" for stem in ("ranges", "figure5", "figure6")
    }
    alone = [m for m in some if labels.network(m) == "csan"]
    assert not drawn_families(alone, monkeypatch)


def test_families_have_figures_of_their_own(tmp_path, monkeypatch):
    """What is drawn of CSANs is drawn of each other family, and of the pyramids."""
    monkeypatch.chdir(tmp_path)
    curve = np.exp(-np.arange(EPOCHS + 1.0))
    history = {"epoch": np.arange(EPOCHS + 1.0), "train_nll": curve, "test_error": curve}
    for name in ("CSAN 5×5", "ConvNeXt 5×5", "ConvNeXt global", "ResNet", "Swin"):
        file = Path("checkpoints/dispute", f"{name.replace(' ', '-')}.h5")
        write(file, "history", history, **MEMBERS[name])
    written = {path.name for path in draw_all(Path("checkpoints"), tmp_path)}
    assert written == {
        *(f"nll_digits{name}.png" for name in ("", "_ConvNeXt", "_pyramids")),
        "windows_digits_ConvNeXt.png",
        *("ranges_digits_dispute.png", "figure5_digits_dispute.png"),
    }
    histories = collect([Path("checkpoints")], "history")
    assert sorted(labels.names(histories)) == sorted(m.path.stem for m in histories)
    assert set(labels.by_architecture(histories)) == {
        *("5×5", "ConvNeXt 5×5", "ConvNeXt 15×15 (global)", "ResNet", "Swin")
    }
