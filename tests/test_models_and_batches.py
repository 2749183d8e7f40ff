"""Batches, losses and models of every kind: operators and surfaces are of the same, right, loss."""

import copy
import random
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lossgeometry import (
    GGN,
    Fisher,
    FunctionModule,
    Hessian,
    gradient_direction,
    line,
    per_layer,
    random_directions,
)
from lossgeometry.errors import InputError
from tests.dense import (
    CLASSES,
    OPERATORS,
    assert_right,
    assert_same,
    dense_hessian,
    identity,
    make,
    rows,
)


class Language(nn.Module):
    """Next words of ragged sentences, weights tied, with a loss of its own where labels are."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Embedding(7, 3), nn.Linear(3, 3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, labels=None, attention_mask=None):
        logits = self.head(self.mix(self.embed(input_ids)).tanh().cumsum(1))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"logits": logits, "loss": loss}


def sentences(n=9):
    torch.manual_seed(0)
    ids = torch.randint(7, (n, 5))
    labels = ids.roll(-1, 1).where(torch.arange(5) < 1 + torch.arange(n)[:, None] % 5, -100)
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("own_loss", [True, False])
def test_batches_that_are_dictionaries_and_a_mean_over_tokens(own_loss):
    model, whole = Language().double(), sentences()
    loss = None
    if not own_loss:

        def loss(outputs, batch):
            return F.cross_entropy(outputs["logits"].flatten(0, 1), batch["labels"].flatten())

    def value():
        return model(**whole)["loss"]

    assert_right(model, loss, whole, value)

    def tokens(batch):
        return (batch["labels"] >= 0).sum()

    batches = [{key: t[i] for key, t in whole.items()} for i in (slice(0, 2), slice(2, 9))]
    assert_right(model, loss, batches, value, count=tokens)
    assert_right(model, loss, whole, value, count=tokens, micro_batch=2)
    with pytest.raises(InputError, match=r"micro_batch: 2 would change .* not the mean"):
        Hessian(model, loss, whole, micro_batch=2)


def test_fisher_of_sentences_is_a_sum_over_them_however_they_are_batched():
    model, whole = Language().double(), sentences()

    def loss(outputs, batch):
        return F.cross_entropy(outputs["logits"].mT, batch["labels"])

    def tokens(batch):
        return (batch["labels"] >= 0).sum()

    logits, labels = model(whole["input_ids"])["logits"], whole["labels"]
    losses = F.cross_entropy(logits.mT, labels, reduction="none").sum(1) / tokens(whole)
    J = rows(9 * losses, list(model.parameters()))
    for cuts in ([9], [2, 7], [1, 3, 5]):
        batches = [
            dict(zip(whole, parts, strict=True))
            for parts in zip(*(tensor.split(cuts) for tensor in whole.values()), strict=True)
        ]
        A = Fisher(model, loss, batches, count=tokens)
        assert_same(A @ identity(A), J.T @ J / 9)


def test_batches_of_other_kinds():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(40, 3).double(), torch.randn(40, 2).double()

    def value():
        return F.mse_loss(model(x), y)

    Pair = namedtuple("Pair", "inputs targets")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=7)
    for data in ((x.numpy(), y.numpy()), [x, y], loader, Pair(x, y), [Pair(x, y)], ((x,), y)):
        assert_right(model, F.mse_loss, data, value)
    triples = [(x[:9], y[:9], torch.arange(9)), (x[9:], y[9:], torch.arange(31))]
    assert_right(
        *(model, lambda outputs, batch: F.mse_loss(outputs, batch[1]), triples, value),
        forward=lambda model, batch: model(batch[0]),
    )
    assert_right(
        model, lambda z, _: z.square().mean(), [(x, None)], lambda: model(x).square().mean()
    )
    with pytest.raises(InputError, match="data: a batch of 3, expected"):
        Hessian(model, F.mse_loss, triples)
    with pytest.raises(InputError, match="loss_fn: none given, and the outputs have no loss"):
        Hessian(model, None, (x, y)).gradient()
    with pytest.raises(InputError, match="loss_fn: none given, expected one: GGN is of the"):
        GGN(model, None, (x, y))


def test_a_function_of_parameters_is_a_model():
    start = {"a.x": torch.tensor([1.0, -2.0]).double(), "b": torch.tensor(0.5).double()}
    rosenbrock = FunctionModule(
        lambda p: (1 - p["a.x"][0]) ** 2 + 100 * (p["a.x"][1] - p["b"] ** 2) ** 2, start
    )
    assert_right(rosenbrock, lambda z, _: z, ((), None), rosenbrock)
    H = Hessian(rosenbrock, None, ((), None))
    torch.testing.assert_close(H @ identity(H), dense_hessian(rosenbrock(), rosenbrock))
    with pytest.raises(InputError, match=r"model: a function, expected .* FunctionModule"):
        Hessian(lambda x: x, F.mse_loss, (torch.ones(1, 1), torch.ones(1, 1)))


def test_a_number_that_the_loss_does_not_use_has_zeros():
    model = FunctionModule(lambda p: p["a"] ** 2, {n: torch.tensor(1.0) for n in "ab"})
    H = Hessian(model, None, ((), None), params="b")
    assert torch.equal(H @ torch.ones(1), torch.zeros(1))


@pytest.mark.parametrize("operator", OPERATORS)
def test_outputs_of_more_than_two_dimensions_and_in_dictionaries(operator):
    torch.manual_seed(0)
    model, (x, y) = nn.Conv2d(1, CLASSES, 2).double(), (torch.randn(3, 1, 3, 3).double(), None)
    y = torch.randint(CLASSES, (3, 2, 2))
    parameters = list(model.parameters())
    logits = model(x)
    if operator == "fisher":
        losses = F.cross_entropy(logits, y, reduction="none").flatten()
        gradients = rows(losses, parameters)
        expected = gradients.T @ gradients / len(losses)
    else:
        z = logits.detach().requires_grad_()
        J = rows(logits, parameters)
        (slope,) = torch.autograd.grad(F.cross_entropy(z, y), z, create_graph=True)
        expected = J.T @ rows(slope, [z]) @ J  # the Hessian, too, of a linear model
    A = OPERATORS[operator](model, F.cross_entropy, (x, y), micro_batch=2)
    assert_same(A @ identity(A), expected)
    assert A.check().ok

    class Named(nn.Module):
        def __init__(self, last):
            super().__init__()
            self.conv, self.last = model, last

        def forward(self, image):
            out = self.conv(image)
            return {"out": out.movedim(1, -1) if self.last else out, "none": None}

    if operator != "fisher":  # for which each output is of an example, or of a class
        A = OPERATORS[operator](Named(False), lambda z, t: F.cross_entropy(z["out"], t), (x, y))
        assert_same(A @ identity(A), expected)
    else:
        last = Fisher(
            *(Named(True), lambda z, t: F.cross_entropy(z["out"].movedim(-1, 1), t), (x, y))
        )
        assert_same(last @ identity(last), expected)


def test_monte_carlo_fisher_of_every_position_is_the_ggn():
    torch.manual_seed(0)
    model, x = nn.Conv1d(1, CLASSES, 2).double(), torch.randn(3, 1, 6).double()
    y = torch.randint(CLASSES, (3, 5))
    y[0, :3] = -100  # ignored
    exact = GGN(model, F.cross_entropy, (x, y))
    found = Fisher(model, F.cross_entropy, (x, y), mc_samples=2000)
    assert_same(found @ identity(found), exact @ identity(exact), 0.05)


class Parts(nn.Module):
    """Parts that are computed anew in the backward pass, or not."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Tanh())
        self.second = nn.Sequential(nn.Flatten(), nn.Linear(18, 3), nn.Dropout(0.5), nn.Tanh())
        self.last = nn.Linear(3, CLASSES)
        self.reentrant = reentrant

    def forward(self, x):
        for part in (self.first, self.second):
            again = self.reentrant is not None
            x = checkpoint(part, x, use_reentrant=self.reentrant) if again else part(x)
        return self.last(x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("operator", OPERATORS.values())
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(operator, reentrant):
    torch.manual_seed(0)
    model = Parts(reentrant)
    plain = Parts()
    plain.load_state_dict(model.state_dict())
    before = copy.deepcopy(model.state_dict())
    data = torch.randn(6, 1, 4, 4), torch.arange(6) % CLASSES
    A, B = (operator(m, F.cross_entropy, data) for m in (model, plain))
    torch.testing.assert_close(A @ torch.eye(A.shape[0]), B @ torch.eye(A.shape[0]))
    assert A.check().ok
    direction = random_directions(model, 1, seed=0)[0]
    a, b = (
        line(m, {"nll": F.cross_entropy}, data, direction, [0, 1])["nll"] for m in (model, plain)
    )
    np.testing.assert_array_equal(a, b)
    gradients = [gradient_direction(m, F.cross_entropy, data) for m in (model, plain)]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    outputs = model.train()(data[0])  # outside, it is as it was
    if not reentrant:
        F.cross_entropy(outputs, data[1]).backward()
        assert int(model.first[1].num_batches_tracked) == 2


def test_transformers_have_no_way_of_their_own_in_evaluation():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 1)
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x, padding):
            return self.head(self.encoder(x, src_key_padding_mask=padding).mean(1))

    torch.manual_seed(0)
    model = Padded().double().eval()
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4], [2]])
    inputs, y = (torch.randn(4, 5, 4).double(), padding), torch.arange(4) % CLASSES
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        # With gradients, which is not the fast way.
        assert_right(
            *(model, F.cross_entropy, (inputs, y), lambda: F.cross_entropy(model(*inputs), y))
        )
    assert torch.backends.mha.get_fastpath_enabled()


