"""What counts as a layer, under which name, and how names and globs are resolved."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import reconmtl.layers
from reconmtl.errors import LayerMatchError, nearest
from reconmtl.layers import ROOT, Layer, TaskCopies, find_layers, group_label, match_layers


def names(model: nn.Module) -> list[str]:
    return [layer.name for layer in find_layers(model)]


class Rooted(nn.Module):
    """Owns a parameter itself, before and after its children."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.fc = nn.Linear(3, 2)
        self.shift = nn.Parameter(torch.zeros(2, 2))


def test_weight_and_bias_are_one_layer_and_containers_are_none() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)), nn.Linear(3, 1, bias=False))
    assert find_layers(model) == [
        Layer("0", "Linear", ("0.weight", "0.bias"), (6, 3)),
        Layer("1.1", "BatchNorm1d", ("1.1.weight", "1.1.bias"), (3, 3)),
        Layer("2", "Linear", ("2.weight",), (3,)),
    ]
    assert [layer.numel for layer in find_layers(model)] == [9, 6, 3]


def test_parameters_of_the_outermost_module_are_the_layer_root() -> None:
    root, fc = find_layers(Rooted())
    assert (root.name, root.type, root.parameters, root.sizes) == (ROOT, "Rooted", ("scale", "shift"), (3, 4))
    assert fc.name == "fc"


def test_a_bare_layer_is_its_own_root() -> None:
    assert find_layers(nn.Linear(2, 1)) == [Layer(ROOT, "Linear", ("weight", "bias"), (2, 1))]


def test_a_tied_parameter_belongs_to_the_first_module_that_holds_it() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "out": nn.Linear(3, 5)})
    embed, out = model["embed"], model["out"]
    assert isinstance(embed, nn.Embedding) and isinstance(out, nn.Linear)
    out.weight = embed.weight
    assert [(layer.name, layer.parameters) for layer in find_layers(model)] == [
        ("embed", ("embed.weight",)),
        ("out", ("out.bias",)),
    ]
    out.bias = None  # type: ignore[assignment]
    assert names(model) == ["embed"]


def test_a_module_under_two_names_is_one_layer_with_an_alias() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.ReLU(), shared)})
    (layer,) = find_layers(model)
    assert (layer.name, layer.aliases) == ("a", ("b.1",))


@pytest.mark.parametrize("owner", ["", "fc", "block.0", "odd[0]"])
def test_copies_of_a_split_layer_are_named_by_their_group_and_typed_by_the_split_module(owner: str) -> None:
    split = nn.Linear(2, 3)
    for key in ("weight", "bias"):
        delattr(split, key)
    holder = nn.Module()
    holder.register_parameter("weight", nn.Parameter(torch.zeros(3, 2)))
    single = nn.Module()
    single.register_parameter("weight", nn.Parameter(torch.zeros(3, 2)))
    split.copies = TaskCopies({group_label(["a", "b"]): holder, "c": single})
    model: nn.Module = split
    for part in reversed(owner.split(".") if owner else []):
        model = nn.ModuleDict({part: model})
    dotted = f"{owner}." if owner else ""
    assert [(layer.name, layer.type, layer.parameters, layer.aliases) for layer in find_layers(model)] == [
        (f"{owner or ROOT}[a+b]", "Linear", (f"{dotted}copies.a+b.weight",), ()),
        (f"{owner or ROOT}[c]", "Linear", (f"{dotted}copies.c.weight",), ()),
    ]


def test_every_parameter_is_in_exactly_one_layer_with_its_own_size() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(Rooted(), shared, nn.MultiheadAttention(4, 2), nn.GRU(4, 4), nn.Sequential(shared))
    listed = {p: size for layer in find_layers(model) for p, size in zip(layer.parameters, layer.sizes, strict=True)}
    assert listed == {name: p.numel() for name, p in model.named_parameters()}
    assert sum(len(layer.parameters) for layer in find_layers(model)) == len(listed)


KNOWN = ["conv1", "bn1", "layer1.0.conv1", "layer1.0.bn1", "layer2.0.conv1", "fc", "fc[a+b]", ROOT]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["fc", "conv1"], ["conv1", "fc"]),  # network order, not the order of the request
        (["*conv1"], ["conv1", "layer1.0.conv1", "layer2.0.conv1"]),
        (["layer?.0.bn1"], ["layer1.0.bn1"]),
        (["layer[12].0.conv1", "layer1.*"], ["layer1.0.conv1", "layer1.0.bn1", "layer2.0.conv1"]),
        (["fc[a+b]"], ["fc[a+b]"]),  # a name that exists is never a glob ...
        (["fc*"], ["fc", "fc[a+b]"]),
        ([ROOT], [ROOT]),
        ("conv1", ["conv1"]),
        (["*"], KNOWN),
        ([], []),
    ],
)
def test_names_and_globs_match(patterns: list[str], expected: list[str]) -> None:
    assert match_layers(patterns, KNOWN) == expected


def test_a_glob_is_case_sensitive() -> None:
    with pytest.raises(LayerMatchError):
        match_layers(["CONV*"], KNOWN)


def test_every_pattern_that_matches_nothing_is_named_with_its_nearest_names() -> None:
    with pytest.raises(LayerMatchError) as caught:
        match_layers(["layer1.0.conv3", "fc", "zzz*"], KNOWN)
    message = str(caught.value)
    assert "'layer1.0.conv3'. Nearest: 'layer1.0.conv1', 'layer2.0.conv1'" in message
    assert "'zzz*'. Known: 'conv1'" in message
    assert "'fc'. " not in message
    assert f"List all {len(KNOWN)} with `rm.layer_table(model)`." in message


@given(st.lists(st.sampled_from(["a", "b", "a.b", "a.c", "d", "x[1]"]), unique=True), st.data())
def test_full_names_resolve_to_themselves_in_network_order(known: list[str], data: st.DataObject) -> None:
    wanted = data.draw(st.lists(st.sampled_from(known)) if known else st.just([]))
    assert match_layers(wanted, known) == [n for n in known if n in wanted]


def test_nearest_says_what_exists() -> None:
    assert nearest("con1", ["conv1", "fc"]) == "Nearest: 'conv1'."
    assert nearest("zzz", ["conv1", "fc"]) == "Known: 'conv1', 'fc'."
    assert nearest("zzz", []) == "There is none."
    long = nearest("zzz", [f"layer{i}" for i in range(30)])
    assert long.startswith("Known: 'layer0'") and long.endswith("'layer19', ....")


def test_the_separator_of_groups_is_the_one_in_names() -> None:
    assert group_label(["depth", "seg"]) == f"depth{reconmtl.layers.GROUP_SEPARATOR}seg" == "depth+seg"
    assert group_label(["seg"]) == "seg"
