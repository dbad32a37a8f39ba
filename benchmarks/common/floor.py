"""The floor of a training step: what it must compute and move, layer by layer, and how long that
takes. Counted on the traced network.

With x the input of a layer, y its result and z what follows from y by batch norm, addition and
activation, all in the precision of the training:

- forward: the convolution reads x and writes y; BN's statistics are a pass of their own over y,
  since they need all of it before the first pixel can be normalised; then one pass reads y (and
  what is added to it) and writes z.
- backward: one pass for BN's two sums reads dz and y; one more reads both again and writes dy; the
  convolution's gradient of x reads dy and writes dx, that of the weights reads dy and x. A tensor
  with several readers has its gradients added as the later ones are written: read once more each.
- pools read and write in both directions, and are not fused with their neighbours.
- weights, once a step: 20 bytes each for the update (weight, gradient and momentum read; weight and
  momentum written), and what the layers read and write of them, with a cast to 16 bits where the
  training has it.

That is perfect fusion of BN, addition and activation, and no cache that keeps a tensor from one
pass to the next. Left out, all small: sign bits of ReLU, indices of max-pools, BN's vectors, the
loss. A layer takes the longer of its two times, as if its passes overlapped; layers follow one
another.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import flop_registry

from fastimagenet.models import build_model
from fastimagenet.recipes.recipe import Recipe

UPDATE_BYTES = 20
"""Of a weight: fused SGD reads weight, gradient and momentum and writes two of them, in fp32."""
WEIGHT_BYTES = {2: UPDATE_BYTES + 4 + 2 + 2 + 2 + 4, 4: UPDATE_BYTES + 4 + 4 + 4}
"""By bytes an activation: the update; in 16 bits the cast's reading and writing; the reading in the
forward and backward pass; the gradient written in fp32."""
NUM_CLASSES = 1000
"""Of ImageNet."""
TRACED = 2
"""Images a batch while tracing: BN refuses to train on a single value a channel."""

aten = torch.ops.aten
NORMS = (aten.native_batch_norm.default,)
POINTWISE = (
    *(aten.relu.default, aten.relu_.default, aten.silu.default, aten.gelu.default),
    *(aten.add.Tensor, aten.add_.Tensor, aten.mul.Tensor, aten.div.Tensor),
)
VIEWS = (
    *(operator.getitem, aten.alias.default, aten.view.default, aten.t.default),
    aten.detach.default,  # torch 2.11 has it where later ones have alias
)


@dataclass(kw_only=True)
class Layer:
    """A convolution, linear layer or pool, with the BN, addition and activation behind it."""

    image_size: int
    """Height of the result."""
    flops: int = 0
    """Of a step, for one image; a multiply-add is two."""
    values: int = 0
    """Of activations and their gradients, read and written in a step, for one image."""
    weights: int = 0

    def bytes(self, batch_size: int, width: int) -> float:
        """Compute the bytes of a step for one image; `width`: bytes of an activation."""
        return self.values * width + self.weights * WEIGHT_BYTES[width] / batch_size


@dataclass
class Value:
    """An activation for one image."""

    size: int
    layer: Layer
    readers: int
    group: Group | None = None
    """The fused pass that gives it."""
    is_image: bool = False


@dataclass
class Group:
    """BN, additions and activations that one pass can do."""

    size: int = 0
    """Of the result."""
    normed: list[Value] = field(default_factory=list)
    plain: list[Value] = field(default_factory=list)
    """Inputs through BN, and all others."""

    def absorb(self, value: Value) -> None:
        """Take an input, or the pass that it comes from where nothing else reads it."""
        if value.group is None or value.readers > 1:
            self.plain.append(value)
            return
        self.normed += value.group.normed
        self.plain += value.group.plain
        value.group.size = 0

    def values(self) -> int:
        """Read and written, forward and backward."""
        normed = sum(value.size for value in self.normed)
        plain = sum(value.size for value in self.plain)
        forward = normed + (normed + plain + self.size)
        if self.normed:  # what is only added passes the gradient on as it is
            return forward + (self.size + normed) + (self.size + normed + normed)
        return forward + self.size + plain + plain


class Count:
    """Walks over the traced operations and counts."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.values: dict[Node, Value] = {}
        self.groups: list[tuple[Group, Layer]] = []

    def add(self, node: Node) -> None:
        """Count one operation."""
        inputs = [arg for arg in node.args if isinstance(arg, Node)]
        known = [self.values[arg] for arg in inputs if arg in self.values]
        if node.op == "placeholder":
            image = Value(elements(node), Layer(image_size=height(node)), readers(node))
            image.is_image = True
            self.values[node] = image
        elif not known:
            return
        elif node.target in VIEWS:
            self.values[node] = known[0]
        elif node.target in (*NORMS, *POINTWISE):
            self.fuse(node, known)
        else:
            weight = next((arg for arg in inputs if is_weight(arg)), None)
            self.new_layer(node, known[0], inputs, weight is not None)

    def fuse(self, node: Node, inputs: list[Value]) -> None:
        """Add a pass that does this operation and, where it can, those that it follows."""
        group = Group(elements(node))
        if node.target in NORMS:
            group.normed = inputs
        else:
            for value in inputs:
                group.absorb(value)
        layer = (group.normed or group.plain)[-1].layer
        self.groups.append((group, layer))
        self.values[node] = Value(group.size, layer, readers(node), group)

    def new_layer(self, node: Node, x: Value, inputs: list[Node], trained: bool) -> None:
        """Add a convolution or product (`trained`: with a weight that learns), or a pool."""
        layer, size = Layer(image_size=height(node)), elements(node)
        passes = 1 + (not x.is_image) + trained
        layer.values = passes * (x.size + size)
        if count := flop_registry.get(node.target.overloadpacket):  # type: ignore[union-attr]
            args = [arg.meta["val"] if isinstance(arg, Node) else arg for arg in node.args]
            layer.flops = passes * count(*args, out_val=node.meta["val"]) // TRACED
        if trained:
            layer.weights = sum(shape_of(arg).numel() for arg in inputs if is_weight(arg))
        self.layers.append(layer)
        self.values[node] = Value(size, layer, readers(node))

    def finish(self) -> list[Layer]:
        """Return all layers, with the passes behind them and the gradients that are added up."""
        for group, layer in self.groups:
            layer.values += group.values() if group.size else 0
        for value in {id(value): value for value in self.values.values()}.values():
            if not value.is_image:
                value.layer.values += value.size * max(0, value.readers - 1)
        return self.layers


