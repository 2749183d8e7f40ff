"""The verdicts: on planted data, whose truth is known, and the intervals' coverage."""

import itertools
import re
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis import claims
from analysis.drawing import claims as drawing
from analysis.drawing.claims import draw_claims
from analysis.drawing.nll import draw_windows
from analysis.intervals import Interval, of_shared_units, over_units, paired, unpaired
from analysis.measurements import labels
from analysis.measurements.comparisons import studies
from analysis.measurements.files import collect
from analysis.statements import OF_WINDOWS
from analysis.verdicts import (
    MARGIN,
    Answer,
    Finding,
    decide,
    holm,
    judge,
    positive_mean,
    significance,
)
from models.cli import run
from tests.measured import EPOCHS, FAMILIES, MEMBERS, write, write_families

N = 400  # images
BATCHES = 60
# Window and head window: train NLL, error, corruption error, NEP. C1, C2, C4 and C5 hold; C3 does
# not, for the NLL of 3 is lower than that of 5; of C6, nothing does.
TRUTH = {
    (3, 1): (1.0, 0.20, 0.50, 0.1),
    (5, 1): (1.2, 0.20, 0.40, 0.2),
    (8, 1): (1.5, 0.40, 0.60, 0.5),
    (3, 3): (0.8, 0.10, 0.50, 0.1),
    (5, 3): (1.0, 0.10, 0.40, 0.1),
    (8, 3): (1.3, 0.20, 0.60, 0.1),
}


def plant(path, group, arrays, variant, seed=0, epoch=EPOCHS, **recipe):
    window, head_window = variant
    network = dict(window=window, head_window=head_window, seed=seed, epoch=epoch, recipe=recipe)
    write(path, group, arrays, **network)


def plant_all(folder, *, seeds=1, variants=tuple(TRUTH), kinds=("nll", "robustness", "hessian")):
    """Networks whose single images and mini-batches scatter about the truth."""
    for variant, seed in itertools.product(variants, range(seeds)):
        nll, error, corruption, nep = TRUTH[variant]
        rng = np.random.default_rng((*variant, seed))
        file = folder / f"seed{seed}" / f"csan{variant[0]}-{variant[1]}.h5"
        images = nll + rng.normal(0, 0.1, N)
        wrong = rng.permutation(N) < round(error * N)
        history = {"epoch": [0, EPOCHS], "train_nll": [9.0, images.mean()]}
        history |= {"test_error": [0.99, wrong.mean()]}
        plant(file, "history", history, variant, seed)
        if "nll" in kinds:
            outcomes = {"train/nll": np.float32(images), "train/correct": np.ones(N, dtype=bool)}
            outcomes |= {"test/nll": np.float32(images), "test/correct": ~wrong}
            plant(file, "outcomes", outcomes, variant, seed)
        if "robustness" in kinds:
            of_image = np.clip(corruption + rng.normal(0, 0.1, N), 0, 1)
            robustness = {"image_error": of_image, "mean_corruption_error": of_image.mean()}
            robustness |= {"error": np.full((15, 5), of_image.mean()), "clean_error": error}
            robustness["corruptions"] = np.array([f"c{i}" for i in range(15)], dtype=bytes)
            plant(file, "robustness", robustness, variant, seed)
        if "hessian" in kinds:
            early = file.with_suffix("") / "epoch002.h5"
            eigenvalues = np.where(rng.random((BATCHES, 5)) < nep, -1.0, 1.0)
            spectrum = {"eigenvalues": eigenvalues, "nep": (eigenvalues < 0).mean()}
            plant(early, "hessian/train", spectrum, variant, seed, epoch=2)


def verdicts(folder):
    (answers,) = judge([folder]).values()
    return {answer.claim.key: answer.verdict for answer in answers}


EXPECTED = dict(C1="holds", C2="holds", C3="does not hold", C4="holds", C5="holds")


def findings(folder):
    (answers,) = judge([folder]).values()
    return [finding for answer in answers for finding in answer.findings]


def test_planted_truth_is_found(tmp_path):
    plant_all(tmp_path, seeds=4)
    assert verdicts(tmp_path) == EXPECTED | {"C6": "does not hold"}
    found = findings(tmp_path)
    assert {finding.over for finding in found} == {
        "4 seeds",
        f"4 seeds × {N} test images",
        f"4 seeds × {BATCHES} mini-batches",
    }
    first = found[0].interval
    assert first.low < 0.3 < first.high
    assert first.high - first.low < 0.1


