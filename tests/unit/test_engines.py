"""Both engines, in one piece and in as many stages as can be, against one plain backward pass per task."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import reconmtl as rm
from reconmtl.conflicts import cosines_from_grams
from reconmtl.engines import Shape, pays
from reconmtl.gram import Gradients, add_update, grams
from reconmtl.oracle import reference_grams

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
TASKS = ("a", "b", "c")


class Net(nn.Module):
    """A trunk, and a linear head per task on its flattened features."""

    def __init__(self, trunk: nn.Module, width: int, tasks: tuple[str, ...] = TASKS) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleDict({t: nn.Linear(width, 2) for t in tasks})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.trunk(x).flatten(1)
        return {t: head(torch.tanh(z) * (1 + i)) for i, (t, head) in enumerate(self.heads.items())}


class Convolutions(nn.Module):
    """Every geometry: strides, dilation, rectangles, padding of all kinds, groups, transposed, in-place afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 4, 3, padding=1)
        self.strided = nn.Conv2d(4, 5, (3, 2), stride=(2, 1), padding=(0, 1), bias=False)
        self.dilated = nn.Conv2d(5, 4, 3, dilation=2, padding=2)
        self.same = nn.Conv2d(4, 4, (2, 3), padding="same")
        self.reflect = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.groups = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.point = nn.Conv2d(6, 3, 1)
        self.up = nn.ConvTranspose2d(3, 2, 2, stride=2)
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.strided(F.relu_(self.plain(x.contiguous(memory_format=torch.channels_last)))))
        x = torch.sigmoid_(self.same(self.dilated(x)))
        x = self.groups(self.circular(self.reflect(x)).tanh())
        out: Tensor = F.adaptive_avg_pool2d(self.norm(self.up(self.point(x))), 2)
        return out


class Signals(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(3, 4, 3, stride=2, padding=1, dilation=2)
        self.volume = nn.Conv3d(1, 2, 2)
        self.linear = nn.Linear(5, 6)
        self.bare = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z = self.volume(torch.tanh(self.conv1(x)).view(len(x), 1, 2, 2, 5)).view(len(x), 2, 4)
        z = self.linear(torch.cat([z, z[..., :1]], -1))  # [batch, positions, features]
        out: Tensor = self.bare(torch.tanh(z)).transpose(1, 2)
        return out


class Shapes(nn.Module):
    """Weights that no module's call uses alone: called twice, tied, parametrised, decayed in a loss, functional."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(5, 5)
        self.encode, self.decode = nn.Linear(5, 5, bias=False), nn.Linear(5, 5)
        self.decode.weight = self.encode.weight
        self.normed = parametrizations.weight_norm(nn.Linear(5, 5))
        self.direct = nn.Parameter(torch.eye(5) + 0.1)
        self.last = nn.Linear(5, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.halffrozen = nn.Linear(4, 4)
        self.halffrozen.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(torch.tanh(self.twice(x)))
        x = self.normed(self.decode(torch.tanh(self.encode(x)))) @ self.direct
        out: Tensor = self.halffrozen(self.frozen(torch.tanh(self.last(x))))
        return out


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.recur = nn.LSTM(8, 8, batch_first=True)
        self.block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(self.recur(self.embed(x))[0])
        return out.mean(1)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 5))
        self.outer = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = checkpoint(self.inner, x, use_reentrant=False)
        assert isinstance(out, Tensor)
        features: Tensor = self.outer(torch.relu(out))
        return features


class Taps(nn.Module):
    """Skip connections across everything, heads at several depths, one tied to the trunk, two tasks with one loss."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.part = nn.Linear(5, 5)
        self.side = nn.Linear(10, 2)
        self.only = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x1 = torch.tanh(self.a(x))
        x2 = torch.tanh(self.b(x1)) + x1
        x3 = torch.tanh(self.c(x2)) + x1
        x4 = torch.tanh(self.part(x3))
        deep = x4.pow(2).sum(1)
        return {
            "a": self.side(torch.cat([x1, x3], 1)),
            "b": deep,
            "c": self.only(x4) + F.linear(x2, self.b.weight).mean(1, keepdim=True),
            "d": deep,
            "e": x2.sum(1),
        }


class Bf16(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out: Tensor = self.net(x)
        return out.to(x.dtype)


def _split() -> nn.Module:
    plan = rm.Plan(tasks=TASKS, layers={"trunk.2": [["a", "c"], ["b"]], "trunk.4": [["a"], ["b"], ["c"]]})
    trunk = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
    return rm.split(Net(trunk, 4), plan, sample=torch.zeros(2, 5))


def _residual() -> nn.Module:
    from reconmtl.networks import resnet

    return resnet.multifashion(width=4)


def _noise(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, dtype=torch.float64)


ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str, str]] = {
    # name: (network, input, layers that `delta` measures, layers that it must not)
    "convolutions": (
        lambda: Net(Convolutions(), 8),
        _noise(4, 3, 8, 7),
        "trunk.plain trunk.strided trunk.dilated trunk.same trunk.reflect trunk.circular trunk.point",
        "trunk.groups trunk.up trunk.norm",
    ),
    "signals": (
        lambda: Net(Signals(), 6),
        _noise(4, 3, 12),
        "trunk.conv1 trunk.linear trunk.bare",
        "trunk.volume",
    ),
    "shapes": (
        lambda: Net(Shapes(), 4),
        _noise(7, 5),
        "trunk.last trunk.halffrozen",
        "trunk trunk.twice trunk.encode trunk.decode trunk.normed.parametrizations.weight",
    ),
    "language": (
        lambda: Net(Language(), 8),
        lambda: torch.randint(0, 11, (4, 6)),
        "trunk.block.linear1 trunk.block.linear2 trunk.block.self_attn.out_proj",
        "trunk.embed trunk.recur trunk.block.norm1",
    ),
    "checkpointed": (
        lambda: Net(Checkpointed(), 4),
        _noise(9, 5),
        "trunk.outer",
        "trunk.inner.0 trunk.inner.1 trunk.inner.3",
    ),
    "taps": (Taps, _noise(9, 5), "a c part", "b"),
    "split": (_split, _noise(9, 5), "trunk.0 trunk.2[a+c]", ""),
    "residual": (_residual, lambda: torch.rand(6, 1, 36, 36, dtype=torch.float64), "", ""),
    "bf16": (lambda: Net(Bf16(), 4), _noise(9, 5), "", "trunk.net.0 trunk.net.2"),
}


