"""The engine by itself: beside packages that have our names, without what only the study needs."""

import os
import subprocess
import sys

PROGRAM = """
import sys

STUDY = ("torchvision", "tyro", "rich", "filelock", "sklearn", "safetensors", "pyhessian")
STUDY += ("lightning", "transformers")

class WithoutTheStudy:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in STUDY:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, WithoutTheStudy())
import lossgeometry

assert not {"torch", "matplotlib"} & set(sys.modules)
lossgeometry.plots.plot_contours
assert "torch" not in sys.modules
for name in lossgeometry.__all__:
    getattr(lossgeometry, name)

import analysis, models, torch
from torch.nn.functional import cross_entropy

batch = (torch.randn(6, 4), torch.randint(3, (6,)))
H = lossgeometry.Hessian(models.network(), cross_entropy, batch)
assert lossgeometry.eigsh(H, k=2).converged.all()
try:
    lossgeometry.max_eigenvalue_spectrum(
        models.network(), cross_entropy, [batch], k=1, solver="pyhessian"
    )
except lossgeometry.InputError as error:
    print(error)
"""


def test_stands_alone(tmp_path):
    for package in ("analysis", "models"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(
            "from torch import nn\n\n\ndef network():\n    return nn.Linear(4, 3)\n"
        )
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "solver: pyhessian is not installed, expected pip install pyhessian\n"
