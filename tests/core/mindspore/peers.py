"""The MindSpore decoder with the weights of a torch decoder or of transformers' model, and what tests feed it."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import torch
from mindspore import Tensor

from research.core.mindspore.decoder import Decoder
from research.core.mindspore.layout import Layout


def as_tensor(array) -> Tensor:
    """int32 for integers, float32 for floats."""
    array = array.numpy() if isinstance(array, torch.Tensor) else np.asarray(array)
    return Tensor(array.astype(np.float32 if np.issubdtype(array.dtype, np.floating) else np.int32))


def twin(ours: torch.nn.Module, **options) -> Decoder:
    """A MindSpore decoder of the torch decoder's spec and weights."""
    decoder = Decoder(ours.spec, **options)
    parameters = {p.name: p for p in decoder.get_parameters()}
    theirs = dict(ours.named_parameters())
    assert parameters.keys() == theirs.keys()
    for name, parameter in parameters.items():
        value = theirs[name].detach()
        assert tuple(parameter.shape) == tuple(value.shape), name
        parameter.set_data(Tensor(value.float().numpy(), parameter.dtype))
    return decoder


def layout_inputs(layout: Layout) -> tuple[Tensor, Tensor]:
    return Tensor(layout.positions), Tensor(layout.documents)


class Gradients(ms.nn.Cell):
    """``net``'s first output and the gradients of its trainable parameters."""

    def __init__(self, net):
        super().__init__(auto_prefix=False)  # parameters keep their names
        self.net = net
        self.weights = ms.ParameterTuple(net.trainable_params())
        self.grad = ms.value_and_grad(net, None, self.weights, has_aux=True)

    def construct(self, *inputs):
        return self.grad(*inputs)
