"""A split model as one plain function: the networks of its groups of tasks, with what they have in common run once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from reconmtl.layers import TaskCopies
from reconmtl.splitting.branched import Branched, collect
from reconmtl.splitting.groups import Masks, refine
from reconmtl.splitting.objects import find
from reconmtl.splitting.outputs import select
from reconmtl.splitting.ownership import plain_copy
from reconmtl.splitting.refusals import written_state
from reconmtl.splitting.storage import GroupTensors, record
from reconmtl.splitting.structure import ATOMS, Value, tensors, transform

Repeats = dict[str, tuple[int, ...]]
"""Module -> of each network, the position of the first network in which it gets and gives the same."""

Row = tuple[object, ...]
"""Of each network a label; equal ones see the same values."""


def network_groups(model: nn.Module) -> Masks:
    """The groups of tasks of a split model that agree on every copy; each has a network."""
    records = [rec for m in model.modules() if (rec := record(m)) is not None]
    return refine((records[0].family.full,), *(p for rec in records for p in rec.partitions()))


def together(
    model: nn.Module, tasks: Sequence[str], repeats: Repeats, begin: Callable[[], None] | None = None
) -> Callable[..., dict[str, Value]]:
    """The networks of a split model's groups of tasks as one function, whose values are all plain tensors.

    Args:
        model: The split model, whose tensors it shares as they are now.
        tasks: Names of the outputs.
        repeats: What runs once for several networks, see `noting`.
        begin: Called first.

    Returns:
        A function that takes what the model takes and returns {task: output}.
    """
    rec = record(model)
    assert rec is not None
    family, groups = rec.family, network_groups(model)
    networks = [_network(model, mask) for mask in groups]
    wanted = [[t for t in family.names(mask) if t in tasks] for mask in groups]
    kept: list[_Kept] = []
    repeated: list[list[_Repeated]] = [[] for _ in groups]
    for name, firsts in repeats.items():
        by_first: dict[int, _Kept] = {}
        for i, first in enumerate(firsts):
            module = networks[i].get_submodule(name)
            if first == i:
                by_first[i] = _Kept(module.forward)
                module.forward = by_first[i].forward
            else:
                repeated[i].append(_Repeated(by_first[first]))
                module.forward = repeated[i][-1].forward
        kept += by_first.values()

    def run(*args: Value, **kwargs: Value) -> dict[str, Value]:
        if begin is not None:
            begin()
        for each in kept:  # a pass that an error broke off leaves its values
            each.values.clear()
        found = {}
        for network, names, again in zip(networks, wanted, repeated, strict=True):
            for one in again:
                one.next = 0
            out = network(*args, **kwargs)
            for task in names:
                found[task] = select(out, task, family.tasks)
        for each in kept:
            each.values.clear()
        return found

    return run


def _network(model: nn.Module, mask: int) -> nn.Module:
    """The plain network of one group; what only other groups' outputs need leaves no trace in it."""
    network = plain_copy(model, mask, share_buffers=True)
    for name, module in model.named_modules():
        rec = record(module)
        if rec is not None and not rec.owner & mask:
            for foreign in network.get_submodule(name).modules():
                foreign.training = False
                foreign._buffers = {n: b if b is None else b.clone() for n, b in foreign._buffers.items()}
    return network


class _Kept:
    """What a module returned, call by call; handed out as clones, which a network may change in place."""

    def __init__(self, forward: Callable[..., Value]) -> None:
        self.original = forward
        self.values: list[Value] = []

    def forward(self, *args: Value, **kwargs: Value) -> Value:
        value = self.original(*args, **kwargs)
        self.values.append(value)
        return transform(value, Tensor.clone)


class _Repeated:
    """Stands for a module that another network has called with the same values."""

    def __init__(self, kept: _Kept) -> None:
        self.kept = kept
        self.next = 0

    def forward(self, *args: Value, **kwargs: Value) -> Value:
        del args, kwargs  # they are those of the other network
        self.next += 1
        return transform(self.kept.values[self.next - 1], Tensor.clone)


# What networks have in common -----------------------------------------------------------------------------------------


@contextmanager
def noting(model: nn.Module) -> Iterator[Repeats]:
    """Note, while a split model is called, which modules get and give the same in several groups' networks.

    That a value may differ between tasks shows in its class, not in its numbers: it also counts where they happen to be
    the same in this call. Modules that write to what they get, that return a part of it or of their tensors, or return
    anything but tensors in plain containers, are left out; so are those inside of others that are there.

    Args:
        model: Has been called before.

    Yields:
        Filled in at the end.
    """
    found: Repeats = {}
    notes = _Notes(model)
    hooks = []
    for name, module in model.named_modules():
        if not isinstance(module, (torch.jit.ScriptModule, TaskCopies, GroupTensors)):
            hooks.append(module.register_forward_pre_hook(notes.before(name, module), with_kwargs=True))
            hooks.append(module.register_forward_hook(notes.after(name), with_kwargs=True))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    found.update(notes.repeats())


