"""What a layer is: a module that owns parameters directly, its own parameters together.

Weight and bias of one module are one layer; each normalisation is a layer of its own; a module that only contains other
modules is none. In a split model, the copy that a group of several tasks still shares is a layer too, `layer[a+b]`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from reconmtl.errors import LayerMatchError, nearest

ROOT = "(root)"
"""The layer name of parameters that the outermost module itself owns."""

GROUP_SEPARATOR = "+"


class TaskCopies(nn.ModuleDict):
    """Holds a split layer's tensors, one child per group of tasks; the child's name is `group_label` of the group."""


def group_label(group: Sequence[str]) -> str:
    """The name of a group of tasks, e.g. 'depth+seg'; a single task's group is named like the task."""
    return GROUP_SEPARATOR.join(group)


@dataclass(frozen=True)
class Layer:
    """One layer of a model.

    Attributes:
        name: Full dotted name of the module; `(root)` for the outermost one; `layer[a+b]` for a group's copy.
        type: Class name of the module.
        parameters: Full dotted names of its own parameters, as in `named_parameters()`.
        sizes: Elements of each of them.
        aliases: Further names under which the same module hangs in the tree.
    """

    name: str
    type: str
    parameters: tuple[str, ...]
    sizes: tuple[int, ...]
    aliases: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Elements of all its parameters together."""
        return sum(self.sizes)


def _named_owners(model: nn.Module) -> Iterator[tuple[str, str, nn.Module, nn.Module]]:
    """Yield (layer name, prefix of parameter names, module, module that was split) in `named_modules()` order, once."""
    inside: dict[str, tuple[str, str]] = {}  # prefix of a group's copy -> (layer name, name of the split module)
    for prefix, module in model.named_modules():
        if isinstance(module, TaskCopies):
            owner = prefix.rpartition(".")[0]
            for label in module:
                inside[f"{prefix}.{label}"] = (f"{owner or ROOT}[{label}]", owner)
        if prefix in inside:
            name, owner = inside[prefix]
            yield name, prefix, module, model.get_submodule(owner)
        else:
            yield prefix or ROOT, prefix, module, module


def find_layers(model: nn.Module) -> list[Layer]:
    """List the layers of a model in network order (`named_modules()`).

    Args:
        model: Any module. A parameter held by several modules belongs to the first of them.

    Returns:
        The layers; modules without parameters of their own are left out.

    Example:
        >>> [layer.name for layer in find_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))]
        ['0', '2']
    """
    aliases: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).append(name or ROOT)
    layers = []
    seen: set[int] = set()
    for name, prefix, module, kind in _named_owners(model):
        own = [(key, p) for key, p in module.named_parameters(recurse=False) if id(p) not in seen]
        if not own:
            continue
        seen.update(id(p) for _, p in own)
        layers.append(
            Layer(
                name=name,
                type=type(kind).__name__,
                parameters=tuple(f"{prefix}.{key}" if prefix else key for key, _ in own),
                sizes=tuple(p.numel() for _, p in own),
                aliases=tuple(a for a in aliases[id(module)] if a != (prefix or ROOT)),
            )
        )
    return layers


def match_layers(patterns: Iterable[str], names: Sequence[str]) -> list[str]:
    """Resolve full layer names and globs to layer names, in network order.

    Args:
        patterns: Full names, or globs as in `fnmatch` ('*', '?', '[seq]'); a name that exists is never a glob.
        names: The layers that exist, in network order.

    Returns:
        The matched names, each once, in the order of `names`.

    Raises:
        LayerMatchError: If any pattern matches nothing; all such patterns are named.
    """
    if isinstance(patterns, str):
        patterns = [patterns]
    known = set(names)
    found: set[str] = set()
    unmatched = []
    for pattern in patterns:
        hits = {pattern} if pattern in known else {n for n in names if fnmatchcase(n, pattern)}
        found |= hits
        if not hits:
            unmatched.append(pattern)
    if unmatched:
        lines = [f"No layer that owns parameters matches {p!r}. {nearest(p, names)}" for p in unmatched]
        raise LayerMatchError("\n".join([*lines, f"List all {len(names)} with `rm.layer_table(model)`."]))
    return [n for n in names if n in found]