def elements(node: Node) -> int:
    """Count the values of the result for one image."""
    return shape_of(node).numel() // TRACED


def shape_of(node: Node) -> torch.Size:
    """Return the shape of the result, of the first one where there are several."""
    value = node.meta["val"]
    shape: torch.Size = (value[0] if isinstance(value, tuple | list) else value).shape
    return shape


def height(node: Node) -> int:
    shape = shape_of(node)
    return shape[2] if len(shape) == 4 else 1


def readers(node: Node) -> int:
    """Count the operations that read the result; those of its views count, views do not."""
    return sum(readers(user) if user.target in VIEWS else 1 for user in node.users)


def is_weight(node: Node) -> bool:
    """Return whether this is a parameter of the network, as it is or transposed."""
    if node.target is aten.t.default:
        node = node.args[0]  # type: ignore[assignment]
    return node.op == "get_attr" and str(node.target).startswith("_param")


def count_model(model: nn.Module, image: torch.Tensor) -> list[Layer]:
    """Count a model in training, layer by layer; it and `image` (TRACED, ...) are on "meta"."""
    trace = make_fx(model.train(), tracing_mode="fake", _allow_non_fake_inputs=True)
    count = Count()
    for node in trace(image).graph.nodes:
        if node.op != "output":
            count.add(node)
    return count.finish()


def count_layers(recipe: Recipe, image_size: int) -> list[Layer]:
    """Count the recipe's network for ImageNet, layer by layer."""
    with torch.device("meta"):
        model = build_model(recipe, NUM_CLASSES)
        image = torch.empty(TRACED, 3, image_size, image_size)
    return count_model(model, image)


def floor_images_per_sec(
    layers: Sequence[Layer], batch_size: int, width: int, flops_per_sec: float, bytes_per_sec: float
) -> float:
    """Compute what no step can be faster than; `width`: bytes of an activation."""
    seconds = sum(
        max(layer.flops / flops_per_sec, layer.bytes(batch_size, width) / bytes_per_sec)
        for layer in layers
    )
    return 1 / seconds
