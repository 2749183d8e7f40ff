"""Surfaces published as tables of numbers."""

import numpy as np
import pytest

from analysis.drawing.published import draw, read_surface
from analysis.published import Options, main
from lossgeometry import InputError

LINES = [f"{x},{y},9,{10 * x + y},{x + 10 * y},0.5\n" for y in (0.0, 0.1) for x in (-1, 0, 1)]


def test_reads_a_grid_in_any_order(tmp_path):
    path = tmp_path / "resnet.csv"
    path.write_text("".join(reversed(LINES)))
    surface = read_surface(path)
    assert surface.title == "resnet"
    x, y = np.meshgrid([-1, 0, 1], [0.0, 0.1])
    np.testing.assert_allclose(surface.values, (x + 10 * y) + 0.05 * (10 * x + y))
    np.testing.assert_allclose(surface.xs, [-1, 0, 1])
    np.testing.assert_allclose(surface.ys, [0.0, 0.1])


def test_the_papers_networks_have_their_names(tmp_path):
    for name, words in {"fig1a_vit_ti": "ViT-Ti", "fig1a_resnet50": "ResNet-50"}.items():
        path = tmp_path / f"{name}.csv"
        path.write_text("".join(LINES))
        assert read_surface(path).title == words


def test_infinities_are_holes(tmp_path, capsys):
    path = tmp_path / "resnet.csv"
    path.write_text("".join(LINES[1:]) + "-1,0,9,3,inf,0.5\n")
    assert np.isinf(read_surface(path).values[0, 0])
    main(Options(csv=(path,), measurements=tmp_path, out=tmp_path / "figures"))
    out = capsys.readouterr().out
    assert "resnet: (2, 3) points, 1 of them not finite" in out
    assert (tmp_path / "figures" / "published_surfaces.png").exists()
    figure = draw({"published": [read_surface(path)]}, "contours", log=False)
    assert figure.axes[0].get_title() == "published, resnet"


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (LINES[:-1], "5 points, expected each of a 2 x 3 grid once"),
        ([*LINES[:-1], LINES[0]], "6 points, expected each of a 2 x 3 grid once"),
        (["1,2,3\n"], r"a table of \(1, 3\), expected x, y, L1, L2, NLL"),
        (["x,y\n"], "could not convert string"),
    ],
)
def test_other_tables_are_refused(tmp_path, lines, complaint):
    path = tmp_path / "bad.csv"
    path.write_text("".join(lines))
    with pytest.raises(InputError, match=complaint):
        read_surface(path)
