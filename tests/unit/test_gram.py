import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import oracles
from reconmtl.errors import LayerMatchError, ProbeError
from reconmtl.gram import Gradients, add_update, grams, reach
from reconmtl.networks import resnet
from reconmtl.oracle import reference_grams
from reconmtl.probing import Probe


class Partial(nn.Module):
    """Three tasks; `middle` is reached by two of them, `alone` by one, `unused` by none, `frozen` does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(5, 6)
        self.middle = nn.Linear(6, 6)
        self.alone = nn.Linear(6, 1)
        self.unused = nn.Linear(2, 2)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = torch.tanh(self.frozen(self.trunk(x)))
        y = torch.tanh(self.middle(z)) * self.scale
        return {"a": y.sum(1), "b": y.pow(2).sum(1), "c": self.alone(z).squeeze(1)}


class Sequence(nn.Module):
    """An embedding, a recurrent net, attention and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.recur = nn.LSTM(8, 8, batch_first=True)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.twice = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 1), "b": nn.Linear(8, 1)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z, _ = self.recur(self.embed(x))
        z = self.norm(z + self.attend(z, z, z, need_weights=False)[0])
        z = self.twice(torch.relu(self.twice(z))).mean(1)
        return {t: head(z).squeeze(1) for t, head in self.heads.items()}


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = checkpoint(lambda v: self.second(torch.tanh(self.first(v))), x, use_reentrant=False)
        assert isinstance(z, Tensor)
        return {"a": z[:, 0], "b": z[:, 1], "c": z[:, 2]}


class Tied(nn.Module):
    """The second layer's weight is the first one's."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(5, 5, bias=False)
        self.decode = nn.Linear(5, 5)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.decode(torch.tanh(self.encode(x)))
        return {"a": z[:, 0], "b": z[:, 1]}


def _losses(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    outputs = model(x)
    return {
        t: nn.functional.mse_loss(o, torch.linspace(-1, 1 + i, o.numel(), dtype=o.dtype).view(o.shape))
        for i, (t, o) in enumerate(outputs.items())
    }


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "partial": (Partial, lambda: torch.randn(9, 5, dtype=torch.float64)),
    "sequence": (Sequence, lambda: torch.randint(0, 11, (4, 6))),
    "checkpointed": (Checkpointed, lambda: torch.randn(9, 5, dtype=torch.float64)),
    "tied": (Tied, lambda: torch.randn(9, 5, dtype=torch.float64)),
    "resnet": (lambda: resnet.multifashion(width=4), lambda: torch.rand(6, 1, 36, 36, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_gram_equals_one_backward_pass_per_task_in_float64(name: str) -> None:
    torch.manual_seed(0)
    make, draw = NETWORKS[name]
    model, x = make().double(), draw()
    losses = _losses(model, x)
    gradients = Gradients(model)
    layout, rows, _ = gradients.measure(losses, retain_graph=True)
    measured = grams(layout, rows)
    parameters = dict(model.named_parameters())
    own = {layer.name: [parameters[n] for n in layer.parameters] for layer in gradients.layers}
    shared = dict(layout.shared)
    expected = oracles.gram(
        losses, [[p for p in own[n] if any(p is q for q in shared.values())] for n in layout.layers]
    )
    power = torch.stack([e.diagonal().max() for e in expected])
    for k, segment in enumerate(layout.segments):
        if power[k] < 1e-12 * power.max():
            continue  # rounding noise: a gradient that is zero but for the order of summation
        at = torch.tensor(segment.tasks)
        torch.testing.assert_close(
            measured[k][at][:, at], expected[k][at][:, at], rtol=1e-10, atol=1e-10 * float(power[k])
        )


def test_what_is_shared_is_found_from_the_graph() -> None:
    torch.manual_seed(0)
    model = Partial().double()
    layout, rows, own = Gradients(model).measure(_losses(model, torch.randn(9, 5, dtype=torch.float64)))
    assert layout.layers == ("(root)", "trunk", "middle")
    assert [s.tasks for s in layout.segments] == [(0, 1), (0, 1, 2), (0, 1)]
    measured = grams(layout, rows)
    assert measured[1].isfinite().all()
    assert measured[0, :2, :2].isfinite().all()
    assert measured[0, 2].isnan().all()
    assert measured[0, :, 2].isnan().all()
    assert [len(p) for p in layout.exclusive] == [0, 0, 2]
    assert [len(g) for g in own] == [0, 0, 2]


def test_a_zero_gradient_still_counts_as_shared() -> None:
    model = nn.Linear(3, 2)
    out = model(torch.ones(4, 3))
    layout = Gradients(model).layout({"a": out.sum(), "b": (out * 0).sum()})
    assert layout.layers == ("(root)",)
    assert layout.segments[0].tasks == (0, 1)


def test_rows_of_absent_tasks_are_zero_after_another_graph_used_the_buffer() -> None:
    torch.manual_seed(0)
    model = Partial().double()
    gradients = Gradients(model)
    x = torch.randn(9, 5, dtype=torch.float64)
    gradients.measure(_losses(model, x))
    layout, rows, _ = gradients.measure(_losses(model, x))
    start = next(s.start for s in layout.segments if s.layer == "middle")
    assert (rows[2, start:] == 0).all()
    assert (rows[0, start:] != 0).any()


def test_reach_is_the_set_of_losses_that_depend_on_a_leaf() -> None:
    a, b, c = (torch.ones(1, requires_grad=True) for _ in range(3))
    middle = (a * b).exp()
    masks = reach([(middle + c).sum(), middle.sum(), (c * 2).sum()])
    assert [masks[id(v)] for v in (a, b, c)] == [0b011, 0b011, 0b101]


class Spectrum(nn.Module):
    """A complex filter and a real weight in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(4, dtype=torch.cdouble))
        self.scale = nn.Parameter(torch.randn(7, dtype=torch.double))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=7)
        return y * self.scale


