"""The classes that modules of a split model get: their calls, their state dicts, their copies and pickles."""

import json
import threading
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from reconmtl.errors import SplitError
from reconmtl.layers import TaskCopies
from reconmtl.splitting.branched import WAYS_OUT, Branched, collect
from reconmtl.splitting.calls import FAST_PATHS, call, prepare, run_faces, whole
from reconmtl.splitting.compiling import REACHED, UNCOMPILED, check_graph_may_break, is_compiler_error, untraced
from reconmtl.splitting.conversions import CONVERT, check_asker, check_not_traced, refused_methods
from reconmtl.splitting.faces import Face
from reconmtl.splitting.groups import Family, Masks, MissingTaskError, complete, refine
from reconmtl.splitting.mapping import SharedWriteError
from reconmtl.splitting.outputs import assemble, deliver
from reconmtl.splitting.ownership import module_masks, recorded
from reconmtl.splitting.refusals import located
from reconmtl.splitting.rehearsal import rehearse
from reconmtl.splitting.stale import revive
from reconmtl.splitting.storage import (
    COPIES,
    RECORD,
    Record,
    adapted_class,
    copies,
    forget_flat_weights,
    own_tensors,
    record,
    refine_buffers,
    set_class,
    write,
)
from reconmtl.splitting.structure import Value, tensors

EXTRA = "_extra_state"
DATA = f"`x.data = y` with values y that differ between tasks, which PyTorch shows to nobody. {WAYS_OUT}"


def adapt(module: nn.Module, family: Family, name: str, **fields: Value) -> Record:
    """Make a module one of a split model: give it a record, and the class that goes with it."""
    rec = record(module)
    if rec is None:
        rec = Record(family, name, (tuple(module._parameters), tuple(module._buffers)), family.full)
        rec.kernel = not module._modules and type(module).__module__.startswith("torch.nn.modules.")
        module.__dict__[RECORD] = rec
        kinds = _RECURRENT if isinstance(module, nn.RNNBase) else (Adapted, AdaptedRoot)
        set_class(module, kinds["root" in fields])
    for key, value in fields.items():
        setattr(rec, key, value)
    return rec


def _new(mixin: type, base: type, names: tuple[str, ...]) -> Value:
    return object.__new__(adapted_class(mixin, base, names))


