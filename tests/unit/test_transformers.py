"""Hugging Face models from small configs with random weights: every layer split, against one network per task."""

import copy
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from reconmtl.errors import SplitError
from reconmtl.layers import find_layers
from reconmtl.plan import Plan
from reconmtl.splitting import split, verify, view
from zoo import TASKS

tr: Any = pytest.importorskip("transformers", reason="the test group of pyproject.toml is not installed")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def tokens(length: int = 6) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 50, (2, length), generator=seeded())}


def pixels(size: int = 32, batch: int = 2) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, size, size, generator=seeded())}


@dataclass(frozen=True)
class Arch:
    """An architecture.

    Attributes:
        name: Stem of its class names, as in `BertModel` and `BertConfig`.
        config: Sizes; dropout is off, because branches draw masks of their own.
        inputs: Keyword arguments of a call.
        model: Class name, where it is not `<name>Model`.
        refused: {pattern of layer names: what the refusal of such a layer alone says}.
        single: It computes its normalisation in float32 whatever the dtype of the model, so that gradients are compared
            to 1e-6; with those casts taken out, to 1e-10 as all others.
    """

    name: str
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Tensor]] = tokens
    model: str = ""
    refused: dict[str, str] = field(default_factory=dict)
    single: bool = False

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        config = getattr(tr, f"{self.name}Config")(**self.config)
        return cast(nn.Module, getattr(tr, self.model or f"{self.name}Model")(config))

    def refusal(self, layer: str) -> str | None:
        return next((text for pattern, text in self.refused.items() if re.fullmatch(pattern, layer)), None)


TEXT = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
ROTARY = {**TEXT, "num_key_value_heads": 1, "max_position_embeddings": 16}
NO_OUTPUT = "none of its parameters reaches an output"
TOLERANCE, SINGLE = 1e-10, 1e-6

ARCHITECTURES = {
    "bert": Arch("Bert", {**TEXT, **NO_DROPOUT}, refused={r"trunk\.pooler\..*": NO_OUTPUT}),
    "albert": Arch("Albert", {**TEXT, **NO_DROPOUT, "embedding_size": 8}, refused={r"trunk\.pooler": NO_OUTPUT}),
    "gpt2": Arch(
        "GPT2",
        {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0}
        | {"eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "llama": Arch("Llama", ROTARY, single=True),
    "t5_encoder": Arch("T5", T5, model="T5EncoderModel", single=True),
    "t5": Arch("T5", T5, lambda: {**tokens(), "decoder_input_ids": tokens(4)["input_ids"]}, single=True),
    "vit": Arch(
        "ViT",
        {**VISION, **NO_DROPOUT, "image_size": 16, "patch_size": 8},
        lambda: pixels(16),
        refused={r"trunk\.pooler\..*": NO_OUTPUT},
    ),
    "dinov2": Arch(
        "Dinov2", {**VISION, **NO_DROPOUT, "image_size": 16, "patch_size": 8, "mlp_ratio": 2}, lambda: pixels(16)
    ),
    "swin": Arch(
        "Swin",
        {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4}
        | {**NO_DROPOUT, "drop_path_rate": 0.0},
        pixels,
    ),
    "convnext": Arch(
        "ConvNext",
        {"num_stages": 2, "hidden_sizes": [8, 12], "depths": [2, 1]},
        pixels,
        refused={r"trunk\.layernorm": NO_OUTPUT},
    ),
    "segformer": Arch(
        "Segformer",
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16], "strides": [4, 2]}
        | {"patch_sizes": [7, 3], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "drop_path_rate": 0.0}
        | NO_DROPOUT,
        pixels,
    ),
    "resnet": Arch(
        "ResNet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1], "layer_type": "basic"}, pixels
    ),
    "mobilenet_v2": Arch("MobileNetV2", {"image_size": 32, "depth_multiplier": 0.25}, lambda: pixels(64, batch=4)),
}