def test_complex_parameters_count_with_real_and_imaginary_part() -> None:
    torch.manual_seed(0)
    model, x = Spectrum(), torch.randn(5, 7, dtype=torch.double)
    twin = copy.deepcopy(model)

    def losses(model: nn.Module) -> dict[str, Tensor]:
        y = model(x)
        return {"a": y.pow(2).mean(), "b": y.sin().sum(), "c": (y[:, 0] * y[:, 1]).mean()}

    expected = oracles.gram(losses(model), [list(model.parameters())])
    found = Gradients(model).sweep(losses(model))
    torch.testing.assert_close(found.gram, expected, rtol=1e-12, atol=0)
    assert found.layout.width == 4 * 2 + 7
    torch.testing.assert_close(
        reference_grams(losses(model), {"(root)": list(model.parameters())}), expected, rtol=1e-12, atol=0
    )
    sum(losses(twin).values()).backward()  # type: ignore[union-attr]
    add_update(found.layout, found.total, found.own)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("steps", [1, 2])
def test_sparse_gradients_are_measured_like_dense_ones_and_stay_sparse(steps: int) -> None:
    torch.manual_seed(0)
    table = torch.randn(11, 4)
    models = [nn.Embedding.from_pretrained(table.clone(), freeze=False, sparse=s) for s in (False, True, True)]

    def losses(model: nn.Module) -> dict[str, Tensor]:
        out = model(torch.tensor([1, 3, 3, 7]))
        return {"a": out[:3].pow(2).sum(), "b": (out[1:] * 2).sum()}

    found = []
    for _ in range(steps):
        for model in models[:2]:
            found.append(Gradients(model).sweep(losses(model)))
            add_update(found[-1].layout, found[-1].total, found[-1].own, found[-1].sparse)
        sum(losses(models[2]).values()).backward()  # type: ignore[union-attr]
    assert torch.equal(found[0].gram, found[1].gram)
    dense, ours, plain = (m.weight.grad for m in models)
    assert dense is not None
    assert ours is not None
    assert plain is not None
    assert not dense.is_sparse
    assert ours.is_sparse
    torch.testing.assert_close(ours.to_dense(), plain.to_dense())
    assert ours.coalesce().indices().tolist() == plain.coalesce().indices().tolist() == [[1, 3, 7]]
    torch.optim.SparseAdam(models[1].parameters()).step()  # takes nothing but sparse gradients


def test_losses_that_cannot_be_differentiated_are_all_named() -> None:
    model = nn.Linear(3, 2)
    out = model(torch.ones(4, 3))
    with pytest.raises(ProbeError) as error:
        Gradients(model).layout({"a": out[:, 0], "b": torch.tensor(1.0), "c": out.sum()})
    assert "'a': expected a scalar, got shape [4]" in str(error.value)
    assert "'b': the loss depends on no parameter" in str(error.value)
    assert "'c'" not in str(error.value)


def test_gradient_hooks_are_refused_by_name() -> None:
    model = nn.Linear(3, 2)
    handle = model.bias.register_hook(lambda g: g * 2)
    out = model(torch.ones(4, 3))
    with pytest.raises(ProbeError, match="'bias' has a gradient hook"):
        Gradients(model).measure({"a": out[:, 0].sum(), "b": out.sum()})
    handle.remove()


def test_hooks_that_run_after_accumulation_are_refused_by_name() -> None:
    model, outside = Partial().double(), torch.ones(1, requires_grad=True)
    losses = {t: (v * outside.double()).sum() for t, v in model(torch.randn(4, 5, dtype=torch.float64)).items()}
    for leaf, what in ((model.alone.weight, "'alone.weight'"), (outside, "outside the model")):
        handle = leaf.register_post_accumulate_grad_hook(lambda _: None)
        with pytest.raises(ProbeError, match=f"{what} has a hook that runs after"):
            Gradients(model).sweep(losses)
        handle.remove()