class Adapted(nn.Module):
    """Mixed into the class of every module that a split model treats specially."""

    def __call__(self, *args: Value, **kwargs: Value) -> Value:
        """As the user's module, on values that may differ between tasks."""
        check_not_traced()
        return call(self, cast(Record, self.__dict__[RECORD]), super().__call__, args, kwargs)

    def _plain_call(self, *args: Value, **kwargs: Value) -> Value:
        return super().__call__(*args, **kwargs)

    def __setattr__(self, name: str, value: Value) -> None:
        rec = record(self)
        if rec is not None:
            if name in rec.params or name in rec.buffers:
                write(self, name, value)
                return
            if type(value) is Branched and name in self._buffers:
                revive(cast(Tensor, self._buffers[name]))
                groups = complete(value.masks, rec.family.full)
                refine_buffers(self, groups)
                rec.stats = "always"
                write(self, name, value)
                return
            if name in rec.held:
                rec.held.discard(name)
        super().__setattr__(name, value)

    @property
    def parametrizations(self) -> Value:
        """The parametrisations that it was split with; asked for where more would be registered, which is refused."""
        found = self._modules.get("parametrizations")
        if found is None:
            check_asker(cast(Record, record(self)).name)
            raise AttributeError("parametrizations")
        return found

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of any module, for tensors that all tasks share.

        Raises:
            SplitError: For one that differs between tasks.
        """
        if isinstance(param, Branched):
            raise SplitError(
                f"{cast(Record, record(self)).name}.{name} cannot become one parameter of values that differ between "
                f"tasks; assign to the copies in `{COPIES}` of a split layer. {CONVERT}"
            )
        super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: Value, persistent: bool = True) -> None:
        """As of any module; a value that differs between tasks becomes one buffer per task.

        Raises:
            SplitError: If such a value is a buffer that the module did not have when it was split.
        """
        if type(tensor) is not Branched:
            super().register_buffer(name, tensor, persistent)
        elif name in self._buffers or name in cast(Record, record(self)).buffers:
            setattr(self, name, tensor)
        else:
            raise SplitError(
                f"{cast(Record, record(self)).name} registers the buffer {name!r} in its forward, with values that "
                "differ between tasks. Register it in the constructor, or call the model once before it is split."
            )

    def __reduce_ex__(self, protocol: Any) -> Value:  # noqa: ANN401 as in object
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        return (_new, type(self)._reconmtl_key, *reduced[2:])  # type: ignore[attr-defined]

    def _replicate_for_data_parallel(self) -> Value:
        raise SplitError(
            "DataParallel runs copies of a model in threads, which a split model cannot be in. Use "
            "DistributedDataParallel."
        )

    def __prepare_scriptable__(self) -> Value:
        """Called by torch.jit.script."""
        raise SplitError(
            "A split model is no TorchScript: script one task's network, `rm.view(model, task).module`, or export it."
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Value], prefix: str, local_metadata: dict[str, Value], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        rec = cast(Record, record(self))
        if rec.root is not None:
            check_plan(rec.root.plan, state_dict.get(prefix + EXTRA))
        match_groups(self, rec, state_dict, prefix)
        expand(rec, state_dict, prefix, assign=bool(local_metadata.get("assign_to_params_buffers")))
        lacking: list[str] = []
        arguments = (state_dict, prefix, local_metadata, strict, lacking, unexpected_keys, error_msgs)
        if rec.buffers and isinstance(self, nn.modules.batchnorm._NormBase):
            nn.Module._load_from_state_dict(self, *arguments)  # its own would add a shared num_batches_tracked
        else:
            super()._load_from_state_dict(*arguments)
        missing_keys += [k for k in lacking if k != prefix + EXTRA]


class AdaptedRoot(Adapted):
    """Mixed into the class of a split model."""

    def __init_subclass__(cls, **options: Value) -> None:
        """Replace methods of other libraries that a split model cannot have."""
        super().__init_subclass__(**options)
        for name, refusal in refused_methods(cls).items():
            setattr(cls, name, refusal)

    def _get_name(self) -> str:
        """The first thing that torch.fx asks for when it traces a model; it passes by `__call__`."""
        check_not_traced()
        return type(self).__name__

    def __call__(self, *args: Value, **kwargs: Value) -> Value:
        """As the user's model; returns {task: output}."""
        rec = cast(Record, self.__dict__[RECORD])
        enter = call_root
        check_not_traced()
        if torch.compiler.is_exporting() and rec.root is not None and not rec.root.learned:
            raise SplitError(
                "A split model has to run once before it is exported: give `split(..., sample=batch)`, or call it."
            )
        if torch.compiler.is_compiling():  # branched values cannot be traced; a split model runs as it is
            check_graph_may_break()
            enter = torch.compiler.disable(call_root)
        return enter(self, rec, self._plain_call, args, kwargs)

    def compile(self, *args: Value, **kwargs: Value) -> None:
        """As `torch.compile(model)`: the model runs as it is.

        Raises:
            SplitError: With fullgraph=True.
        """
        if cast(Value, super().compile).__func__ is not nn.Module.compile:  # the user's own method of that name
            super().compile(*args, **kwargs)
        elif kwargs.get("fullgraph"):
            raise SplitError(UNCOMPILED)

    def get_extra_state(self) -> Value:
        """The plan, as JSON in a byte tensor, so that a checkpoint can be loaded without the plan at hand."""
        root = cast(Record, record(self)).root
        assert root is not None
        text = json.dumps({"plan": root.plan, "norm_stats": root.norm_stats})
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Value) -> None:
        """Nothing to do: `_load_from_state_dict` has compared the plans."""


class AdaptedRecurrent(Adapted):
    """Mixed into recurrent modules, which keep their weights a second time, in one piece of memory."""

    def _init_flat_weights(self) -> None:
        if cast(Record, record(self)).params:
            forget_flat_weights(cast(nn.RNNBase, self))
            self.flatten_parameters()
        else:
            super()._init_flat_weights()  # type: ignore[misc]

    def flatten_parameters(self) -> None:
        """Put each copy's weights into one piece of memory, as cuDNN wants them."""
        rec = cast(Record, record(self))
        if not rec.params:
            super().flatten_parameters()  # type: ignore[misc]
            return
        for mask in rec.param_groups:
            cast(nn.RNNBase, Face(self, mask).module).flatten_parameters()


