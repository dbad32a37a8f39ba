"""The parts of a network from stem to head, of which layer groups are made."""

from __future__ import annotations

from torch import nn
from torchvision.models import ResNet

from pipelines.errors import UserError


def head_of(model: nn.Module) -> nn.Module:
    """Return the classifier: the last linear layer, or what a timm network names as such."""
    named = getattr(model, "get_classifier", None)
    head = named() if named is not None else None
    if isinstance(head, nn.Module) and any(True for _ in head.parameters()):
        return head
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def parts(model: nn.Module) -> list[list[nn.Parameter]]:
    """List the parameters of each part, stem to head.

    The parts of torchvision's ResNets are stem, layer1 to layer4 and head; those of a timm network
    are its own coarse groups; those of the others are their layers and blocks, each with the BN
    behind it.
    """
    head = list(head_of(model).parameters())
    in_head = {*map(id, head)}
    if isinstance(model, ResNet):
        stem = nn.ModuleList([model.conv1, model.bn1])
        modules: list[nn.Module] = [stem, model.layer1, model.layer2, model.layer3, model.layer4]
        found = [list(module.parameters()) for module in modules]
    elif callable(matcher := getattr(model, "group_matcher", None)):
        from timm.models import group_parameters

        named = dict(model.named_parameters())
        groups = group_parameters(model, matcher(coarse=True), reverse=False)
        found = [[named[name] for name in groups[key]] for key in sorted(groups)]
    else:
        found = []
        for child in model.children():
            layers = child.children() if isinstance(child, nn.Sequential) else [child]
            found += [list(layer.parameters()) for layer in layers]
    body: list[list[nn.Parameter]] = []
    for part in found:
        rest = [each for each in part if id(each) not in in_head]
        if body and all(each.ndim <= 1 for each in rest):
            body[-1] += rest
        elif rest:
            body.append(rest)
    return [*body, head]


def layer_groups(model: nn.Module, count: int) -> dict[nn.Parameter, int]:
    """Number the layer group of each parameter, from 0 at the stem to `count` - 1, the head's.

    The other parts are shared out evenly, the first groups getting one more: of three groups of
    a ResNet the first ends with layer2, as in fastai. Raises UserError naming `layer_lrs` where
    the network has fewer parts.
    """
    *body, head = parts(model)
    if not 2 <= count <= len(body) + 1:
        raise UserError(
            f"recipe field layer_lrs must have 2 to {len(body) + 1} values, one a layer group: "
            f"the network has {len(body) + 1} parts"
        )
    groups: dict[nn.Parameter, int] = {}
    size, more = divmod(len(body), count - 1)
    for group in range(count - 1):
        first = group * size + min(group, more)
        for part in body[first : first + size + (group < more)]:
            groups |= dict.fromkeys(part, group)
    return groups | dict.fromkeys(head, count - 1)