def test_wrapped_models_are_those_inside():
    torch.manual_seed(0)
    model, data = nn.Linear(4, 3), (torch.randn(5, 4), torch.arange(5) % 3)
    H = Hessian(model, F.cross_entropy, data)
    direction = random_directions(model, 1, seed=0)[0]
    values = line(model, {"nll": F.cross_entropy}, data, direction, [0, 1])["nll"]
    inside = nn.Sequential(torch.compile(copy.deepcopy(model), backend="aot_eager"))
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="aot_eager"), inside):
        A = Hessian(wrapped, F.cross_entropy, data)
        torch.testing.assert_close(A @ torch.eye(15), H @ torch.eye(15))
        if wrapped is not inside:
            assert list(random_directions(wrapped, 1, seed=0)[0]) == ["weight"]
            found = line(wrapped, {"nll": F.cross_entropy}, data, direction, [0, 1])["nll"]
            np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("enabling", [False, True])
def test_models_that_differentiate_in_their_forward_pass(enabling):
    class Residual(nn.Sequential):
        def forward(self, t):
            t = t.detach().requires_grad_()
            with torch.set_grad_enabled(enabling or torch.is_grad_enabled()):
                u = super().forward(t)
                (slope,) = torch.autograd.grad(u.sum(), t, create_graph=True)
                (bend,) = torch.autograd.grad(slope.sum(), t, create_graph=True)
            return bend + u

    torch.manual_seed(0)
    model = Residual(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    t, zero = torch.linspace(0, 3, 80).double()[:, None], torch.zeros(80, 1).double()
    assert_right(model, F.mse_loss, (t, zero), lambda: F.mse_loss(model(t), zero))
    for operator in OPERATORS.values():
        assert operator(model, F.mse_loss, (t, zero)).check().ok


def test_frozen_parameters_are_constants():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    model[0].requires_grad_(False)
    x, y = torch.randn(9, 4).double(), torch.arange(9) % 3
    assert_right(model, F.cross_entropy, (x, y), lambda: F.cross_entropy(model(x), y))
    direction = random_directions(model, 1, seed=0, include="all")[0]
    assert list(direction) == ["2.weight", "2.bias"]
    found = line(model, {"nll": F.cross_entropy}, (x, y), direction, [0.0], weight_decay=2.0)
    assert found["l2"][0] == pytest.approx(
        sum(p.square().sum() for p in model[2].parameters()).item()
    )
    assert [name for name, _ in per_layer(Hessian, model, F.cross_entropy, (x, y))] == ["2"]
    model.requires_grad_(False)
    for use in (
        lambda: Hessian(model, F.cross_entropy, (x, y)),
        lambda: random_directions(model, seed=0),
    ):
        with pytest.raises(InputError, match=r"no parameter requires a gradient, .*requires_grad_"):
            use()


def test_what_cannot_be_is_refused_in_one_line():
    data = torch.randn(4, 3), torch.arange(4) % 3
    waves = nn.Linear(3, 3, dtype=torch.complex64)
    for use in (
        lambda: Hessian(waves, F.mse_loss, data),
        lambda: random_directions(waves, seed=0),
        lambda: line(waves, {"mse": F.mse_loss}, data, {}, [0.0]),
    ):
        with pytest.raises(InputError, match="model: parameter weight is complex"):
            use()
    with torch.inference_mode():
        untrainable = nn.Linear(3, 3)
    linear = nn.Linear(3, 3)
    for model, loss, given, complaint in (
        (nn.LazyLinear(3), F.cross_entropy, data, "model: parameter weight has no values yet"),
        (nn.Linear(3, 3, device="meta"), F.cross_entropy, data, "model: .* no values yet"),
        (untrainable, F.cross_entropy, data, "model: parameter weight was made in torch.inference"),
        (torch.jit.trace(linear, data[0]), F.cross_entropy, data, "model: made by TorchScript"),
        (linear, lambda *_: None, data, "loss_fn: it returns None"),
        (linear, lambda z, _: z.sum() * 1j, data, "loss_fn: a result of torch.complex64"),
        (linear, lambda z, _: z.sum(1), data, r"loss_fn: a result of shape \(4,\)"),
        (linear, F.cross_entropy, None, "data: a NoneType, expected"),
        (linear, lambda z, y: F.cross_entropy(z, y) + linear.weight.norm(), data, "uses the model"),
        (linear, lambda z, y: F.mse_loss(z, linear(data[0] + 1)), data, "uses the model's param"),
    ):
        for use in (
            lambda: Hessian(model, loss, given).gradient(),  # noqa: B023
            lambda: line(model, {"loss": loss}, given, {}, [0.0]),  # noqa: B023
        ):
            with pytest.raises(InputError, match=complaint):
                use()
    H = Hessian(linear, F.cross_entropy, data)
    with torch.inference_mode():
        for use in (lambda: H @ torch.ones(12), H.gradient):
            with pytest.raises(InputError, match=r"torch.inference_mode: nothing has a derivative"):
                use()
    bag, renormed = nn.EmbeddingBag(3, 3), nn.Embedding(3, 3, max_norm=0.1)
    before = renormed.weight.detach().clone()
    words = torch.randint(3, (4, 2)), data[1]
    for model, complaint in (
        (bag, "PyTorch has no second derivative of embedding_bag, expected layers"),
        (Called(OnceDifferentiable.apply), "an autograd function that is once_differentiable"),
        (nn.Sequential(renormed, nn.Flatten()), r"max_norm=0.1 changes its weights as it is used"),
    ):
        with pytest.raises(InputError, match=f"model: .*{complaint}"):
            H = Hessian(model, F.cross_entropy, data if isinstance(model, Called) else words)
            H @ torch.ones(H.shape[0])
    torch.testing.assert_close(renormed.weight.detach(), before, rtol=0, atol=0)


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


def test_what_a_model_keeps_of_its_first_call_can_be_trained_with():
    class Rotated(nn.Linear):
        angles = None

        def forward(self, x):
            if self.angles is None:
                self.angles = torch.arange(CLASSES).to(x).cos()
            return super().forward(x) * self.angles

    model, x, y = Rotated(3, CLASSES), torch.randn(4, 3), torch.arange(4) % CLASSES
    still = {"weight": torch.zeros(CLASSES, 3)}
    found = line(model, {"nll": F.cross_entropy}, (x, y), still, [0.0, 1.0])["nll"]
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    assert found == pytest.approx([loss.item()] * 2)


def test_what_a_loss_needs_of_the_model_is_returned_by_forward():
    model, _, x, y = make("conv")

    def penalised(model, batch):
        return model(batch[0]), sum(p.square().square().sum() for p in model.parameters())

    def loss_fn(outputs, targets):
        return F.cross_entropy(outputs[0], targets) + outputs[1]

    data = [(x[:3], y[:3]), (x[3:], y[3:])]
    value = lambda: loss_fn(penalised(model, (x, y)), y)  # noqa: E731
    assert_right(model, loss_fn, data, value, forward=penalised)


class Called(nn.Linear):
    """A linear layer, and a function of its outputs."""

    def __init__(self, function):
        super().__init__(3, CLASSES)
        self.function = function

    def forward(self, x):
        return self.function(super().forward(x))


@pytest.mark.parametrize(
    ("given", "same"),
    [
        (nn.Hardsigmoid(), lambda z: (z / 6 + 0.5).clamp(0, 1)),
        (nn.Hardswish(), lambda z: z * (z / 6 + 0.5).clamp(0, 1)),
        (nn.Hardsigmoid(inplace=True), lambda z: (z / 6 + 0.5).clamp(0, 1)),
        (nn.Hardswish(inplace=True), lambda z: z * (z / 6 + 0.5).clamp(0, 1)),
    ],
)
def test_activations_without_a_second_derivative_are_written_out(given, same):
    torch.manual_seed(0)
    model, other = Called(given).double(), Called(same).double()
    other.load_state_dict(model.state_dict())
    x, y = 3 * torch.randn(9, 3).double(), torch.arange(9) % CLASSES
    found, exact = (Hessian(m, F.cross_entropy, (x, y)) for m in (model, other))
    assert_same(found @ identity(found), exact @ identity(found))
    values = line(model, {"nll": F.cross_entropy}, (x, y), {}, [0.0])["nll"]
    assert values[0] == pytest.approx(F.cross_entropy(other(x), y).item(), rel=1e-12)
    assert F.hardsigmoid(torch.zeros(())).item() == 0.5  # PyTorch's own is back


def parametrised(linear):
    return nn.utils.parametrizations.weight_norm(linear)


@pytest.mark.parametrize("normalise", [parametrised, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weight_norm_whose_second_derivative_pytorch_has_wrong(normalise):
    torch.manual_seed(0)
    model = nn.Sequential(normalise(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(9, 4).double(), torch.arange(9) % 3
    H = Hessian(model, F.cross_entropy, (x, y))
    matrix = H @ identity(H)
    torch.testing.assert_close(matrix, matrix.T)
    assert H.check().ok


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(3), nn.InstanceNorm2d(3, affine=True)])
def test_normalisation_of_one_image_whose_gradient_pytorch_has_wrong(norm):
    """Where the gradient that comes to it is not contiguous; batches of 3 are cut into 2 and 1."""
    torch.manual_seed(0)

    class Tokens(nn.Sequential):
        def forward(self, x):
            return super().forward(x).flatten(2).transpose(1, 2).mean(1)

    model = Tokens(nn.Conv2d(1, 3, 3, padding=1), norm, nn.CELU()).double().eval()
    x, y = torch.randn(3, 1, 4, 4).double(), torch.arange(3)
    H = Hessian(model, F.cross_entropy, (x, y), micro_batch=2)
    assert_same(H @ identity(H), dense_hessian(F.cross_entropy(model(x), y), model))
    assert H.check().ok


@pytest.mark.parametrize("seed", range(3))
def test_normalisation_of_half_precision_is_rounded_no_more_than_pytorchs_own(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.Softplus(), nn.LPPool2d(2, 2), nn.InstanceNorm2d(4)),
        *(nn.LogSigmoid(), nn.AdaptiveMaxPool2d(1), nn.Flatten()),
    )
    half, precise = (copy.deepcopy(model.bfloat16()).to(t) for t in (torch.bfloat16, torch.double))
    x, y = torch.randn(2, 1, 8, 8).mul(0.1).bfloat16(), torch.arange(2)
    V = torch.randn(40, 5).bfloat16()
    exact = dense_hessian(F.cross_entropy(precise(x.double()), y), precise) @ V.double()
    own = dense_hessian(F.cross_entropy(half(x), y), half) @ V
    found = Hessian(half, F.cross_entropy, (x, y)) @ V
    assert (found - exact).norm() <= (own - exact).norm()


@pytest.mark.parametrize("how", [dict(sparse=True), dict(scale_grad_by_freq=True)])
def test_embeddings_have_the_derivative_of_the_loss(how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(4, 3, **how), nn.Flatten(), nn.Linear(6, 3)).double()
    plain = nn.Sequential(nn.Embedding(4, 3), nn.Flatten(), nn.Linear(6, 3)).double()
    plain.load_state_dict(model.state_dict())
    data = torch.randint(4, (9, 2)), torch.arange(9) % 3
    A, B = (Hessian(m, F.cross_entropy, data) for m in (model, plain))
    assert_same(A @ identity(A), B @ identity(B), 1e-12)
    assert_same(A.gradient(), B.gradient(), 1e-12)


@pytest.mark.parametrize("draw", [random.random, np.random.random])
def test_numbers_that_python_and_numpy_draw_are_frozen(draw):
    class Dropping(nn.Linear):
        def forward(self, x):
            return super().forward(x) if draw() < 0.5 else x + super().forward(x)

    torch.manual_seed(0)
    model = nn.Sequential(*(Dropping(3, 3) for _ in range(5))).double()
    x, y = torch.randn(40, 3).double(), torch.arange(40) % 3
    states = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    H = Hessian(model, F.cross_entropy, (x, y))
    v = torch.randn(60).double()
    torch.testing.assert_close(H @ v, Hessian(model, F.cross_entropy, (x, y)) @ v)
    assert H.draws()
    assert H.check().ok
    direction = gradient_direction(model, F.cross_entropy, (x, y))
    slope = sum((piece * piece).sum() for piece in direction.values()).item()
    h = 1e-5
    values = line(model, {"nll": F.cross_entropy}, (x, y), direction, [-h, h])["nll"]
    assert (values[1] - values[0]) / (2 * h) == pytest.approx(slope, rel=1e-6)
    assert states == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002


def test_a_loss_that_draws_draws_once():
    """The GGN of outputs of which the loss takes some."""
    torch.manual_seed(0)
    model = Several().double()
    x, y = torch.randn(9, 3).double(), torch.arange(9) % 3

    def loss(outputs, y):
        scores = outputs["scores"] if isinstance(outputs, dict) else outputs
        return F.cross_entropy(scores + torch.randn(scores.shape).double(), y)

    found = GGN(model, loss, (x, y))
    exact = GGN(model.scores, loss, (x, y))
    assert_same(found @ identity(found), exact @ identity(exact), 1e-12)


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.scores = nn.Linear(3, CLASSES)

    def forward(self, x):
        return {"scores": self.scores(x), "inputs": x}


@pytest.mark.parametrize("operator", OPERATORS.values())
def test_layers_that_are_not_used_have_blocks_of_zeros(operator):
    class Spare(nn.Sequential):
        def forward(self, x):
            return self[0](x)

    torch.manual_seed(0)
    model, data = Spare(nn.Linear(4, 3), nn.Linear(2, 2)), (torch.randn(5, 4), torch.arange(5) % 3)
    for name, block in per_layer(operator, model, F.cross_entropy, data):
        assert (block @ torch.eye(block.shape[0])).any() == (name == "0")
        assert block.check().ok


def test_what_belongs_to_no_example_keeps_batches_whole():
    model = Language().double()

    def forward(model, batch):
        return model(batch["input_ids"], batch["labels"])

    data = [{**sentences(n), "language": "en", "step": torch.tensor(3)} for n in (4, 9)]
    assert_right(
        *(model, None, data),
        lambda: sum(n / 13 * forward(model, sentences(n))["loss"] for n in (4, 9)),
        forward=forward,
    )
    with pytest.raises(InputError, match=r"micro_batch: 2 .* not all of a batch belongs to single"):
        Hessian(model, None, data, forward=forward, micro_batch=2)


def test_models_and_losses_may_write_to_what_they_are_given():
    class Scaling(nn.Linear):
        def forward(self, x):
            return super().forward(x.mul_(2))

    def loss(outputs, y):
        return F.cross_entropy(outputs, y.add_(1).remainder_(CLASSES))

    torch.manual_seed(0)
    model, x, y = Scaling(3, CLASSES).double(), torch.randn(40, 3).double(), torch.arange(40) % 3
    before = x.clone(), y.clone()

    def value():
        return loss(F.linear(2 * x, model.weight, model.bias), y.clone())

    assert_right(model, loss, (x, y), value)
    torch.testing.assert_close((x, y), before, rtol=0, atol=0)
