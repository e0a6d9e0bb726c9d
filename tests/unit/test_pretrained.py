"""ImageNet weights: torchvision's and timm's names, strictness, files."""

import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from reconmtl.errors import DataError
from reconmtl.networks import mobilenet_raspp, resnet, segnet
from reconmtl.networks.pretrained import load_pretrained

BLOCKS = (1, 2, 3, 4, 3, 3, 1)


def torchvision_resnet18() -> dict[str, Tensor]:
    """The public key list of `torchvision.models.resnet18`, with random tensors."""
    model = resnet.celeba(tasks=["a"])
    state = {n: torch.rand(v.shape) for n, v in model.state_dict().items() if not n.startswith("heads.")}
    assert len(state) == 120
    return {**state, "fc.weight": torch.rand(1000, 512), "fc.bias": torch.rand(1000)}


def torchvision_mobilenet_v2() -> dict[str, Tensor]:
    """The public key list of `torchvision.models.mobilenet_v2`, spelled out by its rule."""
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(at: str, c: int) -> None:
        shapes.update({f"{at}.{n}": (c,) for n in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{at}.num_batches_tracked"] = ()

    def unit(at: str, shape: tuple[int, ...]) -> None:
        shapes[f"{at}.0.weight"] = shape
        norm(f"{at}.1", shape[0])

    unit("features.0", (32, 3, 3, 3))
    index, inputs = 1, 32
    for outputs, repeats in zip((16, 24, 32, 64, 96, 160, 320), BLOCKS, strict=True):
        for _ in range(repeats):
            inner, at, place = inputs * (1 if index == 1 else 6), f"features.{index}.conv", 0
            if index > 1:
                unit(f"{at}.0", (inner, inputs, 1, 1))
                place = 1
            unit(f"{at}.{place}", (inner, 1, 3, 3))
            shapes[f"{at}.{place + 1}.weight"] = (outputs, inner, 1, 1)
            norm(f"{at}.{place + 2}", outputs)
            index, inputs = index + 1, outputs
    unit("features.18", (1280, 320, 1, 1))
    shapes |= {"classifier.1.weight": (1000, 1280), "classifier.1.bias": (1000,)}
    return {n: torch.rand(s) for n, s in shapes.items()}


def timm_mobilenetv2_100(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under timm's names: its list has the same order."""
    names = []
    for stage, repeats in enumerate(BLOCKS):
        for block in range(repeats):
            parts = ["conv_dw", "bn1", "conv_pw", "bn2"] if stage == 0 else None
            parts = parts or ["conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"]
            names += [f"blocks.{stage}.{block}.{p}" for p in parts]
    modules = ["conv_stem", "bn1", *names, "conv_head", "bn2", "classifier"]
    owners = list(dict.fromkeys(n.rpartition(".")[0] for n in state))
    assert len(owners) == len(modules)
    new = dict(zip(owners, modules, strict=True))
    return {f"{new[n.rpartition('.')[0]]}.{n.rpartition('.')[2]}": v for n, v in state.items()}


def test_resnet_weights_land_in_the_trunk_and_heads_stay() -> None:
    state, model = torchvision_resnet18(), resnet.celeba(tasks=["a"])
    head = model.heads["a"].weight.detach().clone()  # type: ignore[index,union-attr]
    assert load_pretrained(model, state) == ["heads.a.weight", "heads.a.bias"]
    after = model.state_dict()
    assert all(torch.equal(after[n], v.to(after[n].dtype)) for n, v in state.items() if not n.startswith("fc."))
    assert torch.equal(after["heads.a.weight"], head)


@pytest.mark.parametrize("kind", ["torchvision", "timm"])
def test_mobilenet_weights_land_under_both_namings(kind: str) -> None:
    state, model = torchvision_mobilenet_v2(), mobilenet_raspp.pascal_context()
    left = load_pretrained(model, state if kind == "torchvision" else timm_mobilenetv2_100(state))
    after = model.state_dict()
    trunk = [n for n in after if n.startswith("features.")]
    assert all(torch.equal(after[n], state[n].to(after[n].dtype)) for n in trunk)
    assert {n.partition(".")[0] for n in left} == {"raspp", "heads"}


def test_every_misfit_is_listed_and_nothing_is_loaded() -> None:
    state, model = torchvision_resnet18(), resnet.celeba(tasks=["a"])
    before = {n: v.clone() for n, v in model.state_dict().items()}
    del state["layer1.0.conv1.weight"]
    state |= {"layer9.weight": torch.rand(1), "conv1.weight": torch.rand(64, 1, 7, 7)}
    with pytest.raises(DataError, match=r"missing: layer1\.0\.conv1\.weight\n- unexpected: layer9\.weight\n- conv1\.w"):
        load_pretrained(model, state)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_files_of_both_kinds_load_and_others_are_refused(tmp_path: Path) -> None:
    state = torchvision_resnet18()
    torch.save(state, tmp_path / "w.pth")
    save_file(state, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        model = resnet.celeba(tasks=["a"])
        load_pretrained(model, tmp_path / name)
        assert torch.equal(model.state_dict()["conv1.weight"], state["conv1.weight"])
    torch.save(nn.Linear(1, 1), tmp_path / "model.pth")  # code, not tensors
    (tmp_path / "torn.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:1000])
    (tmp_path / "text.pth").write_text("not a file of torch")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("model.pth", "torn.pth", "text.pth", "list.pth", "absent.pth"):
        with pytest.raises(DataError, match=name):
            load_pretrained(resnet.celeba(tasks=["a"]), tmp_path / name)


def test_nothing_is_fetched_unasked_and_networks_without_weights_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    fetched = []

    def fetch(url: str, path: str, hash_prefix: str) -> None:
        fetched.append((url, hash_prefix))
        buffer = io.BytesIO()
        torch.save(torchvision_resnet18(), buffer)
        Path(path).write_bytes(buffer.getvalue())

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    with pytest.raises(DataError, match="download=True"):
        load_pretrained(resnet.celeba(tasks=["a"]))
    assert fetched == []
    for _ in range(2):
        load_pretrained(resnet.celeba(tasks=["a"]), download=True)
    assert fetched == [("https://download.pytorch.org/models/resnet18-f37072fd.pth", "f37072fd")]
    with pytest.raises(DataError, match="no published weights for SegNet"):
        load_pretrained(segnet.cityscapes(width=1))
    with pytest.raises(DataError, match=r"\[64, 3, 7, 7\], the network's \[64, 1, 7, 7\]"):
        load_pretrained(resnet.multifashion(), torchvision_resnet18())
