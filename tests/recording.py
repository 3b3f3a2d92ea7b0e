"""A stand-in for CUDA graphs: what was called on tensors is called again, and no Python."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """Notes what is called on tensors, and the values of those that are written to."""

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}

    def __torch_dispatch__(self, function, _, arguments=(), named=None):
        named = named or {}
        for place, argument in enumerate(function._schema.arguments):
            if argument.alias_info and argument.alias_info.is_write:
                given = arguments[place] if place < len(arguments) else named.get(argument.name)
                for tensor in tree_leaves(given):
                    self.before.setdefault(tensor.data_ptr(), (tensor, tensor.clone()))
        output = function(*arguments, **named)
        self.calls.append((function, arguments, named, output))
        return output


def captured_stand_in(function, pool):
    """Like `captured`: repeats calls on tensors, and no Python; changes nothing itself."""
    torch.rand(3)  # capturing draws from the generator
    with Recorder() as recorder:
        outputs = function()
    for tensor, value in recorder.before.values():
        tensor.detach().copy_(value)

    @torch.no_grad()
    def replay():
        for call, arguments, named, output in recorder.calls:
            again = call(*arguments, **named)
            for place, value in zip(tree_leaves(output), tree_leaves(again), strict=True):
                if isinstance(place, torch.Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)
        return outputs

    return replay
