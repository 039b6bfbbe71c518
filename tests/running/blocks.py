"""A model of equal blocks, and graphs as Dynamo gives them for one of the blocks."""

from __future__ import annotations

from types import SimpleNamespace

from graphs import Builder
from torch import nn
from torch.fx import GraphModule, Node

# Dynamo's name of the parameter by which a block is told.
WEIGHT = "L['self']._modules['proj']._parameters['weight']"


def comes_from(node: Node, source: str, example) -> None:
    """Note on a graph input which variable of the user it came from."""
    node.meta["grapharg"] = SimpleNamespace(source=SimpleNamespace(name=source), example=example)


class Block(nn.Module):
    def __init__(self, shared=None):
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.shared = shared


class Model(nn.Module):
    def __init__(self, blocks=3, shared=None):
        super().__init__()
        self.blocks = nn.ModuleList(Block(shared) for _ in range(blocks))


def graph_of(*inputs) -> GraphModule:
    """A graph as Dynamo gives it; inputs are (source, tensor), or None for what is no parameter."""
    b = Builder()
    nodes = [b.input(f"x{i}", 4) for i in range(len(inputs))]
    for node, given in zip(nodes, inputs, strict=True):
        if given is not None:
            comes_from(node, *given)
    return b.module(*nodes)
