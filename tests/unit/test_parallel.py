"""Data parallel training in two and three gloo processes, against one process that sees the whole batch.

The functions called `check_...` run in every process of a group, one after the other; a test starts the group once.
"""

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import reconmtl as rm
from reconmtl import reduction, replicas
from reconmtl.balance import Balancer
from reconmtl.errors import ProbeError
from reconmtl.gram import Gradients
from reconmtl.oracle import reference_grams
from reconmtl.parallel import gradients_of
from reconmtl.probing import Probe
from reconmtl.schedule import REHEARSAL

TASKS = ("a", "b", "c")


class Net(nn.Module):
    """Normalised by group or batch; a branch that two of the three tasks share; heads."""

    def __init__(self, norm: str = "group") -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.GroupNorm(2, 6) if norm == "group" else nn.BatchNorm2d(6)
        self.body = nn.Conv2d(6, 5, 3, stride=2)
        self.pair = nn.Linear(5, 7)
        self.heads = nn.ModuleDict({"a": nn.Linear(5, 1), "b": nn.Linear(7, 1), "c": nn.Linear(7, 2)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = torch.relu(self.body(torch.relu(self.norm(self.stem(x))))).mean((2, 3))
        y = torch.tanh(self.pair(z))
        return {t: head(z if t == "a" else y) for t, head in self.heads.items()}


def batch(rows: int = 12, dtype: torch.dtype = torch.float32, seed: int = 5) -> Tensor:
    return torch.randn(rows, 2, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def part(x: Tensor) -> Tensor:
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def losses(out: dict[str, Tensor], x: Tensor, tasks: tuple[str, ...] = TASKS) -> dict[str, Tensor]:
    aim = x.flatten(1)
    return {t: ((out[t].sum(1) - (i + 1) * aim[:, i]) ** 2).mean() for i, t in enumerate(TASKS) if t in tasks}


def network(dtype: torch.dtype = torch.float32, norm: str = "group") -> Net:
    torch.manual_seed(0)
    return Net(norm).to(dtype)


def grads(model: nn.Module) -> dict[str, Tensor]:
    found = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
    return {n: (g.to_dense() if g.is_sparse else g).clone() for n, g in found.items() if g is not None}


def same_grads(model: nn.Module, expected: dict[str, Tensor], tolerance: float) -> None:
    found = grads(model)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    whole = torch.cat([g.flatten() for g in expected.values()]).norm()
    for name, g in expected.items():
        assert (found[name] - g).norm() <= tolerance * (g.norm() + 0.01 * whole), name


def same_grams(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Both [layers, tasks, tasks]; relative to the norms of the gradients."""
    assert torch.equal(found.isnan(), expected.isnan())
    found, expected = found.nan_to_num().double(), expected.nan_to_num().double()
    norms = expected.diagonal(dim1=1, dim2=2).sqrt()
    worst = ((found - expected).abs() / (norms[:, :, None] * norms[:, None, :]).clamp_min(1e-12)).max()
    assert worst <= tolerance, float(worst)


def equal_everywhere(*tensors: Tensor) -> None:
    for t in tensors:
        everyone = [torch.empty_like(t) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, t.contiguous())
        # bytes, because NaN differs from itself
        assert all(torch.equal(e.view(torch.uint8), t.contiguous().view(torch.uint8)) for e in everyone)


@contextmanager
def patched(module: Any, **values: object) -> Iterator[None]:
    before = {n: getattr(module, n) for n in values}
    try:
        for n, v in values.items():
            setattr(module, n, v)
        yield
    finally:
        for n, v in before.items():
            setattr(module, n, v)


def refused(match: str, call: Callable[[], object]) -> None:
    with pytest.raises(ProbeError, match=match):
        call()


def check_the_big_batch() -> None:
    """Grams and `.grad` are those of one process with the whole batch, whatever the buckets and stages."""
    x = batch()
    alone = network()
    reference = Gradients(alone, alone=True).sweep(losses(alone(x), x))
    plain = copy.deepcopy(alone)
    sum(losses(plain(x), x).values()).backward()  # type: ignore[union-attr]
    for bucket, memory in ((replicas.BUCKET, float("inf")), (replicas.BUCKET, 0.0), (4 * 64, 0.0), (4, 1e9)):
        model = DistributedDataParallel(network())
        probe = Probe(model, engine="delta")
        probe._gradients.memory = memory
        with patched(reduction, BUCKET=bucket):
            probe.backward(losses(model(part(x)), part(x)))
        log = probe.log
        assert list(log.layers) == ["stem", "norm", "body", "pair"]
        found = gradients_of(model).sweep(losses(model(part(x)), part(x)))
        same_grams(found.gram, reference.gram, 1e-6)
        same_grads(model, grads(plain), 1e-6)
        equal_everywhere(found.gram, log.grams, *grads(model).values())
        assert set(probe.engines) == set(log.layers)
        assert all("averaged over" in e for e in probe.engines.values())
        assert Probe(model).check(losses(model(part(x)), part(x))) < 1e-5


def check_batch_statistics() -> None:
    """With BatchNorm: one process that normalises each part by its own statistics."""
    x = batch()
    alone = network(norm="batch")
    parts = [losses(alone(p), p) for p in x.chunk(dist.get_world_size())]
    mean = {t: torch.stack([p[t] for p in parts]).mean() for t in TASKS}
    reference = Gradients(alone, alone=True).sweep(mean)
    model = DistributedDataParallel(network(norm="batch"))
    found = gradients_of(model).sweep(losses(model(part(x)), part(x)))
    same_grams(found.gram, reference.gram, 1e-6)
    assert (found.total - reference.total).norm() <= 1e-6 * reference.total.norm()


def check_training() -> None:
    """Probed steps among plain ones train as DistributedDataParallel does, accumulating or not."""
    for options in ({}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}):
        for split, accumulate, keep_zeros in ((False, 1, False), (True, 1, True), (False, 3, False)):
            trained = []
            for probed in (False, True):
                net: nn.Module = network(torch.float64)
                if split:
                    net = rm.split(
                        net, rm.Plan(tasks=TASKS, layers={"body": [["a", "b"], ["c"]], "pair": [["a", "b"], ["c"]]})
                    )
                model = DistributedDataParallel(net, **options)  # type: ignore[arg-type]
                probe = Probe(model, every=2) if probed else None
                optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
                for step in range(4):
                    optimizer.zero_grad(set_to_none=not keep_zeros)
                    for micro in range(accumulate):
                        x = part(batch(dtype=torch.float64, seed=10 * step + micro))
                        with model.no_sync() if micro < accumulate - 1 else nullcontext():
                            found = losses(model(x), x)
                            if probe is None:
                                sum(found.values()).backward()  # type: ignore[union-attr]
                            else:
                                probe.backward(found)
                    optimizer.step()
                trained.append(model.module.state_dict())
                if probe is not None:
                    assert probe.log.steps == 2
                    behind = ["body[a+b]"] if split else ["body", "pair"]
                    assert list(probe.log.layers) == ["stem", "norm", *behind]
                    equal_everywhere(probe.log.grams, *grads(model).values())
            for name, value in trained[0].items():
                if isinstance(value, Tensor):
                    torch.testing.assert_close(trained[1][name], value, rtol=1e-10, atol=1e-13, msg=name)


def check_micro_batches() -> None:
    """`last=False`: the record is of the gradient accumulated over micro-batches and averaged over processes."""
    micro = [batch(dtype=torch.float64, seed=s) for s in (1, 2, 3)]
    have = [TASKS, ("a", "b"), TASKS]
    alone = network(torch.float64)
    expected = Probe(alone, group=False)
    for k, (x, tasks) in enumerate(zip(micro, have, strict=True)):
        expected.backward(losses(alone(x), x, tasks), last=k == 2)
    for wrapped, no_sync, exact in (
        (True, True, False),
        (True, False, False),
        (True, True, True),
        (False, False, False),
    ):
        net = network(torch.float64)
        model = DistributedDataParallel(net, find_unused_parameters=True) if wrapped else net
        probe = Probe(model, every=2, exact=exact, group=None if wrapped else dist.group.WORLD)
        for step in range(3):
            model.zero_grad()
            for k, (x, tasks) in enumerate(zip(micro, have, strict=True)):
                with model.no_sync() if no_sync and k < 2 else nullcontext():  # type: ignore[operator]
                    probe.backward(losses(model(part(x)), part(x), tasks), last=k == 2)
            same_grads(model, grads(alone), 1e-12)
            assert probe.log.steps == 1 + step // 2
        for grams in probe.log.grams:
            torch.testing.assert_close(grams, expected.log.grams[0], rtol=1e-10, atol=1e-12, equal_nan=True)
        equal_everywhere(probe.log.grams, *grads(model).values())
    wrapper = DistributedDataParallel(network())
    probe, x = Probe(wrapper), part(batch())
    with wrapper.no_sync():
        probe.backward(losses(wrapper(x), x), last=False)
        refused("outside `no_sync", lambda: probe.backward(losses(wrapper(x), x)))


def check_missing_tasks() -> None:
    """A process without a task sends zeros for it, as DistributedDataParallel counts it."""
    x, last = batch(dtype=torch.float64), dist.get_world_size() - 1
    for tasks in (("b", "c"), ("c",), ("a", "b")):
        have = tasks if dist.get_rank() == last else TASKS
        plain = DistributedDataParallel(network(torch.float64), find_unused_parameters=True)
        sum(losses(plain(part(x)), part(x), have).values()).backward()  # type: ignore[union-attr]
        whole = network(torch.float64)
        parts = [losses(whole(p), p) for p in x.chunk(last + 1)]
        mean = {t: sum(p[t] for p in (parts if t in tasks else parts[:-1])) / (last + 1) for t in TASKS}
        reference = Gradients(whole, alone=True).sweep(mean)  # type: ignore[arg-type]
        for model in (DistributedDataParallel(network(torch.float64)), network(torch.float64)):
            group = None if isinstance(model, DistributedDataParallel) else dist.group.WORLD
            probe = Probe(model, group=group)
            for step in range(2):
                model.zero_grad()
                with patched(reduction, BUCKET=replicas.BUCKET if step else 200):
                    probe.backward(losses(model(part(x)), part(x), have))
                same_grads(model, grads(plain), 1e-12)
            assert sorted(probe.log.tasks) == list(TASKS)
            found = gradients_of(model, group=group).sweep(losses(model(part(x)), part(x), have))
            at = [found.layout.tasks.index(t) for t in TASKS]
            same_grams(found.gram[:, at][:, :, at], reference.gram, 1e-12)
            equal_everywhere(found.gram, probe.log.grams)
            assert probe.check(losses(model(part(x)), part(x), have)) < 1e-10
            _, rows, own = gradients_of(model, group=group).measure(losses(model(part(x)), part(x), have))
            assert (rows.sum(0) - found.total).norm() <= 1e-12 * rows.norm()
            assert [len(o) for o in own] == [len(o) for o in found.own]


def check_without_wrapper() -> None:
    """`group=`: the probe averages measured steps and plain ones, also where a process has no task at all."""
    x, rank = batch(dtype=torch.float64), dist.get_rank()
    model, whole = network(torch.float64), network(torch.float64)
    probe = Probe(model, every=2, group=dist.group.WORLD)
    for step in range(4):
        tasks = () if rank == step % dist.get_world_size() else TASKS
        model.zero_grad()
        probe.backward(losses(model(part(x)), part(x), tasks))
        whole.zero_grad()
        with_tasks = [p for r, p in enumerate(x.chunk(dist.get_world_size())) if r != step % dist.get_world_size()]
        total = sum(sum(losses(whole(p), p).values()) for p in with_tasks) / dist.get_world_size()
        total.backward()  # type: ignore[union-attr]
        same_grads(model, grads(whole), 1e-12)
    assert probe.log.steps == 2
    other = network(torch.float64)
    with torch.no_grad():
        other.body.weight[0, 0] += rank
    refused(
        "different weights in 'body.weight'", lambda: Probe(other, group=dist.group.WORLD).backward(losses(other(x), x))
    )


def check_weights() -> None:
    """Weights chosen from the Grams are applied to the averages, and are the same everywhere."""
    x = batch(dtype=torch.float64)
    alone = network(torch.float64)

    def weigh(gram: Tensor, _: object) -> Tensor:
        return torch.rand(3, dtype=gram.dtype) if dist.get_rank() else gram.nan_to_num().sum((0, 1)).softmax(0)

    model = DistributedDataParallel(network(torch.float64))
    found = gradients_of(model).sweep(losses(model(part(x)), part(x)), weigh=weigh)
    _, rows, _ = Gradients(alone, alone=True).measure(losses(alone(x), x))
    weights = Gradients(alone, alone=True).sweep(losses(alone(x), x)).gram.nan_to_num().sum((0, 1)).softmax(0)
    assert (found.total - weights @ rows).norm() <= 1e-10 * rows.norm()


def check_balancers() -> None:
    """Three steps are those of one process with the whole batch; what is drawn at random is drawn once for all."""
    for spec in ("joint", "cagrad", "mgda", "pcgrad", "graddrop", "config", "uw", "famo", "rlw", "db-mtl", "gradnorm"):
        for start in (0, 9):  # measured, and not
            alone, model = network(torch.float64), network(torch.float64)
            trained = []
            for net, group, own in ((alone, False, 0), (model, dist.group.WORLD, dist.get_rank())):
                torch.manual_seed(own)
                balancer = Balancer(spec, TASKS)
                probe = Probe(net, balancer=balancer, group=group, start=start)
                optimizer = torch.optim.SGD([*net.parameters(), *balancer.parameters()], lr=0.1, momentum=0.9)
                for step in range(3):
                    x = batch(dtype=torch.float64, seed=step)
                    x = x if group is False else part(x)
                    optimizer.zero_grad()
                    probe.backward(losses(net(x), x))
                    optimizer.step()
                    probe.again(losses(net(x), x))
                trained.append(torch.cat([p.detach().flatten() for p in [*net.parameters(), *balancer.parameters()]]))
            first = trained[1].clone()
            dist.broadcast(first, 0)
            assert torch.equal(trained[1], first), spec
            if dist.get_rank() == 0 or spec not in ("pcgrad", "graddrop", "rlw"):  # drawn by the first process
                assert (trained[1] - trained[0]).norm() <= 1e-9 * trained[0].norm(), spec


def check_balancers_under_autocast() -> None:
    """In bfloat16 the processes' products are rounded one by one: as near as that is, and the same everywhere."""
    for spec in ("joint", "cagrad", "graddrop", "imtl-l"):
        found = []
        for precise, group in ((True, False), (False, False), (False, dist.group.WORLD)):
            net, x = network(), batch()
            x = x if group is False else part(x)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not precise):
                values = losses(net(x), x)
            torch.manual_seed(0)
            Probe(net, balancer=Balancer(spec, TASKS), group=group).backward(values)
            assert all(g.dtype == torch.float32 for g in grads(net).values())
            found.append(torch.cat([g.flatten() for g in grads(net).values()]))
        equal_everywhere(found[2])
        for rounded in found[1:]:
            assert (rounded - found[0]).norm() <= 0.02 * found[0].norm(), spec


def check_balanced_micro_batches() -> None:
    """A balancer acts on what all processes have accumulated; no process, and no micro-batch, need have every task."""
    micro = [batch(dtype=torch.float64, seed=s) for s in (1, 2, 3)]
    have = [TASKS, ("a", "b"), TASKS]
    for spec in ("cagrad:c=0.4", "graddrop", "imtl-l", "db-mtl", "gradnorm"):
        alone = network(torch.float64)
        torch.manual_seed(0)
        expected = Probe(alone, balancer=Balancer(spec, TASKS), group=False)
        for k, (x, tasks) in enumerate(zip(micro, have, strict=True)):
            expected.backward(losses(alone(x), x, tasks), last=k == 2)
        for wrapped in (True, False):
            net = network(torch.float64)
            model = DistributedDataParallel(net, find_unused_parameters=True) if wrapped else net
            balancer = Balancer(spec, TASKS)
            torch.manual_seed(dist.get_rank())
            probe = Probe(model, balancer=balancer, group=None if wrapped else dist.group.WORLD)
            for k, (x, tasks) in enumerate(zip(micro, have, strict=True)):
                with model.no_sync() if wrapped and k < 2 else nullcontext():  # type: ignore[operator]
                    probe.backward(losses(model(part(x)), part(x), tasks), last=k == 2)
            if spec != "graddrop" or dist.get_rank() == 0:  # drawn by the first process
                same_grads(model, grads(alone), 1e-9)
            equal_everywhere(probe.log.grams, *grads(model).values())
            torch.testing.assert_close(probe.log.grams, expected.log.grams, rtol=1e-9, atol=1e-12, equal_nan=True)
    wrapper, x = DistributedDataParallel(network()), part(batch())
    probe = Probe(wrapper, balancer="mgda")
    with wrapper.no_sync():
        refused("say that more micro-batches", lambda: probe.backward(losses(wrapper(x), x)))


def check_failures() -> None:
    """What goes wrong in one process stops all of them with a sentence, and the next step works."""
    x, rank = batch(), dist.get_rank()

    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
            if rank == 1:
                raise RuntimeError("broken here")
            return grad

    for model in (DistributedDataParallel(network()), network()):
        group = None if isinstance(model, DistributedDataParallel) else dist.group.WORLD
        probe = Probe(model, group=group)
        for _ in range(2):
            found = losses(model(part(x)), part(x))
            if rank == 1:
                found["a"] = found["a"].detach()
            who = "^These losses cannot" if rank == 1 else "^Another process .* process 1: "
            refused(f"{who}.*task 'a': the loss depends on no parameter", partial(probe.backward, found))
        found = {t: Breaks.apply(v) for t, v in losses(model(part(x)), part(x)).items()}  # type: ignore[no-untyped-call]
        with pytest.raises((ProbeError, RuntimeError), match="broken here" if rank == 1 else "1 of . processes failed"):
            probe.backward(found)
        assert not grads(model)
        probe.backward(losses(model(part(x)), part(x)))
        assert probe.log.steps == 1
        if group is not None:
            plain = Probe(model, group=group, start=9)
            with pytest.raises((ProbeError, RuntimeError), match="broken here"):
                plain.backward({"a": Breaks.apply(model(part(x))["a"].sum())})  # type: ignore[no-untyped-call]
    wrapped = DistributedDataParallel(network())
    nothing: dict[str, Tensor] = {}
    refused(
        "No task has a loss", lambda: Probe(wrapped).backward(nothing if rank else losses(wrapped(part(x)), part(x)))
    )


def check_refusals() -> None:
    x = batch()
    model = network()
    refused("given a bare model", lambda: Probe(model).backward(losses(model(x), x)))
    Probe(model, group=False).backward(losses(model(x), x))
    refused("group = 'all'", lambda: Probe(model, group="all"))
    refused("does not contain", lambda: Probe(model, group=DistributedDataParallel(network())))
    wrapped = DistributedDataParallel(model)
    refused("group=False", lambda: Probe(wrapped, group=False))
    refused("DistributedDataParallel", lambda: Probe(nn.Sequential(wrapped)))
    refused("this process only", lambda: Probe(wrapped).record_jac(losses(wrapped(part(x)), part(x))))
    model.zero_grad()
    Probe(model, group=wrapped).backward(losses(wrapped(part(x)), part(x)))
    wrapped.register_comm_hook(None, hook)
    refused("communication hook", lambda: Probe(wrapped).backward(losses(wrapped(part(x)), part(x))))
    static = DistributedDataParallel(network(), static_graph=True)
    refused("start=1", lambda: Probe(static).backward(losses(static(part(x)), part(x))))
    partly = network()
    partly._ddp_params_and_buffers_to_ignore = ["heads.b.weight"]  # type: ignore[assignment]
    ignoring = DistributedDataParallel(partly)
    refused("'heads.b.weight' out", lambda: Probe(ignoring).backward(losses(ignoring(part(x)), part(x))))


def hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]  # noqa: ARG001
    raise AssertionError("not reached")


def check_static_graph() -> None:
    x = batch(dtype=torch.float64)
    model = DistributedDataParallel(network(torch.float64), static_graph=True)
    whole = network(torch.float64)
    sum(losses(whole(x), x).values()).backward()  # type: ignore[union-attr]
    probe = Probe(model, start=1, every=2)
    for _ in range(5):
        model.zero_grad()
        probe.backward(losses(model(part(x)), part(x)))
        same_grads(model, grads(whole), 1e-12)
    assert probe.log.steps == 2


def check_budget() -> None:
    """`overhead=`: processes that find different strides agree on one."""
    x, rank = batch(), dist.get_rank()
    model = DistributedDataParallel(network())
    probe = Probe(model, overhead=0.1)
    ticks = iter(
        t for step, probed in enumerate(REHEARSAL) for t in (10 * step, 10 * step + (3 + rank if probed else 1))
    )
    probe._schedule._clock = lambda: float(next(ticks))
    for _ in range(len(REHEARSAL)):
        model.zero_grad()
        probe.backward(losses(model(part(x)), part(x)))
    assert probe.every == {2: 5, 3: 7}[dist.get_world_size()]  # what the last process finds; the first finds 3


def check_exact() -> None:
    x = batch()
    plain, probed = DistributedDataParallel(network()), DistributedDataParallel(network())
    sum(losses(plain(part(x)), part(x)).values()).backward()  # type: ignore[union-attr]
    Probe(probed, exact=True).backward(losses(probed(part(x)), part(x)))
    for name, g in grads(plain).items():
        assert torch.equal(g, grads(probed)[name]), name


def check_sparse() -> None:
    """Gradients of embeddings that autograd makes sparse stay sparse, shared or one task's own."""

    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(9, 4, sparse=True)
            self.own = nn.Embedding(9, 4, sparse=True)

        def forward(self, at: Tensor) -> dict[str, Tensor]:
            return {"a": self.words(at).pow(2).sum(), "b": (self.words(at) * self.own(at)).sum()}

    at = [torch.tensor([1, 2]), torch.tensor([2, 5]), torch.tensor([0, 1])][dist.get_rank()]
    models = []
    for probed in (True, False):
        torch.manual_seed(3)
        model = DistributedDataParallel(Lookup())
        found = model(at)
        Probe(model).backward(found) if probed else sum(found.values()).backward()
        models.append(model)
    assert all(p.grad is not None and p.grad.is_sparse for p in models[0].parameters())
    same_grads(models[0], grads(models[1]), 1e-6)


def check_volume() -> None:
    """Measuring moves at most (tasks + 1) / 2 times what plain DistributedDataParallel moves, by ring volumes."""
    moved = {"probe": 0.0, "plain": 0.0}
    size = dist.get_world_size()
    share = (size - 1) / size

    def counting(name: str, volume: Callable[..., float]) -> Callable[..., Any]:
        real = getattr(dist, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            moved["probe"] += volume(*args)
            return real(*args, **kwargs)

        return counted

    x = batch()
    model = DistributedDataParallel(Wide())
    probe = Probe(model)
    probe.backward(losses(model(part(x)), part(x)))  # the first step also exchanges descriptions in full
    model.zero_grad()
    new = hasattr(dist, "reduce_scatter_single")
    scatter, gather = (
        ("reduce_scatter_single", "all_gather_single") if new else ("reduce_scatter_tensor", "all_gather_into_tensor")
    )
    counted = {
        scatter: counting(scatter, lambda _, given: share * given.nbytes),
        gather: counting(gather, lambda out, _: share * out.nbytes),
        "all_reduce": counting("all_reduce", lambda tensor: 2 * share * tensor.nbytes),
        "broadcast": counting("broadcast", lambda tensor: tensor.nbytes),
    }
    with patched(dist, **counted):
        probe.backward(losses(model(part(x)), part(x)))

    def count(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        moved["plain"] += 2 * share * bucket.buffer().nbytes
        flat = bucket.buffer().div_(size)
        return dist.all_reduce(flat, group=group, async_op=True).get_future().then(lambda f: f.value()[0])  # type: ignore[no-any-return]

    plain = DistributedDataParallel(Wide())
    plain.register_comm_hook(dist.group.WORLD, count)
    sum(losses(plain(part(x)), part(x)).values()).backward()  # type: ignore[union-attr]
    same_grads(model, grads(plain), 1e-5)
    # sums of Gram matrices and what processes tell each other come on top; padding too
    assert moved["probe"] <= (len(TASKS) + 1) / 2 * moved["plain"] + 4096, moved
    assert moved["probe"] >= 1.5 * moved["plain"], moved  # the count counts


class Wide(Net):
    """So many parameters that the descriptions do not matter."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.body = nn.Conv2d(6, 500, 3, stride=2)
        self.pair = nn.Linear(500, 400)
        self.heads = nn.ModuleDict({"a": nn.Linear(500, 1), "b": nn.Linear(400, 1), "c": nn.Linear(400, 2)})


def check_sharded_parameters_are_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    refused("DTensor", lambda: Probe(model))


class Holding(nn.Module):
    """A trunk, and what lies beside it: two heads and learned weights of the losses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5))
        self.heads = nn.ModuleList([nn.Linear(5, 1), nn.Linear(5, 1)])
        self.weights = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.trunk(x)
        return {t: self.heads[i](z).pow(2).mean() * self.weights[i].exp() for i, t in enumerate("ab")}


def check_what_lies_beside_the_probed_model() -> None:
    x = part(torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))
    for micro in (False, True):
        model, plain = Holding().double(), Holding().double()
        wrapper, other = DistributedDataParallel(model), DistributedDataParallel(plain)
        probe = Probe(model.trunk, group=wrapper)
        if micro:
            with wrapper.no_sync(), other.no_sync():
                probe.backward(wrapper(-x), last=False)
                torch.stack(list(other(-x).values())).sum().backward()
        probe.backward(wrapper(x))
        torch.stack(list(other(x).values())).sum().backward()
        same_grads(model, grads(plain), 1e-10)
    bare = Holding().double()
    refused("outside the probed model", lambda: Probe(bare.trunk, group=dist.group.WORLD).backward(bare(x)))


def check_fabric() -> None:
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
    from lightning_fabric.strategies.ddp import DDPStrategy

    x = batch(dtype=torch.float64)
    environment = TorchElasticEnvironment()
    fabric = Fabric(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=DDPStrategy(cluster_environment=environment, process_group_backend="gloo"),
        precision="64-true",
    )
    fabric.launch()
    whole = network(torch.float64)
    model = fabric.setup(network(torch.float64))
    probe = Probe(model, every=2)
    for step in range(2):
        model.zero_grad()
        whole.zero_grad()
        for micro in range(2):
            x = batch(dtype=torch.float64, seed=step + 7 * micro)
            with fabric.no_backward_sync(model, enabled=micro == 0):
                probe.backward(losses(model(part(x)), part(x)))
            sum(losses(whole(x), x).values()).backward()  # type: ignore[union-attr]
        same_grads(
            model, {f"_forward_module.module.{n}": g for n, g in grads(whole).items()}, 1e-6
        )  # Fabric rounds outputs
    assert list(probe.log.layers) == ["stem", "norm", "body", "pair"]


def check_lightning() -> None:
    import lightning.pytorch as lightning
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
    from lightning.pytorch.strategies.ddp import DDPStrategy

    from reconmtl.lightning import ProbeCallback

    whole = network(torch.float64)
    callback = ProbeCallback(module="net", every=2)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(torch.float64)
            self.automatic_optimization = False

        def training_step(self, seed: Tensor) -> None:
            x = batch(dtype=torch.float64, seed=int(seed))
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            callback.backward(losses(self.net(part(x)), part(x)))
            whole.zero_grad()
            sum(losses(whole(x), x).values()).backward()  # type: ignore[union-attr]
            same_grads(self.net, grads(whole), 1e-12)
            optimizer.step()
            with torch.no_grad():
                for p, q in zip(whole.parameters(), self.net.parameters(), strict=True):
                    p.copy_(q)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=DDPStrategy(cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo"),
        max_steps=4,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.arange(4), batch_size=None))  # type: ignore[arg-type]
    log = callback.probe.log
    assert log.steps == 2
    assert list(log.layers) == ["stem", "norm", "body", "pair"]
    equal_everywhere(log.grams)