class _Notes:
    """The calls of a split model's modules."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.groups = model, network_groups(model)
        self.rows: dict[str, dict[Row, None]] = {}  # of each called module, as an ordered set
        self.left_out = {""}
        self.open: list[tuple[Row | None, list[tuple[Tensor, object]]]] = []  # calls that are under way

    def before(self, name: str, original: nn.Module) -> Callable[..., None]:
        def note(module: nn.Module, args: Value, kwargs: Value) -> None:
            row = self.open[-1][0] if self.open else None
            if row is None and record(original) is not None and _is_face(module):
                row = self._of_group(original)
            self.open.append((row, [(t, written_state(t)) for t in _parts((args, kwargs))]))
            self._note(name, (args, kwargs), row)

        return note

    def after(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Value, kwargs: Value, out: Value) -> None:
            del args, kwargs
            row, given = self.open.pop()
            self._note(name, out, row)
            if any(written_state(t) != state for t, state in given) or not _own(out, module, [t for t, _ in given]):
                self.left_out.add(name)

        return note

    def repeats(self) -> Repeats:
        """What was found."""
        names = {id(m): n for n, m in self.model.named_modules()}
        found: Repeats = {}
        for name in self.rows:
            below = (names[id(m)] for m in self.model.get_submodule(name).modules() if id(m) in names)
            rows = dict.fromkeys(row for n in below for row in self.rows.get(n, ()))
            labels = [tuple(row[i] for row in rows) for i in range(len(self.groups))]
            firsts = tuple(labels.index(label) for label in labels)
            if name not in self.left_out and firsts != tuple(range(len(labels))):
                found[name] = firsts
        return {n: firsts for n, firsts in found.items() if not any(found.get(a) == firsts for a in _around(n))}

    def _note(self, name: str, value: Value, row: Row | None) -> None:
        rows = self.rows.setdefault(name, {})
        if row is not None:
            rows[row] = None
            return
        branched: list[Branched] = []
        collect(value, branched)
        branched += [t for t, _ in find(value) if type(t) is Branched]
        rows.update(dict.fromkeys(self._row(b.masks) for b in branched))

    def _row(self, masks: Masks) -> Row:
        """The branch that each network has of a value; networks that have several, or parts of them, share nothing."""
        row: list[object] = []
        for i, group in enumerate(self.groups):
            hit = [k for k, m in enumerate(masks) if m & group]
            row.append((i, *hit) if len(hit) > 1 else hit[0] if hit else None)
        return tuple(row)

    def _of_group(self, module: nn.Module) -> Row:
        """Of a module that runs whole, once per group: statistics per task have the finest groups it was called for."""
        records = [rec for m in module.modules() if (rec := record(m)) is not None]
        if any(rec.stats == "always" and rec.buffers for rec in records):
            return self._row(refine(*(p for rec in records for p in rec.partitions())))
        return tuple(range(len(self.groups)))


def _around(name: str) -> Iterator[str]:
    """The names of the modules around one, innermost first."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _is_face(module: nn.Module) -> bool:
    """Whether a module that stands for a split one holds one group's tensors, and not those of all."""
    return record(module) is None and not any(isinstance(p, Branched) for p in module._parameters.values())


def _parts(value: Value) -> Iterator[Tensor]:
    for t in tensors(value):
        yield from t.vals if type(t) is Branched else (t,)


def _own(value: Value, module: nn.Module, given: Sequence[Tensor]) -> bool:
    """Whether what a module returned is its own: plain containers of new tensors, none of which shares memory."""
    if not _is_plain(value):
        return False
    mine = list(_parts(value))
    if any(t.layout is not torch.strided or type(t) not in (Tensor, nn.Parameter) for t in mine):
        return False
    places = [t.untyped_storage().data_ptr() for t in mine]
    others = (*given, *module.parameters(), *module.buffers())
    taken = {t.untyped_storage().data_ptr() for t in others if t.layout is torch.strided and type(t) is not Branched}
    return len(set(places)) == len(places) and taken.isdisjoint(places)


def _is_plain(value: Value) -> bool:
    if isinstance(value, Tensor) or type(value) in ATOMS:
        return True
    if type(value) in (tuple, list) or (isinstance(value, tuple) and hasattr(value, "_make")):
        return all(_is_plain(v) for v in value)
    return type(value) is dict and all(_is_plain(v) for v in value.values())
