"""The commands of the package, and options with which they take a moment."""

COMMANDS = (
    *("models.train", "analysis.hessian", "analysis.landscape", "analysis.nll", "analysis.figures"),
    *("analysis.published", "analysis.robustness", "analysis.claims", "analysis.study"),
)
SMALL = {
    "analysis.hessian": "--k 2 --batches 2 --density-batches 2 --probes 2 --steps 4".split(),
    "analysis.landscape": "--batches 1 --points 3 --line-points 5 --lines 2".split(),
    "analysis.nll": [],
}