class Headed(nn.Module):
    """A trunk and a head per task, as one writes it: the last hidden state, averaged, into a linear layer."""

    def __init__(self, trunk: nn.Module, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.trunk = trunk
        with torch.no_grad():
            width = self.features(inputs).shape[-1]
        self.heads = nn.ModuleDict({t: nn.Linear(width, 3) for t in TASKS})

    def features(self, inputs: dict[str, Tensor]) -> Tensor:
        hidden = self.trunk(**inputs).last_hidden_state
        return cast(Tensor, hidden.flatten(2).mean(-1) if hidden.ndim == 4 else hidden.mean(1))

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        features = self.features(inputs)
        return {t: head(features) for t, head in self.heads.items()}


def build(arch: Arch) -> tuple[nn.Module, dict[str, Tensor]]:
    inputs = arch.inputs()
    return Headed(arch.build().eval(), inputs).train(), inputs


def tied_to(net: nn.Module, layer: str) -> list[str]:
    """The layer, and those that hold the same parameters."""
    own = {id(p) for p in net.get_submodule(layer).parameters(recurse=False)}
    return [n for n, m in net.named_modules() if any(id(p) in own for p in m.parameters(recurse=False))]


def trunk_layers(net: nn.Module) -> list[str]:
    return [layer.name for layer in find_layers(net) if layer.name.startswith("trunk.")]


# The oracle: one ordinary network per task, its state read off the key names -----------------------------------------


def original_name(name: str, task: str) -> str | None:
    """What a tensor of the split model is called in the original; None if it is another task's."""
    head, found, tail = name.partition("per_task.")
    if not found:
        return name
    label, _, key = tail.partition(".")
    return head + key if task in label.split("+") else None


def state_of(model: nn.Module, task: str) -> dict[str, Tensor]:
    state = {original_name(k, task): v for k, v in model.state_dict().items() if k != "_extra_state"}
    return {k: v.clone() for k, v in state.items() if k is not None}


def independent(net: nn.Module, model: nn.Module) -> dict[str, nn.Module]:
    out = {}
    for t in TASKS:
        out[t] = copy.deepcopy(net)
        out[t].load_state_dict(state_of(model, t))
    return out


def perturb(model: nn.Module, scale: float = 0.02) -> None:
    generator = seeded()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=scale)


def losses(out: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights = torch.rand(3, next(iter(out.values())).shape[-1], generator=seeded()).double()
    return {t: (out[t].double() * weights[i]).sum() for i, t in enumerate(TASKS)}


def total(values: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(values.values())).sum()


def check(net: nn.Module, inputs: dict[str, Tensor], layers: list[str], *, training: bool, tolerance: float) -> float:
    """Split these layers; outputs, buffers and gradients have to be those of one network per task.

    Returns the largest difference of a float64 gradient, relative to the largest gradient of the network.
    """
    net.train(training)
    plan = Plan(tasks=TASKS, layers=layers)
    state, kinds = {k: v.clone() for k, v in net.state_dict().items()}, [type(m) for m in net.modules()]

    model = split(net, plan)
    out = model(**inputs)
    for t in TASKS:
        twin, mine = copy.deepcopy(net), state_of(model, t)
        assert torch.equal(out[t], twin(**inputs)[t]), f"output {t} at the start"
        assert all(torch.equal(v, mine[k]) for k, v in twin.state_dict().items()), f"buffers of {t}"

    model.double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    perturb(model)
    twins = independent(copy.deepcopy(net).double(), model)
    out = model(**inputs)
    parts = losses(out)
    reach = torch.autograd.grad(parts["b"], list(model.parameters()), retain_graph=True, allow_unused=True)
    reached = {n for (n, _), g in zip(model.named_parameters(), reach, strict=True) if g is not None}
    total(parts).backward()
    expected: dict[str, dict[str, Tensor]] = {}
    for t, twin in twins.items():
        theirs = twin(**inputs)
        assert torch.equal(out[t], theirs[t]), f"output {t} with copies that differ"
        losses(theirs)[t].backward()
        expected[t] = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
    assert {original_name(n, "b") for n in reached} == set(expected["b"]), (
        "task b reaches its copies and what is shared"
    )
    worst, largest = 0.0, max(float(g.abs().max()) for gs in expected.values() for g in gs.values())
    for name, p in model.named_parameters():
        theirs_of = [expected[t][o] for t in TASKS if (o := original_name(name, t)) is not None and o in expected[t]]
        if not theirs_of:
            assert p.grad is None, f"{name} has a gradient"
            continue
        assert p.grad is not None, f"{name} has no gradient"
        difference = float((p.grad - torch.stack(theirs_of).sum(0)).abs().max()) / largest
        assert difference <= tolerance, f"gradient of {name}: {difference:.1e}"
        worst = max(worst, difference)

    assert kinds == [type(m) for m in net.modules()]
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items()), "the original changed"
    return worst