class AdaptedRecurrentRoot(AdaptedRecurrent, AdaptedRoot):
    """A recurrent module that is a split model by itself."""


_RECURRENT = (AdaptedRecurrent, AdaptedRecurrentRoot)


def read_extra_state(state: object) -> dict[str, Any]:
    """The content of a split model's extra state.

    Raises:
        SplitError: If it is not one.
    """
    try:
        if not isinstance(state, Tensor):
            raise ValueError
        content = json.loads(bytes(state.to(torch.uint8).tolist()).decode())
        if not isinstance(content, dict) or not isinstance(content.get("plan"), dict):
            raise ValueError
    except (ValueError, RecursionError) as error:
        raise SplitError(
            f"The state's {EXTRA!r} does not hold the plan of a split model, but {str(state)[:80]}. Was it averaged "
            "or cast?"
        ) from error
    return content


def check_plan(mine: dict[str, object], state: object) -> None:
    """Refuse the state of a model that is split otherwise; without a plan, the state is an unsplit model's."""
    if state is None:
        return
    theirs = read_extra_state(state)["plan"]
    for key in ("tasks", "layers"):
        if theirs.get(key) != mine[key]:
            raise SplitError(
                f"This state belongs to a model that was split otherwise; its plan's {key} are "
                f"{str(theirs.get(key))[:300]}, this model's are {str(mine[key])[:300]}. Split with the plan that it "
                "holds: `rm.split(model, saved_plan(state))`, with `from reconmtl.splitting import saved_plan`."
            )


# Loading ------------------------------------------------------------------------------------------------------------


def match_groups(module: nn.Module, rec: Record, state: Mapping[str, Value], prefix: str) -> None:
    """Give buffers the copies that a state dict has, which a model that was never called does not have yet."""
    names = rec.buffers or tuple(n for n, b in module._buffers.items() if b is not None)
    if rec.stats == "never" or not names:
        return
    start = f"{prefix}{COPIES}."
    found = set()
    for key in state:
        if key.startswith(start):
            label, _, name = key[len(start) :].rpartition(".")
            mask = rec.family.parse(label)
            if name in names and mask is not None:
                found.add(mask)
    have: Masks = rec.buffer_groups if rec.buffers else (rec.family.full,)
    if found:
        groups = refine(have, complete(tuple(sorted(found, key=lambda m: m & -m)), rec.family.full))
        if groups != have:
            refine_buffers(module, groups)


def expand(rec: Record, state: dict[str, Value], prefix: str, *, assign: bool) -> None:
    """Turn keys of a less split state into keys of every copy: `weight` into `per_task.<group>.weight`."""
    for names, groups in ((rec.params, rec.param_groups), (rec.buffers, rec.buffer_groups)):
        for name in names:
            shared = state.pop(prefix + name, None)
            for i, mask in enumerate(groups):
                key = f"{prefix}{COPIES}.{rec.family.label(mask)}.{name}"
                if key in state:
                    continue
                value = shared if shared is not None else _coarser(rec.family, state, prefix, name, mask)
                if value is None and name == "num_batches_tracked":
                    value = torch.tensor(0, dtype=torch.long)  # absent from states older than PyTorch 0.4.1
                if value is not None:
                    state[key] = value.clone() if assign and i > 0 and isinstance(value, Tensor) else value
            for key in [k for k in state if k.startswith(f"{prefix}{COPIES}.") and k.endswith("." + name)]:
                mask_of_key = rec.family.parse(key[len(prefix) + len(COPIES) + 1 : -len(name) - 1])
                if mask_of_key is not None and mask_of_key not in groups and _covered(mask_of_key, groups):
                    del state[key]


def _covered(mask: int, groups: Masks) -> bool:
    return any(g & mask == g for g in groups)


def _coarser(family: Family, state: Mapping[str, Value], prefix: str, name: str, mask: int) -> Value:
    start = f"{prefix}{COPIES}."
    for key, value in state.items():
        if key.startswith(start) and key.endswith("." + name):
            other = family.parse(key[len(start) : -len(name) - 1])
            if other is not None and other & mask == mask:
                return value
    return None