@pytest.mark.parametrize("explicit", [False, True])
def test_leaves_outside_the_model_get_their_gradients_too(explicit: bool) -> None:
    twins = []
    for plain in (False, True):
        torch.manual_seed(0)
        model = Partial().double()
        shared, own = torch.zeros(3, requires_grad=True), torch.ones((), requires_grad=True)
        x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
        gradients = Gradients(model)
        for _ in range(2):
            weights = torch.exp(-shared)  # learned weights of the losses, as for homoscedastic uncertainty
            losses = {t: v * w + w.log() for (t, v), w in zip(_losses(model, x).items(), weights, strict=True)}
            losses["c"] = losses["c"] * own
            if plain:
                torch.stack(list(losses.values())).sum().backward()
            else:
                gradients.add(gradients.explicit(losses)[0] if explicit else gradients.sweep(losses))
        twins.append([p.grad for p in (*model.parameters(), shared, own, x)])
    for p, q in zip(*twins, strict=True):
        assert (p is None) == (q is None)
        if p is not None:
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_a_model_that_changes_under_the_probe_is_measured_right_or_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    gradients = Gradients(model)
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        out = model(torch.ones(5, 3, dtype=dtype))
        assert gradients.sweep({"a": out[:, 0].sum(), "b": out.sum()}).total.dtype == dtype
    model[1] = nn.Linear(4, 2).double()
    out = model(torch.ones(5, 3, dtype=torch.float64))
    with pytest.raises(ProbeError, match=r"'1\.weight' came into the model after the probe was made"):
        gradients.sweep({"a": out[:, 0].sum(), "b": out.sum()})


def test_a_lazy_model_is_asked_to_run_once() -> None:
    with pytest.raises(ProbeError, match="run the model once"):
        Gradients(nn.LazyLinear(3))


def test_reentrant_checkpointing_is_refused_with_the_way_out() -> None:
    model = nn.Linear(3, 2)
    x = torch.ones(4, 3, requires_grad=True)
    out = checkpoint(model, x, use_reentrant=True)
    assert isinstance(out, Tensor)
    with pytest.raises(ProbeError, match="use_reentrant=False"):
        Gradients(model).layout({"a": out[:, 0].sum(), "b": out.sum()})


def test_compiled_regions_need_the_shared_layers_named() -> None:
    torch.manual_seed(0)
    model = Partial()
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(9, 5)
    with pytest.raises(ProbeError, match=r"name the shared layers with `shared="):
        Gradients(model).layout(_losses(compiled, x))  # type: ignore[arg-type]
    layout, rows, _ = Gradients(model, shared=["trunk"]).measure(_losses(compiled, x))  # type: ignore[arg-type]
    assert "trunk" in layout.layers
    plain_layout, plain_rows, _ = Gradients(model).measure(_losses(model, x))
    at = layout.layers.index("trunk"), plain_layout.layers.index("trunk")
    torch.testing.assert_close(grams(layout, rows)[at[0]], grams(plain_layout, plain_rows)[at[1]], rtol=1e-5, atol=1e-7)
    with pytest.raises(LayerMatchError, match="Nearest: 'trunk'"):
        Gradients(model, shared=["trunc"])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_region_that_serves_every_task_hides_nothing(backend: str) -> None:
    torch.manual_seed(0)
    model = Necked()
    plain = copy.deepcopy(model)
    model.trunk = torch.compile(model.trunk, backend=backend)  # type: ignore[assignment]
    x = torch.randn(9, 5)
    probe = Probe(model, engine="delta")
    for _ in range(2):
        assert probe.check(model.losses(x)) < 5e-6
        probe.backward(model.losses(x))
        sum(plain.losses(x).values()).backward()  # type: ignore[union-attr]
    assert probe.log.layers == ("trunk.0", "trunk.2", "neck")
    for name in ("trunk.0", "trunk.2"):
        assert probe.engines[name].startswith("flat" if backend == "aot_eager" else "delta")
    assert probe.engines["neck"] == "delta"
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)


class Necked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk: nn.Module = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6))
        self.neck = nn.Linear(6, 4)

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        y = self.neck(torch.tanh(self.trunk(x)))
        return {"a": y.pow(2).mean(), "b": y.sin().sum(), "c": (y[:, 0] * y[:, 1]).mean()}


def test_a_compiled_model_is_probed_under_its_own_names() -> None:
    torch.manual_seed(0)
    model = Partial()
    compiled = torch.compile(model, backend="eager")
    probe = Probe(compiled)  # type: ignore[arg-type]
    probe.backward(_losses(compiled, torch.randn(9, 5)))  # type: ignore[arg-type]
    assert probe.log.layers == ("(root)", "trunk", "middle")


def test_parameters_on_several_devices_are_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    gradients = Gradients(model)
    gradients.parameters["1.weight"] = nn.Parameter(torch.empty(3, 3, device="meta"))
    with pytest.raises(ProbeError, match=r"'1.weight' on meta, '0.weight' on cpu"):
        gradients._build(("a", "b"), {"0.weight": 3, "1.weight": 3})
