import copy

import pytest
import torch
from torch import Tensor, nn

from lossgeometry.functional import functional_call


class Shared(nn.Module):
    """A module under two names, a parameter in two modules, a buffer that is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        x = self.norm(self.tied(self.again(self.first(x)).tanh()))
        if fail:
            raise RuntimeError
        return self.scale * x


@pytest.mark.parametrize("fail", [False, True])
def test_shared_modules_and_tied_parameters_move_together_and_are_put_back(fail: bool) -> None:
    model = Shared()
    x = torch.randn(5, 3)
    places = [(m, key, t) for m in model.modules() for key, t in m._parameters.items()]
    state = copy.deepcopy(model.state_dict())
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.5)
    tensors = {name: p.detach() + 0.5 for name, p in model.named_parameters()}
    tensors |= {name: b.clone() for name, b in model.named_buffers()}
    if fail:
        with pytest.raises(RuntimeError):
            functional_call(model, tensors, x, True)
    else:
        torch.testing.assert_close(functional_call(model, tensors, x), moved(x), rtol=0, atol=0)
        assert tensors["norm.num_batches_tracked"] == 1
    assert all(module._parameters[key] is parameter for module, key, parameter in places)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