QUICK = (
    check_the_big_batch,
    check_batch_statistics,
    check_missing_tasks,
    check_without_wrapper,
    check_balancers,
    check_failures,
    check_volume,
)
MORE = (
    check_training,
    check_micro_batches,
    check_weights,
    check_balanced_micro_batches,
    check_balancers_under_autocast,
    check_refusals,
    check_static_graph,
    check_budget,
    check_exact,
    check_sparse,
    check_sharded_parameters_are_refused,
    check_what_lies_beside_the_probed_model,
)


def together(size: int, checks: tuple[Callable[[], None], ...], folder: Path) -> None:
    """Run checks in a group of gloo processes."""
    here = Path(__file__).resolve()
    code = (
        f"import os, sys; sys.path[:0] = [{str(here.parent)!r}, {str(here.parents[1])!r}]\n"
        "import datetime, torch, torch.distributed as dist\n"
        f"import {here.stem} as tests\n"
        "rank = int(sys.argv[1])\n"
        f"dist.init_process_group('gloo', init_method='file://{folder / 'store'}', rank=rank, world_size={size},\n"
        "                        timeout=datetime.timedelta(seconds=60))\n"
        f"for name in {[c.__name__ for c in checks]!r}:\n"
        "    try:\n"
        "        getattr(tests, name)()\n"
        "    except BaseException as error:\n"
        "        import traceback; traceback.print_exc()\n"
        "        print(f'{name} in process {rank}', file=sys.stderr, flush=True)\n"
        "        os._exit(1)\n"
        "dist.barrier()\n"
        "os._exit(0)\n"  # gloo's threads may still run, and abort an orderly end
    )
    processes = []
    for r in range(size):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "RANK": str(r),
            "LOCAL_RANK": str(r),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29511",
            "TORCHELASTIC_RUN_ID": "0",
        }
        processes.append(
            subprocess.Popen([sys.executable, "-c", code, str(r)], env=environment, stderr=subprocess.PIPE, text=True)
        )
    try:
        errors = [p.communicate(timeout=200)[1] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert all(p.returncode == 0 for p in processes), "\n".join(e[-3000:] for e in errors)


def test_two_processes(tmp_path: Path) -> None:
    together(2, QUICK, tmp_path)


@pytest.mark.slow
def test_two_processes_further(tmp_path: Path) -> None:
    together(2, MORE, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("check", [QUICK, MORE])
def test_three_processes(check: tuple[Callable[[], None], ...], tmp_path: Path) -> None:
    together(3, check, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_fabric, check_lightning])
def test_frameworks(check: Callable[[], None], tmp_path: Path) -> None:
    together(2, (check,), tmp_path)


class Chatty(Net):
    """Among its outputs are numbers, nothing, and tensors without a gradient."""

    def forward(self, x: Tensor) -> Any:
        return 3, x, super().forward(x), None, x.mean()


def test_one_process_under_a_wrapper_needs_no_others(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        x, model = batch(), Chatty()
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        found = losses(wrapped(x)[2], x)
        probe = Probe(wrapped)
        assert type(probe._gradients) is Gradients
        layers = {n: list(model.get_submodule(n).parameters()) for n in ("stem", "norm", "body", "pair")}
        expected = reference_grams(found, layers)
        probe.backward(found)
        upper = torch.triu_indices(3, 3)
        torch.testing.assert_close(
            probe.log.grams[0].nan_to_num().double(), expected[:, upper[0], upper[1]], rtol=1e-5, atol=1e-7
        )
    finally:
        dist.destroy_process_group()