# The outermost call -------------------------------------------------------------------------------------------------


def call_root(module: nn.Module, rec: Record, plain: Value, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
    """Call a split model: per-task values inside, a mapping from task to output outside."""
    root = rec.root
    assert root is not None
    found: list[Branched] = []
    collect((args, kwargs), found)
    if found:  # the model calls itself
        return plain(*args, **kwargs)

    def run() -> Value:
        if root.mode == "loop":
            masks = rec.family.each()
            prepare(module, masks)
            return run_faces(module, rec, masks, args, kwargs, join=lambda each: assemble(each, rec.family))
        try:
            out = whole(module, rec, plain, args, kwargs, []) if rec.atomic else plain(*args, **kwargs)
            return deliver(out, rec.family)
        finally:
            for t in tensors((args, kwargs)):  # the user's own, which keep their values
                revive(t)

    try:
        known = root.learned and (
            not root.rehearse
            or (module.training, torch.is_grad_enabled()) in root.rehearsed
            or torch.compiler.is_exporting()
        )
        if root.settled and known:
            return run()
        with _ONE_AT_A_TIME:
            if not known:
                with untraced():
                    prepare_call(module, args, kwargs)
            out = run()
            root.settled = is_settled(module, root.mode == "loop")
            return out
    except MissingTaskError:
        forget(module)
        raise
    except SplitError as error:
        if isinstance(error, SharedWriteError) and error.target is not None:
            revive(error.target)
        kind = SplitError if isinstance(error, SharedWriteError) else type(error)
        raise kind(located(module, error)).with_traceback(error.__traceback__) from None
    except RuntimeError as error:
        text = REACHED if is_compiler_error(error) else DATA if "set_data" in str(error) else ""
        if text:
            raise SplitError(located(module, SplitError(text).with_traceback(error.__traceback__))) from error
        raise


_ONE_AT_A_TIME = threading.RLock()
"""Held while a call may move tensors of a model about: give buffers copies, or take them back."""


def is_settled(module: nn.Module, whole: bool) -> bool:
    """Whether no later call in this module can find out more about the use of its buffers."""
    rec = record(module)
    if rec is not None:
        whole = whole or rec.atomic or isinstance(module, FAST_PATHS)
        if whole and rec.stats == "watch" and not rec.buffers and any(b is not None for b in module._buffers.values()):
            return False
    return all(is_settled(m, whole) for m in module._modules.values() if m is not None)


def prepare_call(module: nn.Module, args: tuple[Value, ...], kwargs: dict[str, Value]) -> None:
    """Before the first call in a mode: find who owns what; rehearse the call on a copy against ordinary networks."""
    rec = cast(Record, record(module))
    root = rec.root
    assert root is not None
    learned = root.learned
    tasks = telling(module, rec.family)
    where = f"first call{' in another mode' if learned else ''}"
    mode = (module.training, torch.is_grad_enabled())
    try:
        if not learned:
            learn(module, args, kwargs)
        if not root.rehearse:
            return
        try:
            found = rehearse(module, rec, args, kwargs, tasks=tasks, where=where, gradients=mode[1])
        except MissingTaskError:  # a value passes from task to task outside the graph: prune nothing
            forget(module)
            found = rehearse(module, rec, args, kwargs, tasks=tasks, where=where, gradients=mode[1])
    except BaseException:
        root.learned = learned
        raise
    if not found.empty:
        root.rehearsed.add(mode)


def telling(module: nn.Module, family: Family) -> tuple[str, ...]:
    """Tasks that show what one group's call leaves to the next: the first, and one of another group of each layer."""
    partitions = {p for m in module.modules() if (r := record(m)) is not None for p in r.partitions() if len(p) > 1}
    firsts = {next(g for g in p if g & 1) for p in partitions} or {1}
    chosen = 1
    for mask in reversed(family.each()):
        if any(not chosen & ~g and mask & ~g for g in firsts):
            chosen |= mask
    return family.names(chosen)


def adopt(module: nn.Module, trial: nn.Module) -> None:
    """Take over what a copy of a split model found out: who owns what, and which buffers need copies."""
    modules = dict(module.named_modules())
    family = cast(Record, record(module)).family
    for name, other in trial.named_modules():
        theirs, mine = record(other), modules.get(name)
        if theirs is None or mine is None:
            continue
        rec = adapt(mine, family, theirs.name, owner=theirs.owner, stats=theirs.stats)
        have = rec.buffer_groups if rec.buffers else (family.full,)
        if theirs.buffers and theirs.buffer_groups != have and any(b is not None for b in _own_buffers(mine, rec)):
            refine_buffers(mine, theirs.buffer_groups)
        if rec.root is not None and theirs.root is not None:
            rec.root.learned = theirs.root.learned
            rec.root.rehearsed |= theirs.root.rehearsed


def _own_buffers(module: nn.Module, rec: Record) -> list[Tensor | None]:
    return list(own_tensors(module, rec, rec.family.full & -rec.family.full)[1].values())


def learn(module: nn.Module, args: tuple[Value, ...], kwargs: dict[str, Value]) -> None:
    """Find, by one recorded call, what each module and each planned layer can reach; check the plan against it.

    Raises:
        SplitError: If a planned layer reaches no output, or one task's alone.
    """
    rec = cast(Record, record(module))
    root, family = rec.root, rec.family
    assert root is not None
    seen = recorded(module, family, args, kwargs)
    params = seen.params
    root.learned = True
    if not params:
        return
    masks = module_masks(module, seen)
    faults = []
    for m in module.modules():
        r = record(m)
        if r is None or not r.params:
            continue
        mine = 0
        for p in copies(m)[family.label(r.param_groups[0])].parameters():
            mine |= params.get(id(p), 0)
        if not mine:
            faults.append(
                f"{r.name}: none of its parameters reaches an output of this call (or only through re-entrant "
                "checkpointing or torch.no_grad(), which hide it), so that copies would learn nothing. Leave it out. "
                "Under FullyShardedDataParallel, give `split(..., sample=batch)` before it is wrapped."
            )
        elif mine & (mine - 1) == 0 and len(family.tasks) > 1:
            faults.append(
                f"{r.name}: it reaches the output of {family.label(mine)!r} alone, so that nothing is shared. Leave it "
                "out."
            )
        elif any(not g & mine for g in r.param_groups):
            faults.append(_idle(r, mine))
    if faults:
        root.learned = False
        raise SplitError("The plan names layers that cannot be split so: " + " ".join(faults))
    if root.mode == "branch":
        _own(module, "", family.full, masks, family, seen.called)


def _idle(rec: Record, mine: int) -> str:
    """What is wrong with copies for tasks that a layer does not reach, and groups without such copies."""
    family = rec.family
    used = [g for g in rec.param_groups if g & mine]
    idle = [g for g in rec.param_groups if not g & mine]
    groups = [list(family.names(g | sum(idle) if i == 0 else g)) for i, g in enumerate(used)]
    return (
        f"{rec.name}: it reaches the outputs of {', '.join(map(repr, family.names(mine)))} alone, so that copies for "
        f"{', '.join(repr(family.label(g)) for g in idle)} would learn nothing. Give them to a group that learns: "
        f"Plan(tasks=[...], layers={{{rec.name!r}: {groups}, ...}})."
        if len(used) > 1
        else f"{rec.name}: it reaches the outputs of {', '.join(map(repr, family.names(mine)))} alone, which share one "
        "copy, so that nothing is split. Leave it out."
    )


def _own(
    module: nn.Module, name: str, above: int, masks: dict[str, int], family: Family, called: dict[str, int]
) -> None:
    """Note the owner of each called module whose tasks are fewer than those of the called one around it."""
    for key, child in module._modules.items():
        if child is None or isinstance(child, (TaskCopies, torch.jit.ScriptModule)):
            continue
        path = f"{name}.{key}" if name else key
        mask = masks.get(path, 0) or above
        if path not in called:
            mask = above
        elif mask != above:
            adapt(child, family, path, owner=mask)
        _own(child, path, mask, masks, family, called)


def forget(module: nn.Module) -> None:
    """Compute every value for every task from now on."""
    root = cast(Record, record(module)).root
    assert root is not None
    root.settled = False
    for m in module.modules():
        rec = record(m)
        if rec is not None:
            rec.owner = rec.family.full