@pytest.mark.parametrize(("seeds", "networks"), [(1, "one network"), (2, "two networks")])
def test_no_verdict_from_fewer_than_three_seeds(tmp_path, seeds, networks):
    """However far apart the images of the two networks are."""
    plant_all(tmp_path, seeds=seeds)
    assert set(verdicts(tmp_path).values()) == {"no verdict"}
    first = findings(tmp_path)[0]
    assert first.over == f"{networks}, {N} train images"
    assert first.interval.estimate == pytest.approx(0.3, abs=0.03)
    assert first.interval.low > 0.2


def interval(low, high):
    """Of 95 %, with as good as infinitely many degrees of freedom."""
    return Interval((low + high) / 2, ((((high - low) / 2 / 1.96) ** 2, 1e9),))


def test_the_rule():
    above, below, around = interval(1, 3), interval(-3, -1), interval(-1, 1)
    assert [decide(i, ">") for i in (above, below, around)] == [
        *("holds", "does not hold", "undecided")
    ]
    assert [decide(i, "<=") for i in (above, below, around)] == [
        *("does not hold", "holds", "undecided")
    ]
    assert decide(interval(-0.5 - MARGIN, MARGIN / 2), "<=") == "holds"
    assert decide(interval(MARGIN / 4, MARGIN * 0.75), "<=") == "does not hold"
    unknown = Interval(1, ((np.nan, 1),))
    assert decide(unknown, ">") == decide(unknown, "<=") == "undecided"
    assert np.isnan(significance(unknown, ">"))


@given(
    estimate=st.floats(-0.1, 0.1),
    deviation=st.floats(0.001, 0.1),
    freedom=st.integers(1, 50),
    sign=st.sampled_from([">", "<="]),
)
def test_significance_is_the_level_at_which_the_verdict_changes(estimate, deviation, freedom, sign):
    found = Interval(estimate, ((deviation**2, freedom),))
    p = significance(found, sign)
    if abs(p - 0.05) > 1e-6:
        assert (p < 0.05) == (decide(found, sign) != "undecided")


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1, 1]
    assert holm([]) == []


def test_many_differences_take_more_to_hold(tmp_path):
    """A difference of p = 0.03 holds alone, not among three."""
    for seed, difference in enumerate((0.7, 1.0, 1.3)):
        for window, nll in ((3, 1.0 + seed % 2), (5, 1.0), (8, 1 + difference)):
            history = {"train_nll": [nll], "test_error": [0.01 * (window + seed) % 0.03]}
            plant(tmp_path / f"{seed}-{window}.h5", "history", history, (window, 1), seed)
    first = findings(tmp_path)[0]
    assert significance(first.interval, ">") == pytest.approx(0.0288, abs=1e-4)
    assert (first.verdict, first.corrected) == ("holds", "undecided")
    (answers,) = judge([tmp_path]).values()
    assert answers[0].corrected == "undecided"


def test_a_conjunction_is_as_strong_as_its_weakest_part():
    claim = next(claim for claim in OF_WINDOWS if claim.key == "C3")

    def conjunction(*parts):
        found = zip(claim.parts, parts, strict=True)
        return Answer(claim, tuple(Finding(p, None, "", v) for p, v in found)).verdict

    assert conjunction("holds", "holds") == "holds"
    assert conjunction("holds", "undecided") == "undecided"
    assert conjunction("undecided", "does not hold") == "does not hold"
    assert conjunction("holds", "not measured") == "not measured"


def test_networks_that_do_not_differ_are_undecided(tmp_path):
    rng = np.random.default_rng(1)
    for window, seed in itertools.product((3, 5, 8), range(3)):
        history = {"train_nll": [rng.normal(1, 0.1)], "test_error": [0.2]}
        file = tmp_path / f"csan{window}-{seed}.h5"
        plant(file, "history", history, (window, 1), seed)
        outcomes = {"train/nll": np.ones(N), "test/correct": rng.permutation(N) < 0.8 * N}
        plant(file, "outcomes", outcomes, (window, 1), seed)
    found = verdicts(tmp_path)
    assert found["C1"] == found["C2"] == found["C3"] == "undecided"


