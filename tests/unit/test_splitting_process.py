"""Split models in other processes: pickles, checkpoint files, memory of many steps; and what messages tell to type."""

import os
import pickle
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call, vmap

import reconmtl as rm
from reconmtl import splitting
from reconmtl.errors import SplitError
from reconmtl.plan import Plan
from reconmtl.splitting import split, verify
from zoo import TASKS, Headed, build

TESTS = Path(__file__).resolve().parents[1]
SOURCES = Path(splitting.__file__).parent
X = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
PLAN = Plan(tasks=TASKS, layers={"trunk.0.bn1": [["a", "c"], ["b"]], "trunk.1.conv1": [["a"], ["b"], ["c"]]})


def in_another_process(code: str, *arguments: object) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "OMP_NUM_THREADS": "1"}
    command: Sequence[str] = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def trained() -> nn.Module:
    model = split(build("residual"), PLAN, sample=X)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    model(X)
    return model.eval()


READ = """
import pickle, sys, torch
from pathlib import Path
from safetensors.torch import load_file
from reconmtl.splitting import saved_plan, split
from zoo import build
folder = Path(sys.argv[1])
x, expected = torch.load(folder / "x"), torch.load(folder / "expected")
torch.manual_seed(99)
for state in (None, load_file(folder / "safetensors"), torch.load(folder / "state", weights_only=True)):
    if state is None:
        model = pickle.loads((folder / "pickle").read_bytes())
    else:
        model = split(build("residual"), saved_plan(state))
        with torch.no_grad():
            for p in model.parameters():
                p.normal_()
        model.load_state_dict(state)
    out = model.eval()(x)
    assert list(out) == list(expected) and all(torch.equal(out[t], expected[t]) for t in out)
    model.train()(x)["b"].sum().backward()
    assert model.trunk[1].conv1.per_task.b.weight.grad is not None
    assert model.trunk[1].conv1.per_task.a.weight.grad is None
print("read")
"""


def test_a_model_is_read_by_another_process_that_has_no_plan(tmp_path: Path) -> None:
    model = trained()
    torch.save(X, tmp_path / "x")
    torch.save({t: o.detach() for t, o in model(X).items()}, tmp_path / "expected")
    (tmp_path / "pickle").write_bytes(pickle.dumps(model))
    torch.save(model.state_dict(), tmp_path / "state")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "safetensors")
    assert in_another_process(READ, tmp_path) == "read\n"


GROWTH = """
import gc, sys, torch
from reconmtl.plan import Plan
from reconmtl.splitting import split, view
from zoo import TASKS, ZOO, build
name, layer = sys.argv[1:]
args = ZOO[name].inputs()
model = split(build(name), Plan(tasks=TASKS, layers=[layer]), sample=args)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

def steps(n):
    for _ in range(n):
        optimizer.zero_grad()
        torch.stack([o.square().sum() for o in model(*args).values()]).sum().backward()
        optimizer.step()
        view(model, "b")
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * 4

steps(60)
before = steps(60)
print(steps(200) - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("name", "layer"), [("residual", "trunk.0.conv1"), ("lstm", "trunk.embed"), ("remembering", "trunk.0")]
)
def test_two_hundred_steps_take_no_more_memory(name: str, layer: str) -> None:
    """A leak of one branched activation per step would be megabytes."""
    assert int(in_another_process(GROWTH, name, layer)) < 1500  # KiB


def test_what_messages_tell_to_type_exists() -> None:
    text = "\n".join(p.read_text(encoding="utf-8") for p in [*SOURCES.glob("*.py"), TESTS.parent / "docs/splitting.md"])
    names = set(re.findall(r"\brm\.([a-zA-Z_]+)", text))
    assert {"view", "split", "verify", "split_optimizer", "cost"} <= names
    assert not [n for n in names if not hasattr(rm, n)]
    imports = set(re.findall(r"from reconmtl\.splitting import ([a-z_, ]+)", text))
    assert not [n for line in imports for n in line.split(", ") if not hasattr(splitting, n.strip())]


def test_the_message_about_another_plan_is_code_that_runs() -> None:
    state = trained().state_dict()
    other = split(build("residual"), Plan(tasks=TASKS, layers=["trunk.0.conv1"]))
    with pytest.raises(SplitError) as caught:
        other.load_state_dict(state)
    call, line = re.findall(r"`([^`]+)`", str(caught.value))
    names: dict[str, Any] = {"rm": rm, "model": build("residual"), "state": state}
    exec(line, names)
    again = eval(call, names)
    again.load_state_dict(state)
    assert all(torch.equal(again.eval()(X)[t], trained()(X)[t]) for t in TASKS)


# Transforms, hooks and precision of the whole -----------------------------------------------------------------------


def test_transforms_from_outside_are_right_and_inside_of_branches_are_refused() -> None:
    model = trained()
    state: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    samples = torch.randn(4, 1, 2, 8, 8)
    each = vmap(lambda x: functional_call(model, state, (x,)))(samples)
    for t in TASKS:
        torch.testing.assert_close(each[t][:, 0], model(samples[:, 0])[t], rtol=1e-4, atol=1e-5)

    class Mapped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return vmap(super().forward)(x)

    torch.manual_seed(0)
    net, x = Headed(nn.Sequential(nn.Linear(6, 6), nn.Sequential(Mapped(6, 6))), 6, TASKS), torch.randn(4, 6)
    split(net, Plan(tasks=TASKS, layers=["trunk.0"]), sample=x, atomic=["trunk.1"])

    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return cast(Tensor, vmap(lambda row: self.b(row))(y))

    with pytest.raises(SplitError, match=r"vmap.*atomic=\["):
        split(Headed(Outside(), 6, TASKS), Plan(tasks=TASKS, layers=["trunk.a"]))(x)


def test_backward_hooks_of_modules_behind_a_split_layer_are_refused() -> None:
    model: Any = trained()
    handle = model.trunk[1].relu.register_full_backward_hook(lambda *_: None)
    with pytest.raises(SplitError, match="full backward hook"):
        model(X)
    handle.remove()
    seen: list[torch.Size] = []

    def note(_: nn.Module, __: Any, out: Tensor) -> None:
        out.register_hook(lambda g: seen.append(g.shape))

    model.trunk[1].relu.register_forward_hook(note)
    torch.stack([o.sum() for o in model(X).values()]).sum().backward()
    assert seen and set(seen) == {torch.Size([3, 4, 8, 8])}


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, nn.Module.double], ids=lambda f: f.__name__)
def test_converted_models_are_those_of_converted_networks(convert: Any) -> None:
    model = convert(split(build("residual"), PLAN, sample=X)).eval()
    net = convert(build("residual")).eval()
    x = X.to(next(net.parameters()).dtype)
    assert all(torch.equal(model(x)[t], net(x)[t]) for t in TASKS)
    assert {b.dtype for b in model.buffers() if b.is_floating_point()} == {x.dtype}
    verify(model, x)
