"""What an accelerator does otherwise: cuDNN's recurrent kernels, SyncBatchNorm, autocast, its own random state."""

import copy
import os
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from reconmtl.plan import Plan
from reconmtl.splitting import cost, saved_plan, split, verify, view
from reconmtl.splitting.structure import tensors, transform
from zoo import TASKS, ZOO, build

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

LAYERS = {
    "residual": ["trunk.0.conv2", "trunk.1.bn1"],
    "lstm": ["trunk.rnn"],
    "gru": ["trunk.rnn"],
    "rnn": ["trunk.rnn"],
    "tokens": ["blocks.1.qkv"],
    "encoder": ["trunk.encoder.layers.0.linear1"],
}


def inputs(name: str) -> tuple[Any, ...]:
    return cast(tuple[Any, ...], transform(ZOO[name].inputs(), lambda t: t.cuda()))


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with flags:
        yield


@pytest.mark.parametrize("where", ["split there", "moved there"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_split_model_is_one_network_per_task(name: str, where: str) -> None:
    net, args, plan = build(name), inputs(name), Plan(tasks=TASKS, layers=LAYERS[name])
    model = split(net.cuda(), plan) if where == "split there" else split(net, plan, sample=ZOO[name].inputs()).cuda()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    found = verify(model, args)  # on plain networks of their own, gradients and statistics included
    assert found.modes == ("train", "eval") and found.output <= 1e-5 and found.gradient <= 1e-4
    for m in model.modules():
        if isinstance(m, nn.RNNBase):
            m.flatten_parameters()
    model.eval()
    out = model(*args)
    for t in TASKS:
        torch.testing.assert_close(out[t], view(model, t)(*args)[t], rtol=1e-5, atol=1e-6)
    assert all(p.is_cuda for p in model.parameters()) and all(b.is_cuda for b in model.buffers())
    state = {k: v.cpu() for k, v in model.state_dict().items()}
    again = split(build(name), saved_plan(state)).cuda()
    again.load_state_dict(state)
    for t in TASKS:
        torch.testing.assert_close(again.eval()(*args)[t], out[t], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["residual", "tokens", "lstm"])
def test_autocast(name: str, dtype: torch.dtype) -> None:
    args, plan = inputs(name), Plan(tasks=TASKS, layers=LAYERS[name])
    model = split(build(name).cuda().eval(), plan, sample=args)
    with torch.autocast("cuda", dtype=dtype):
        out = model(*args)
        for t in TASKS:
            assert out[t].dtype == dtype
            assert torch.equal(out[t], view(model, t)(*args)[t])
        torch.stack([o.float().square().mean() for o in out.values()]).sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_dropout_draws_a_mask_per_branch_and_leaves_the_random_state_of_a_split_alone() -> None:
    before = torch.cuda.get_rng_state()
    net = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5)).cuda()
    x = torch.ones(4, 6, device="cuda")
    model = split(net, Plan(tasks=TASKS, layers=["0"]), sample=x)
    assert torch.equal(before, torch.cuda.get_rng_state())
    out = model(x)
    assert not torch.equal(out["a"] == 0, out["b"] == 0)


@pytest.fixture
def process_group() -> Iterator[None]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29591")
    torch.distributed.init_process_group("nccl", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_synchronised_batch_norm_keeps_statistics_per_task() -> None:
    args, plan = inputs("residual"), Plan(tasks=TASKS, layers=LAYERS["residual"])
    plain = split(build("residual").cuda(), plan, sample=args)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(build("residual").cuda())
    wrapped = nn.parallel.DistributedDataParallel(split(net, plan, sample=args))
    for model in (plain, wrapped):
        out = cast(dict[str, Tensor], model(*args))
        torch.stack([o.square().mean() for o in out.values()]).sum().backward()
    for (n, a), b in zip(plain.named_buffers(), wrapped.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=n)
    for (n, p), q in zip(plain.named_parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4, msg=n)


def test_a_view_compiles_and_a_split_model_runs_under_compilation() -> None:
    args, plan = inputs("residual"), Plan(tasks=TASKS, layers=LAYERS["residual"])
    model = split(build("residual").cuda().eval(), plan, sample=args)
    torch.compiler.reset()
    compiled = torch.compile(view(model, "b"), backend="eager", fullgraph=True)
    assert torch.equal(compiled(*args)["b"], model(*args)["b"])
    whole = torch.compile(model, backend="eager")
    assert all(torch.equal(whole(*args)[t], model(*args)[t]) for t in TASKS)
    assert cost(model, sample=args).flops == cost(copy.deepcopy(model).cpu(), sample=ZOO["residual"].inputs()).flops
    assert all(t.is_cuda for t in tensors(whole(*args)))