def test_seeds_are_paired(tmp_path):
    """Seeds differ by far more than the windows; the difference within a seed is always 0.1."""
    for seed, window in itertools.product(range(4), (5, 8)):
        history = {
            "train_nll": [10.0 * seed + 0.1 * (window == 8) + 0.001 * seed * window],
            "test_error": [0.5],
        }
        plant(tmp_path / f"{seed}-{window}.h5", "history", history, (window, 1), seed)
    # A seed that only one of them has does not count.
    plant(tmp_path / "9-5.h5", "history", {"train_nll": [99.0], "test_error": [0.0]}, (5, 1), 9)
    (answers,) = judge([tmp_path]).values()
    assert answers[0].verdict == "holds"
    assert answers[0].findings[0].text == "holds (unpaired: undecided)"
    assert answers[0].findings[0].over == "4 seeds"


def test_not_a_number_decides_nothing(tmp_path):
    plant_all(tmp_path, variants=[(3, 1), (5, 1), (8, 1)], seeds=3)
    for path in tmp_path.rglob("csan8-1/epoch002.h5"):
        with h5py.File(path, "a") as file:
            file["hessian/train/eigenvalues"][0, 0] = np.nan
            file["hessian/train/nep"][()] = np.nan
    assert verdicts(tmp_path)["C5"] == "undecided"


def test_says_what_is_missing_and_how_to_get_it(tmp_path):
    plant_all(tmp_path, variants=[(3, 1), (5, 1)], kinds=("nll",))
    (answers,) = judge([tmp_path]).values()
    missing = {a.claim.key: [line for f in a.findings for line in f.missing] for a in answers}
    assert missing["C1"] == [
        "no training with window 8, head window 1: python -m models.train --dataset digits "
        f"--window 8 --head-window 1 --epochs {EPOCHS} --out NAME.pt"
    ]
    assert missing["C4"] == [
        f"corruption error with window {w}, head window 1: python -m analysis.robustness "
        f"--ckpt {tmp_path / 'seed0' / f'csan{w}-1.pt'}"
        for w in (3, 5)
    ]
    assert missing["C3"] == []
    assert f"{tmp_path / 'seed0' / 'csan5-1' / 'epoch002.pt'}" in missing["C5"][0] + str(missing)
    assert {a.claim.key: a.verdict for a in answers}["C4"] == "not measured"


def test_a_single_seed_needs_single_images(tmp_path):
    plant_all(tmp_path, kinds=())
    (answers,) = judge([tmp_path]).values()
    assert answers[0].verdict == "not measured"
    assert "python -m analysis.nll --ckpt" in answers[0].findings[0].missing[0]


def test_studies_are_kept_apart_and_named(tmp_path):
    plant_all(tmp_path, variants=[(3, 1), (5, 1), (8, 1)])
    history = {"train_nll": [1.0], "test_error": [0.5]}
    plant(tmp_path / "other.h5", "history", history, (5, 1), learning_rate=1)
    assert set(studies(collect([tmp_path], "history"))) == {
        "digits, learning_rate None",
        "digits, learning_rate 1",
    }
    written = draw_claims(judge([tmp_path]), tmp_path / "figures")
    assert [path.name for path in written] == ["claims_digits_learning_rate-None.png"]