def check_alone(
    arch: Arch, net: nn.Module, inputs: dict[str, Tensor], layer: str, *, training: bool, tolerance: float = TOLERANCE
) -> float:
    """Split a layer alone, or see it refused for the reason that is declared."""
    layers = tied_to(net, layer)
    if (text := arch.refusal(layer)) is not None:
        with pytest.raises(SplitError, match=re.escape(text)):
            split(net, Plan(tasks=TASKS, layers=layers))(**inputs)
        return 0.0
    if len(layers) > 1:
        with pytest.raises(SplitError, match="tied"):
            split(net, Plan(tasks=TASKS, layers=[layer]))
    return check(net, inputs, layers, training=training, tolerance=tolerance)


def random_set(arch: Arch, net: nn.Module, seed: int) -> list[str]:
    names = [n for n in trunk_layers(net) if arch.refusal(n) is None and len(tied_to(net, n)) == 1]
    return random.Random(seed).sample(names, len(names) // 4)


@pytest.fixture
def in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the casts to float32 out of models that compute a part in it."""
    original = Tensor.to

    def to(value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if value.dtype == torch.float64 and (torch.float32 in args or kwargs.get("dtype") == torch.float32):
            return value
        return original(value, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", to)


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sampled_layers_and_a_random_set(name: str) -> None:
    arch = ARCHITECTURES[name]
    net, inputs = build(arch)
    for i, layer in enumerate(random.Random(name).sample(trunk_layers(net), 2)):
        check_alone(arch, net, inputs, layer, training=bool(i))
    check(net, inputs, random_set(arch, net, 0), training=True, tolerance=TOLERANCE)


@pytest.mark.parametrize("name", [n for n, arch in ARCHITECTURES.items() if arch.single])
def test_models_that_compute_a_part_in_single_precision(name: str) -> None:
    arch = ARCHITECTURES[name]
    net, inputs = build(arch)
    check(net, inputs, random_set(arch, net, 0), training=True, tolerance=SINGLE)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_layer_alone_and_random_sets(name: str, training: bool) -> None:
    arch = ARCHITECTURES[name]
    net, inputs = build(arch)
    faults = []
    for layer in trunk_layers(net):
        try:
            check_alone(arch, net, inputs, layer, training=training)
        except (AssertionError, SplitError) as error:
            faults.append(f"{layer}: {str(error)[:300]}")
    for seed in range(4):
        layers = random_set(arch, net, seed)
        try:
            check(net, inputs, layers, training=training, tolerance=TOLERANCE)
        except (AssertionError, SplitError) as error:
            faults.append(f"{layers}: {str(error)[:300]}")
    assert not faults, "\n".join(faults)


# The models themselves ----------------------------------------------------------------------------------------------


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor in what a model returns, key-value caches included."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors_of(v)]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in tensors_of(v)]
    if type(value).__module__.startswith("transformers."):
        return [t for v in vars(value).values() for t in tensors_of(v)]
    return []


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_without_heads_returns_its_own_output_per_task(name: str) -> None:
    arch = ARCHITECTURES[name]
    headed, inputs = build(arch)
    net = headed.get_submodule("trunk").eval()
    layers = [n.removeprefix("trunk.") for n in random_set(arch, headed, 3)]
    model = split(net, Plan(tasks=TASKS, layers=layers), sample=inputs)
    perturb(model)
    verify(model, inputs)
    with torch.no_grad():
        out = model(**inputs)
        assert list(out) == list(TASKS)
        for t in TASKS:
            alone = arch.build().eval()
            alone.load_state_dict(state_of(model, t))
            expected = alone(**inputs)
            assert type(out[t]) is type(expected)
            assert list(out[t]) == list(expected)
            mine, theirs = tensors_of(out[t]), tensors_of(expected)
            assert len(mine) == len(theirs) >= 1
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_view_is_a_model_of_the_library(name: str) -> None:
    arch = ARCHITECTURES[name]
    net, inputs = build(arch)
    net.eval()
    model = split(net, Plan(tasks=TASKS, layers=random_set(arch, net, 1)), sample=inputs)
    perturb(model)
    for t in TASKS[:2]:
        one = view(model, t)
        assert [type(m) for m in one.module.modules()] == [type(m) for m in net.modules()]
        assert list(one.module.state_dict()) == list(net.state_dict())
        assert torch.equal(one(**inputs)[t], model(**inputs)[t])


def test_a_view_generates_text() -> None:
    torch.manual_seed(0)
    config = tr.GPT2Config(**ARCHITECTURES["gpt2"].config)
    net = tr.GPT2LMHeadModel(config).eval()
    model = split(net, Plan(tasks=TASKS, layers=["transformer.h.1.mlp.c_fc"]), sample=tokens())
    perturb(model)
    alone = tr.GPT2LMHeadModel(config).eval()
    alone.load_state_dict(state_of(model, "c"))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    mine = view(model, "c").module.generate(**tokens(), **options)  # type: ignore[operator]
    assert torch.equal(mine, alone.generate(**tokens(), **options))


def experts(implementation: str) -> nn.Module:
    torch.manual_seed(0)
    config = tr.MixtralConfig(**ROTARY, num_local_experts=3, num_experts_per_tok=1)
    config._experts_implementation = implementation
    return cast(nn.Module, tr.MixtralModel(config).eval())


@pytest.mark.parametrize(
    ("implementation", "options"),
    [("grouped_mm", {}), ("eager", {"atomic": ["layers.*.mlp"]}), ("eager", {"mode": "loop"})],
    ids=str,
)
def test_a_mixture_of_experts(implementation: str, options: dict[str, Any]) -> None:
    net, inputs = experts(implementation), tokens(3)
    model = split(net, Plan(tasks=TASKS, layers=["layers.0.self_attn.q_proj"]), **options)
    perturb(model, 0.3)
    out = model(**inputs)
    for t in TASKS:
        alone = copy.deepcopy(net)
        alone.load_state_dict(state_of(model, t))
        assert torch.equal(out[t].last_hidden_state, alone(**inputs).last_hidden_state)


def test_experts_chosen_in_python_from_values_that_differ_are_refused_by_name() -> None:
    model = split(experts("eager"), Plan(tasks=TASKS, layers=["layers.0.self_attn.q_proj"]))
    perturb(model, 1.0)
    with pytest.raises(SplitError, match=r"layers\.[01]\.mlp.*atomic=\["):
        model(**tokens(3))


# Key-value caches ---------------------------------------------------------------------------------------------------


def llama() -> nn.Module:
    return ARCHITECTURES["llama"].build().eval()


QUERY = Plan(tasks=TASKS, layers=["layers.0.self_attn.q_proj"])


def test_decoding_with_a_cache_goes_on_from_each_tasks_own() -> None:
    net, steps = llama(), [tokens(4)["input_ids"], torch.tensor([[3], [7]]), torch.tensor([[8], [2]])]
    model = split(net, QUERY, sample={**tokens(), "use_cache": False})
    perturb(model, 0.3)
    cache = tr.DynamicCache(config=net.config)
    outs = [model(input_ids=ids, past_key_values=cache) for ids in steps]
    for t in TASKS:
        alone, own = llama(), tr.DynamicCache(config=net.config)
        alone.load_state_dict(state_of(model, t))
        for ids, out in zip(steps, outs, strict=True):
            expected = alone(input_ids=ids, past_key_values=own)
            assert torch.equal(out[t].last_hidden_state, expected.last_hidden_state)
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(outs[-1][t]), tensors_of(expected), strict=True))


def test_a_first_call_leaves_a_given_cache_to_the_call_itself() -> None:
    net = llama()
    cache = tr.DynamicCache(config=net.config)
    model = split(net, QUERY)
    model(**tokens(4), past_key_values=cache)
    assert cache.get_seq_length() == 4


@pytest.mark.parametrize(
    ("options", "cached"),
    [({"mode": "loop"}, True), ({"atomic": ["layers.1.self_attn"]}, False)],
    ids=["loop", "atomic"],
)
def test_a_cache_that_would_be_filled_once_per_task_is_refused(options: dict[str, Any], cached: bool) -> None:
    net = llama()
    model = split(net, QUERY, **options)
    inputs = {**tokens(), "past_key_values": tr.DynamicCache(config=net.config)} if cached else tokens()
    with pytest.raises(SplitError, match=r"DynamicCache.*use_cache=False"):
        model(**inputs)
    out = split(net, QUERY, **options)(**tokens(), use_cache=False)
    assert all(torch.equal(out[t].last_hidden_state, net(**tokens()).last_hidden_state) for t in TASKS)


# Options of the library ---------------------------------------------------------------------------------------------


def checkpointing(net: nn.Module, *, reentrant: bool = False) -> None:
    """Turn activation checkpointing on; the method was renamed in transformers 5."""
    trunk: Any = net.get_submodule("trunk")
    enable = getattr(trunk, "activation_checkpointing_enable", None) or trunk.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


@pytest.mark.parametrize("name", ["bert", "vit", "swin"])  # Swin's is nested: stages, and the layers in them
def test_activation_checkpointing(name: str) -> None:
    net, inputs = build(ARCHITECTURES[name])
    checkpointing(net)
    check(net, inputs, random_set(ARCHITECTURES[name], net, 0), training=True, tolerance=TOLERANCE)


def test_reentrant_activation_checkpointing_is_refused() -> None:
    net, inputs = build(ARCHITECTURES["bert"])
    checkpointing(net, reentrant=True)
    with pytest.raises(SplitError, match="re-entrant"):
        split(net, Plan(tasks=TASKS, layers=["trunk.encoder.layer.1.output.dense"]), sample=inputs)


RETURNS = ("output_hidden_states", "output_attentions")


@pytest.mark.parametrize(
    ("name", "option"),
    [(n, o) for n in ("bert", "gpt2", "llama", "t5_encoder") for o in (*RETURNS, "attention_mask")]
    + [("vit", o) for o in RETURNS],
)
def test_what_else_a_model_returns_is_that_of_each_task(name: str, option: str) -> None:
    headed, inputs = build(ARCHITECTURES[name])
    net: Any = headed.get_submodule("trunk")
    value: Any = True
    if option == "output_attentions":
        net.set_attn_implementation("eager")
    if option == "attention_mask":
        value = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    layers = [n.removeprefix("trunk.") for n in random_set(ARCHITECTURES[name], headed, 2)]
    model = split(net, Plan(tasks=TASKS, layers=layers))
    perturb(model)
    out = model(**inputs, **{option: value})
    for t in TASKS:
        alone = copy.deepcopy(net)
        alone.load_state_dict(state_of(model, t))
        expected = alone(**inputs, **{option: value})
        mine, theirs = tensors_of(out[t]), tensors_of(expected)
        assert len(mine) == len(theirs)
        assert option == "attention_mask" or len(mine) > 2
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
