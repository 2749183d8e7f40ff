"""Networks of one skeleton: what their mixers see, what they compute, and their sizes."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from analysis.plan import blank_dataset
from lossgeometry import GGN, Hessian, InputError
from models import CSAN
from models.depthwise import DepthwiseConvolution
from models.description import token_range
from models.networks import (
    NETWORKS,
    build_network,
    count_parameters,
)
from models.replknet import LargeKernel, fold
from models.train import Options, untrained
from models.van import large_kernel_attention
from tests.dense import assert_same, dense, some_vectors

SMALL = dict(image_size=4, channels=1, classes=3, patch_size=1, dim=3, depth=1, mlp_ratio=1.0)
KERNELS = {
    "convnext": [dict(kernel_size=k) for k in (3, 5, 15)],
    "replknet": [dict(kernel_size=k) for k in (3, 5, 15)],
    "van": [dict(kernel_size=k, dilation=d) for k, d in ((3, 1), (5, 1), (4, 2), (15, 3))],
    "gated": [dict(kernel_size=k) for k in (3, 5, 15)],
}
CONVOLUTIONS = [(name, kernel) for name, kernels in KERNELS.items() for kernel in kernels]


def network(name, **options):
    """In evaluation mode, with parameters and statistics that are not those of a fresh network."""
    model = build_network({"network": name, **options}).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("grid", [5, 8, 9])  # the largest is no product of matrices
@pytest.mark.parametrize(("kernel_size", "dilation"), [(1, 1), (3, 1), (5, 2), (4, 2), (15, 1)])
def test_depthwise_convolution_is_that_of_pytorch(grid, kernel_size, dilation):
    layer = DepthwiseConvolution(6, grid, kernel_size, dilation=dilation).double()
    x = torch.randn(2, grid**2, 6, dtype=torch.float64)
    images = x.transpose(1, 2).unflatten(2, (grid, grid))
    padding = dilation * (kernel_size - 1) // 2
    expected = F.conv2d(
        images, layer.weight, layer.bias, padding=padding, dilation=dilation, groups=6
    )
    torch.testing.assert_close(
        layer(x), expected.flatten(2).transpose(1, 2), rtol=1e-12, atol=1e-12
    )


def seen(mix, grid, dim):
    """On which tokens the output at each token depends, (row, column, row, column)."""
    x = torch.randn(1, grid**2, dim, dtype=torch.float64)
    derivative = torch.autograd.functional.jacobian(mix, x).abs().sum((0, 2, 3, 5))
    return (derivative > 1e-13).view(grid, grid, grid, grid)


def square(grid, reach):
    """The square of so many tokens along each side, around each token."""
    distance = (torch.arange(grid)[:, None] - torch.arange(grid)).abs()
    near = distance <= reach // 2
    return near[:, None, :, None] & near[None, :, None, :]


@pytest.mark.parametrize(("name", "kernel"), CONVOLUTIONS)
def test_a_block_sees_the_range_that_its_network_states_and_nothing_beyond(name, kernel):
    sizes = {**SMALL, "image_size": 8, "dim": 4}
    model = network(name, **sizes, **kernel)
    block = model.blocks[0]
    assert torch.equal(seen(block.mixer, 8, 4), square(8, model.range))
    assert not (seen(block, 8, 4) & ~square(8, model.range)).any()
    assert model.range == {4: 5}.get(kernel["kernel_size"], kernel["kernel_size"])


@pytest.mark.parametrize("window", [3, 5, 8])
def test_attention_states_its_range_likewise(window):
    model = CSAN(**{**SMALL, "image_size": 8, "dim": 4}, heads=2, window=window).double()
    sees = seen(model.blocks[0], 8, 4)
    assert torch.equal(sees[3:5, 3:5], square(8, model.range)[3:5, 3:5])  # far from the border
    assert model.range == {8: 15}.get(window, window)


def test_which_weights_depend_on_the_data():
    depend = {name: NETWORKS[name].data_dependent for name in ("csan", *KERNELS)}
    assert depend == dict(csan=True, convnext=False, replknet=False, van=True, gated=True)
    # A static mixer is linear.
    x, y = torch.randn(2, 1, 64, 4, dtype=torch.float64)
    for name, kernels in KERNELS.items():
        mixer = network(name, **{**SMALL, "image_size": 8, "dim": 4}, **kernels[0]).blocks[0].mixer
        if depend[name]:
            mixer = mixer[2]
        zero = mixer(torch.zeros_like(x))
        linear = torch.allclose(mixer(x + y) - zero, mixer(x) + mixer(y) - 2 * zero)
        assert linear != depend[name]


@pytest.mark.parametrize(("kernel_size", "dilation", "reach"), [(21, 3, 23), (7, 2, 9), (5, 1, 5)])
def test_the_decomposition_is_a_plain_kernel_of_the_same_receptive_field(
    kernel_size, dilation, reach
):
    """Where the border is too far away to be seen."""
    grid = 2 * reach + 1
    gate = large_kernel_attention(2, grid, kernel_size, dilation).double()
    assert gate.range == reach
    first, second = gate.depthwise
    # The kernel is the answer to an impulse, turned around.
    impulse = torch.zeros(1, grid**2, 2, dtype=torch.float64)
    impulse[:, grid**2 // 2] = 1
    with torch.no_grad():
        answer = gate.depthwise(impulse) - gate.depthwise(torch.zeros_like(impulse))
    images = answer.transpose(1, 2).unflatten(2, (grid, grid))[0]
    middle = slice(grid // 2 - reach // 2, grid // 2 + reach // 2 + 1)
    kernel = images[:, middle, middle].flip(1, 2)
    assert (kernel != 0).all()
    assert images.count_nonzero() == kernel.numel()
    plain = DepthwiseConvolution(2, grid, reach).double()
    plain.weight.data = kernel[:, None]
    plain.bias.data = first.bias * second.weight.sum((1, 2, 3)) + second.bias
    x = torch.randn(1, grid**2, 2, dtype=torch.float64)
    found, expected = (
        f(x).unflatten(1, (grid, grid))[:, middle, middle] for f in (gate.depthwise, plain)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    inside = torch.autograd.functional.jacobian(lambda x: gate(x)[0, grid**2 // 2].sum(), x)
    assert (inside[0].abs().sum(1) > 0).sum() == reach**2


@pytest.mark.parametrize("kernel_size", [3, 5, 7, 15])
def test_folding_replknet_keeps_the_function(kernel_size):
    model = network("replknet", **{**SMALL, "depth": 3, "dim": 6}, kernel_size=kernel_size)
    before = copy.deepcopy(model.state_dict())
    one = fold(model)
    x = torch.randn(5, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(one(x), model(x), rtol=1e-10, atol=1e-12)
    assert count_parameters(one) < count_parameters(model)
    assert not any(isinstance(module, LargeKernel) for module in one.modules())
    assert one.range == model.range
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "kernel"), CONVOLUTIONS)
def test_products_are_those_of_the_dense_matrix(name, kernel, training):
    """In training mode BatchNorm has the statistics of the batch."""
    model = network(name, **SMALL, **kernel).train(training)
    x, y = torch.randn(5, 1, 4, 4, dtype=torch.float64), torch.randint(0, 3, (5,))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for kind, operator in (("hessian", Hessian), ("ggn", GGN)):
        products = operator(model, F.cross_entropy, [(x, y)])
        V = some_vectors(products)
        found = products @ V
        assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())
        assert_same(found, dense(kind, copy.deepcopy(model), F.cross_entropy, x, y) @ V)


@pytest.mark.parametrize("dataset", ["digits", "cifar100"])
@pytest.mark.parametrize("name", KERNELS)
def test_a_larger_kernel_takes_nothing_from_the_rest_of_the_network(name, dataset):
    """With one of 5 a network is as large as the CSAN; with others the kernel alone differs."""

    def parameters(name, kernel_size=None):
        asked = Options("a.pt", name, kernel_size=kernel_size, dataset=dataset, mlp_ratio=4.0)
        with torch.device("meta"):
            start = untrained(asked, blank_dataset(asked))
        return {key: p.shape for key, p in start.model.named_parameters()}

    sizes = {k: parameters(name, k) for k in (3, 5, 15)}
    five = sum(map(math.prod, sizes[5].values()))
    csan = sum(map(math.prod, parameters("csan").values()))
    assert five == pytest.approx(csan, rel=0.002 if dataset == "digits" else 0.001)
    for kernel_size, own in sizes.items():
        differ = {key for key in sizes[5] if own[key] != sizes[5][key]}
        assert all(own[key][:2] == sizes[5][key][:2] and len(own[key]) == 4 for key in differ)
        assert (kernel_size == 5) == (not differ)


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("transformer", {}, "network: 'transformer' is not usable, expected one of csan, convnext"),
        ("convnext", dict(kernel_size=4), "kernel_size: 4 .*centre"),
        ("convnext", dict(kernel_size=0), "kernel_size: 0"),
        ("replknet", dict(kernel_size=1), "kernel_size: 1 .*at least 3"),
        ("van", dict(kernel_size=10, dilation=3), "kernel_size: 10 .*4 x 4 with dilation 3"),
        ("van", dict(kernel_size=5, dilation=0), "dilation: 0"),
        ("gated", dict(kernel_size=3, dim=0), "dim: 0"),
        ("gated", dict(kernel_size=2**14 + 1), "dim: 3 .*weights"),
    ],
)
def test_options_out_of_range_are_named(name, options, complaint):
    with pytest.raises(InputError, match=f"^{complaint}"):
        build_network({"network": name, **SMALL, **options})


@pytest.mark.parametrize(("name", "kernel"), [*CONVOLUTIONS, ("csan", dict(window=3, heads=3))])
def test_the_range_is_known_without_building_a_network(name, kernel):
    for image_size in (4, 32):
        architecture = {**SMALL, "image_size": image_size, **kernel}
        if name != "csan":
            architecture["network"] = name
        with torch.device("meta"):
            assert token_range(architecture) == build_network(architecture).range