def _make(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, draw, _, _ = ZOO[name]
    model, x = make().to(dtype), draw()
    return model, x.to(dtype) if x.is_floating_point() else x


def _losses(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(1)  # dropout
    out = model(x)
    losses = {
        t: F.mse_loss(o, torch.linspace(-1, 1 + i, o.numel(), dtype=o.dtype).view(o.shape))
        for i, (t, o) in enumerate(out.items())
    }
    if "d" in losses:
        losses["d"] = losses["b"]  # one and the same tensor for two tasks
    return losses


def _state(model: nn.Module) -> dict[str, Tensor]:
    grads = {f"{n}.grad": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {**grads, **{n: b.clone() for n, b in model.named_buffers()}}


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("engine", ["flat", "delta"])
def test_grams_update_and_buffers_equal_plain_passes(name: str, dtype: torch.dtype, engine: str) -> None:
    model, x = _make(name, dtype)
    plain, _ = _make(name, dtype)
    total = sum(_losses(plain, x).values())
    assert isinstance(total, Tensor)
    total.backward()
    expected = {k: v.double() for k, v in _state(plain).items()}
    initial = {n: b.clone() for n, b in model.named_buffers()}
    for memory in (float("inf"), 0):
        gradients = Gradients(model, engine=engine, memory=memory)
        model.load_state_dict(initial, strict=False)
        measured = None
        for _ in range(2):  # the first sweep also compares the engines, the second relies on it
            model.zero_grad()
            model.load_state_dict(initial, strict=False)
            state = torch.get_rng_state()
            found = gradients.sweep(_losses(model, x))
            add_update(found.layout, found.total, found.own)
            torch.set_rng_state(state)
            ours = _state(model)
            ours = {k: v.double() for k, v in ours.items()}
            assert ours.keys() == expected.keys()
            tight, scale = dtype == torch.float64, max(float(v.abs().max()) for v in expected.values())
            for key, value in expected.items():
                if name == "bf16" and key.endswith(".grad"):  # casts are rounded per task, not once for the sum
                    torch.testing.assert_close(ours[key], value, rtol=0.05, atol=0.05)
                    continue
                error, norm = float((ours[key] - value).norm()), float(value.norm())
                noise = norm < 1e-5 * scale  # a bias in front of a normalisation, say
                bound = 1e-10 if tight else 2e-6
                assert error <= (bound * scale if noise else bound * norm), (key, error)
            if measured is not None:
                torch.testing.assert_close(found.gram, measured, rtol=1e-5, atol=1e-9, equal_nan=True)
            measured = found.gram
        layout = found.layout
        model.load_state_dict(initial, strict=False)
        reference = _reference(gradients, _losses(model, x))
        n = len(layout.tasks)
        upper = torch.triu_indices(n, n)
        cosines = cosines_from_grams(found.gram.double()[:, upper[0], upper[1]], n)
        theirs = cosines_from_grams(reference[:, upper[0], upper[1]], n)
        loud = reference.diagonal(dim1=1, dim2=2).amax(1) > 1e-12 * reference.diagonal(dim1=1, dim2=2).max()
        error = float((cosines - theirs).abs()[loud].nan_to_num(0).max())
        assert error <= (1e-10 if dtype == torch.float64 else 5e-6), error


def _reference(gradients: Gradients, losses: dict[str, Tensor]) -> Tensor:
    layout = gradients.layout(losses)
    shared = dict(layout.shared)
    own = {
        x.name: [shared[p] for p in x.parameters if p in shared] for x in gradients.layers if x.name in layout.layers
    }
    return reference_grams(losses, own)


@pytest.mark.parametrize("name", ZOO)
def test_which_layers_qualify_is_known_by_name(name: str) -> None:
    model, x = _make(name, torch.float32)
    gradients = Gradients(model, engine="delta")
    gradients.sweep(_losses(model, x))
    for layer in ZOO[name][2].split():
        assert gradients.engines[layer] == "delta", (layer, gradients.engines[layer])
    for layer in ZOO[name][3].split():
        assert gradients.engines[layer].startswith("flat ("), layer
    if name == "checkpointed":
        assert "checkpointing" in gradients.engines["trunk.inner.0"]


def test_the_update_follows_any_weights_of_the_grams() -> None:
    for engine in ("flat", "delta"):
        model, x = _make("convolutions", torch.float64)
        gradients = Gradients(model, engine=engine, memory=0)
        weights = torch.tensor([0.5, -2.0, 3.0])
        seen: list[Tensor] = []

        def weigh(gram: Tensor, _: object, seen: list[Tensor] = seen, weights: Tensor = weights) -> Tensor:
            seen.append(gram)
            return weights

        found = gradients.sweep(_losses(model, x), weigh=weigh)
        layout, rows, _ = gradients.measure(_losses(model, x))
        torch.testing.assert_close(found.total, weights.double() @ rows, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(seen[0], grams(layout, rows), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("by_pixels", [True, False])
@pytest.mark.parametrize("name", ["convolutions", "signals", "residual"])
def test_windows_and_pixels_give_the_same_inner_products(
    name: str, by_pixels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Shape] = []

    def choose(shape: Shape) -> bool:
        seen.append(shape)
        return by_pixels and shape.taps > 1

    monkeypatch.setattr(Shape, "by_pixels", property(choose))
    model, x = _make(name, torch.float64)
    gradients = Gradients(model, engine="delta")
    found = gradients.sweep(_losses(model, x))
    layout, rows, _ = Gradients(model, engine="flat").measure(_losses(model, x))
    assert any(s.taps > 1 for s in seen)
    assert "differed" not in str(gradients.engines)
    torch.testing.assert_close(found.gram, grams(layout, rows), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.total, rows.sum(0), rtol=1e-9, atol=1e-12)


def test_a_layer_whose_delta_differs_falls_back_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _make("signals", torch.float64)
    found = Gradients(model, engine="flat").sweep(_losses(model, x))
    from reconmtl.engines import Site

    exact = Site.input_gram
    monkeypatch.setattr(Site, "input_gram", lambda s, x: exact(s, x) * (1.001 if s.shape.outputs == 6 else 1.0))
    gradients = Gradients(model, engine="delta")
    for _ in range(2):
        again = gradients.sweep(_losses(model, x))
        torch.testing.assert_close(again.gram, found.gram, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(again.total, found.total, rtol=1e-9, atol=1e-14)
    assert gradients.engines["trunk.linear"] == "flat (delta differed from flat)"
    assert gradients.engines["trunk.bare"] == "delta"


def test_an_input_changed_in_place_raises_autograds_own_error() -> None:
    model = nn.Linear(3, 2)
    x = torch.ones(4, 3)
    out = model(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        Gradients(model, engine="delta").sweep({"a": out.sum(), "b": out.pow(2).sum()})


def test_a_layer_whose_gradient_is_zero_is_compared_once_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from reconmtl.engines import Site

    exact = Site.input_gram
    monkeypatch.setattr(Site, "input_gram", lambda s, x: exact(s, x) * 1.001)
    torch.manual_seed(0)
    last = nn.Linear(5, 3)
    model = nn.Sequential(nn.Linear(4, 5), last).double()
    nn.init.zeros_(last.weight)  # as an adapter or the last layer of a residual branch begins
    gradients = Gradients(model, engine="delta")
    for step in range(3):
        out = model(torch.randn(6, 4, dtype=torch.float64))
        gradients.sweep({"a": out.sum(), "b": out.pow(2).sum()})
        assert gradients.engines["0"] == ("flat (delta differed from flat)" if step == 2 else "delta")
        nn.init.ones_(last.weight)


def test_auto_takes_delta_only_where_it_pays() -> None:
    assert pays(Shape(64, 1024, 1024), 8)
    assert pays(Shape(128, 4608, 512, 128, 9), 2)
    assert not pays(Shape(82944, 576, 64, 82944, 9), 8)
    assert not pays(Shape(2048, 256, 256), 8)
    torch.manual_seed(0)
    model = Net(nn.Sequential(nn.Linear(200, 300), nn.Tanh(), nn.Linear(300, 2)), 2)
    gradients = Gradients(model, engine="auto")
    gradients.sweep(_losses(model, torch.randn(16, 200)))
    assert gradients.engines == {"trunk.0": "delta", "trunk.2": "flat (delta would not pay)"}


@contextmanager
def _counting() -> Iterator[list[str]]:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
            seen.append(f"{func.name()}{args[-1] if 'convolution_backward' in func.name() else ''}")
            return func(*args, **(kwargs or {}))

    with Count():  # type: ignore[no-untyped-call]
        yield seen


def test_delta_takes_no_weight_gradient_of_a_convolution() -> None:
    torch.manual_seed(0)
    model = Net(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1)), 3)
    gradients = Gradients(model, engine="delta")
    x = torch.randn(2, 2, 8, 8)
    gradients.sweep(_losses(model, x))
    losses = _losses(model, x)
    with _counting() as seen:
        gradients.sweep(losses)
    backward = [s for s in seen if "convolution_backward" in s]
    assert backward == ["aten::convolution_backward[True, False, False]"] * 3  # the second layer's, per task


@pytest.mark.parametrize(
    "setting",
    [
        "pass",
        "torch.set_float32_matmul_precision('medium')",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.fp32_precision = 'tf32'",
        "torch.backends.cuda.matmul.allow_tf32 = True",
    ],
)
def test_full_precision_is_full_and_leaves_no_trace_whatever_the_user_has_set(setting: str) -> None:
    code = f"""
import torch
from reconmtl.engines import full_precision, rounds_to_tf32

def state():
    out = []
    for read in (
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: torch.backends.cuda.matmul.fp32_precision,
        torch.get_float32_matmul_precision,
    ):
        try:
            out.append(read())
        except RuntimeError as error:
            out.append(str(error))
    return out

{setting}
before = state()
with full_precision(torch.device("cuda")):
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
assert state() == before
rounds_to_tf32()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)