def test_studies_are_named_by_no_more_than_tells_them_apart(tmp_path):
    history = {"train_nll": [1.0], "test_error": [0.5]}
    for i in range(3):
        recipe = dict(batch_size=8 * (i // 2), clip_norm=i, flip=bool(i))
        plant(tmp_path / f"{i}.h5", "history", history, (5, 1), **recipe)
    found = set(studies(collect([tmp_path], "history")))
    assert found == {f"digits, clip_norm {i}" for i in range(3)}


def test_command_prints_and_draws(tmp_path, monkeypatch, capsys):
    plant_all(tmp_path / "checkpoints", seeds=3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["claims"])
    run(claims.main, claims.Options)
    out = capsys.readouterr().out
    assert re.search(
        r"NLL_train\(8\) - NLL_train\(5\) > 0 +\+0\.\d{4} .* 3 seeds +holds +holds", out
    )
    assert "wrote figures/claims_digits.png" in out
    histories = collect([tmp_path], "history")
    assert len(set(labels.colors(labels.by_architecture(histories)).values())) == len(TRUTH)
    assert [p.name for p in draw_windows(histories, tmp_path)] == ["windows_digits.png"]

    monkeypatch.setattr(sys, "argv", ["claims", "--measurements", "figures"])
    with pytest.raises(SystemExit) as stop:
        run(claims.main, claims.Options)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert re.fullmatch("error: measurements: no trained network in figures, expected .*\n", error)


def test_intervals_cover_at_their_nominal_rate():
    rng = np.random.default_rng(0)
    skewed = [over_units(rng.exponential(1.0, 60) - rng.exponential(0.5, 60)) for _ in range(2000)]
    assert np.mean([i.low <= 0.5 <= i.high for i in skewed]) == pytest.approx(0.945, abs=0.015)
    pairs = [paired([rng.normal(1, 2, 3), rng.normal(0, 2, 3)]) for _ in range(2000)]
    assert np.mean([i.low <= 1 <= i.high for i in pairs]) == pytest.approx(0.95, abs=0.015)
    apart = [unpaired([rng.normal(1, 2, 3), rng.normal(0, 1, 5)]) for _ in range(2000)]
    assert 0.94 < np.mean([i.low <= 1 <= i.high for i in apart]) < 0.99


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(
    ("of_seed", "of_unit", "rest"), [(1, 0, 1), (1, 1, 1), (0.1, 3, 1), (0.3, 6, 3)]
)
def test_shared_units_are_covered(seeds, of_seed, of_unit, rest):
    """With the interval over seeds alone, down to one truth in three is."""
    rng = np.random.default_rng(0)
    covered, alone = [], []
    for _ in range(500):
        parts = of_seed * rng.normal(size=(seeds, 1)), of_unit * rng.normal(size=(1, 40))
        found = parts[0] + parts[1] + rest * rng.normal(size=(seeds, 40))
        over_seeds = over_units(found.mean(axis=1))
        both = Interval(over_seeds.estimate, (*over_seeds.parts, of_shared_units(found)))
        covered.append(both.low <= 0 <= both.high)
        alone.append(over_seeds.low <= 0 <= over_seeds.high)
    assert 0.93 <= np.mean(covered) <= 0.99
    assert of_unit < 3 or np.mean(alone) < 0.75


def of_families(folder):
    return of_study(judge([folder]))


def of_study(answers):
    (study,) = [name for name in answers if name.endswith("dispute")]
    return {answer.claim.key: answer for answer in answers[study]}


def test_claims_about_families_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_families(Path("checkpoints/dispute"))
    judged = judge([Path("checkpoints")])
    found = of_study(judged)
    assert {key: answer.verdict for key, answer in found.items()} == {
        **dict(D1="holds", D2="does not hold", D3="undecided", D4="undecided", D5="holds"),
        **dict(D6="does not hold", F4="holds", F5="undecided", F6="holds"),
    }
    assert {key: answer.corrected for key, answer in found.items()} == {
        key: answer.verdict for key, answer in found.items()
    }
    first, second = found["D5"].findings
    assert first.part.text == (
        "NLL_train(CSAN global) - NLL_train(CSAN 5×5) - "
        "[NLL_train(ConvNeXt global) - NLL_train(ConvNeXt 5×5)] > 0"
    )
    assert first.interval.estimate == pytest.approx(0.5, abs=0.03)
    assert second.interval.estimate == pytest.approx(0.3, abs=0.03)
    assert first.over == "5 seeds"
    ape = found["F4"].findings[1]
    assert ape.over == "5 seeds × 40 mini-batches"
    assert ape.interval.estimate == pytest.approx(80, abs=15)
    (written, _) = draw_claims(judged, tmp_path / "figures")
    assert written.name == "claims_digits.png"


def test_what_claims_say_is_read(tmp_path, monkeypatch):
    """Each claim once in a panel, and no text on another."""
    monkeypatch.chdir(tmp_path)
    write_families(Path("checkpoints/dispute"))
    figures = []
    monkeypatch.setattr(drawing, "save", lambda figure, *_: figures.append(figure) or [])
    draw_claims(judge([Path("checkpoints")]), tmp_path)
    for ax in figures[1].axes:
        ax.figure.draw_without_rendering()
        texts = ax.get_yticklabels()
        boxes = sorted(text.get_window_extent().extents[[1, 3]].tolist() for text in texts)
        assert all(top <= bottom for (_, top), (bottom, _) in itertools.pairwise(boxes))
        claims = [text.get_text()[:2] for text in texts if text.get_text()[0] in "CDF"]
        assert len(set(claims)) == len(claims)


def test_families_are_those_of_one_folder(tmp_path, monkeypatch):
    """Of another, and of one size only that most of a network are of."""
    monkeypatch.chdir(tmp_path)
    folder = Path("checkpoints/dispute")
    truth = {name: FAMILIES[name] for name in ("CSAN 5×5", "CSAN global", "VAN 5×5")}
    write_families(folder, truth, seeds=3)
    history = {"train_nll": [9.0], "test_error": [0.5]}
    for place, dim in (("checkpoints/csan8.h5", 48), ("checkpoints/dispute/wide.h5", 96)):
        write(Path(place), "history", history, window=8, dim=dim)
    found = of_families(Path("checkpoints"))
    assert found["D1"].findings[0].interval.estimate == pytest.approx(0.3, abs=0.03)
    assert found["D4"].verdict == "not measured"
    assert found["D4"].findings[0].missing == (
        "no training of VAN global; studies/dispute.toml declares one",
    )
    lacking = found["F6"].findings[0].missing
    assert lacking[0] == "no training of ViT (CLS); studies/dispute.toml declares one"


def test_a_spectrum_that_is_missing_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("checkpoints/dispute")
    write_families(folder, {name: FAMILIES[name] for name in ("ViT (CLS)", "ResNet")}, seeds=1)
    Path(folder, "seed0/resnet/epoch002.h5").unlink()
    (nep, ape) = of_families(Path("checkpoints"))["F4"].findings
    assert nep.missing == (
        "NEP of ResNet: python -m analysis.hessian --ckpt "
        "checkpoints/dispute/seed0/resnet/epoch002.pt",
    )
    assert ape.missing[0].startswith("APE of ResNet: ")


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("truth", [0.0, 0.2])
def test_an_interaction_is_covered(seeds, truth):
    """Of D5, over seeds, whose networks may have something in common."""
    rng = np.random.default_rng(0)
    covered, power = [], []
    for _ in range(1500):
        of_seed = rng.normal(0, 1, seeds)
        means = np.array([1 + truth, 1, 1, 1])  # ours far, theirs near; ours near, theirs far
        values = means[:, None] + of_seed + rng.normal(0, 0.1, (4, seeds))
        terms = np.array([1, 1, -1, -1])[:, None] * values
        found = paired(terms)
        covered.append(found.low <= truth <= found.high)
        power.append(decide(found, ">"))
        assert unpaired(terms).estimate == pytest.approx(found.estimate)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.017)
    wrong = np.mean([verdict == "does not hold" for verdict in power])
    assert wrong < 0.04
    assert truth > 0 or np.mean([verdict == "holds" for verdict in power]) < 0.04


def test_the_interval_of_d5_covers_what_was_planted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [f"{n} {r}" for n in ("CSAN", "ConvNeXt", "RepLKNet") for r in ("5×5", "global")]
    rng, covered = np.random.default_rng(0), []
    for study in range(30):
        for i, name in enumerate(names):
            for seed in range(3):
                nll = 0.3 + 0.2 * (i == 1) + rng.normal(0, 0.05)
                history = {"train_nll": [nll], "test_error": [0.1]}
                file = Path(f"checkpoints/{study}/dispute/seed{seed}/{i}.h5")
                write(file, "history", history, seed=seed, **MEMBERS[name])
        found = of_families(Path(f"checkpoints/{study}"))["D5"].findings
        covered += [f.interval.low <= 0.2 <= f.interval.high for f in found]
    assert np.mean(covered) > 0.85


def test_what_mini_batches_add_to_ape_is_that_of_a_ratio():
    """Its variance is that of APE over samples of mini-batches; none need have a positive one."""
    rng = np.random.default_rng(0)

    def sample():
        size = rng.gamma(4, 5, (60, 5))
        return np.where(rng.random(size.shape) < rng.random((60, 1)), -size, size)

    apes, variances = [], []
    for _ in range(800):
        eigenvalues = sample()
        ape = eigenvalues[eigenvalues > 0].mean()
        units = positive_mean(eigenvalues)
        assert units.mean() == pytest.approx(ape)
        apes.append(ape)
        variances.append(units.var(ddof=1) / len(units))
    assert np.mean(variances) == pytest.approx(np.var(apes), rel=0.15)
    assert np.isnan(positive_mean(-np.ones((3, 5)))).all()
    assert np.isnan(positive_mean(np.array([[1.0, np.nan], [1, 1]]))).all()
