"""ImageNet weights for the trunks of the paper's networks, from torchvision's or timm's state dicts."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from reconmtl.errors import DataError
from reconmtl.networks.mobilenet_raspp import MobileNetRASPP
from reconmtl.networks.resnet import ResNet18

PUBLIC = {
    "resnet18": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    "mobilenet_v2": "https://download.pytorch.org/models/mobilenet_v2-b0353104.pth",
}
"""Where torchvision publishes its first weights of these networks."""

# What a file may hold besides the trunk: the classifier, and MobileNetV2's last convolution.
_BEYOND = {"resnet18": r"fc\.", "mobilenet_v2": r"features\.18\.|classifier\."}
_TRUNK = {"resnet18": r"conv1\.|bn1\.|layer[1-4]\.", "mobilenet_v2": r"features\."}
_STAGES = (1, 2, 3, 4, 3, 3, 1)  # MobileNetV2's blocks as timm groups them


def load_pretrained(
    model: nn.Module, weights: str | Path | Mapping[str, Tensor] | None = None, *, download: bool = False
) -> list[str]:
    """Load ImageNet weights into a network's trunk, strictly; heads, and R-ASPP, keep their random ones.

    Args:
        model: A network of `reconmtl.networks.resnet` with three input channels, or of `mobilenet_raspp`.
        weights: A state dict of torchvision's or timm's `resnet18` or `mobilenet_v2` / `mobilenetv2_100`, or a file
            with one (.safetensors, .pth); None takes the file that torchvision keeps in torch.hub's folder.
        download: With `weights=None`, fetch that file if it is not there.

    Returns:
        The parameters that keep their random values.

    Raises:
        DataError: If the network has no published weights, the file is missing or damaged, or any key or shape does
            not fit; all of them are listed, and the model is left as it was.

    Reference: Shi et al., Recon, ICLR 2023, sections B.4 and B.5 (pretrained backbones).
    """
    kind = _kind(model)
    where, given = _read(kind, weights, download)
    state = {_torchvision_name(kind, name): value for name, value in given.items()}
    wanted = {n: v for n, v in model.state_dict().items() if re.match(_TRUNK[kind], n)}
    optional = {n for n in wanted if n.endswith("num_batches_tracked")}  # old files lack them
    extra = [n for n in state if n not in wanted and not re.match(_BEYOND[kind], n)]
    faults = [f"missing: {', '.join(missing)}" for missing in [sorted(set(wanted) - set(state) - optional)] if missing]
    faults += [f"unexpected: {', '.join(sorted(extra))}" for _ in extra[:1]]
    faults += [
        f"{name} has the shape {list(state[name].shape)}, the network's {list(value.shape)}"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    if faults:
        raise DataError(f"{where} does not fit {type(model).__name__}'s trunk ({kind}):\n- " + "\n- ".join(faults))
    model.load_state_dict({n: v for n, v in state.items() if n in wanted}, strict=False)
    return [n for n, _ in model.named_parameters() if n not in wanted]


def _kind(model: nn.Module) -> str:
    if isinstance(model, ResNet18):
        return "resnet18"
    if isinstance(model, MobileNetRASPP):
        return "mobilenet_v2"
    raise DataError(
        f"There are no published weights for {type(model).__name__}; ResNet18 and MobileNetV2 trunks have them. Load "
        "your own with model.load_state_dict."
    )


def _read(
    kind: str, weights: str | Path | Mapping[str, Tensor] | None, download: bool
) -> tuple[str, Mapping[str, Tensor]]:
    """What was given, in words, and its tensors."""
    if isinstance(weights, Mapping):
        wrong = [str(n) for n, v in weights.items() if not isinstance(n, str) or not isinstance(v, Tensor)]
        if wrong:
            raise DataError(f"The state dict holds something other than tensors: {', '.join(wrong[:5])}.")
        return "The state dict", weights
    if weights is None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / PUBLIC[kind].rpartition("/")[2]
        if not path.exists() and not download:
            raise DataError(
                f"There is no {path}. Pass download=True to fetch {PUBLIC[kind]} (tens of MB), or the path of a file."
            )
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(PUBLIC[kind], str(path), hash_prefix=path.stem.rpartition("-")[2])
            except (OSError, RuntimeError) as error:
                raise DataError(f"Cannot fetch {PUBLIC[kind]}: {error}. Copy the file to {path}.") from error
    else:
        path = Path(weights)
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"There is no file {path}.") from None
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a state dict: {error}") from None
    except Exception as error:  # torch's unpickler raises an error class of Python's pickle for anything not a tensor
        raise DataError(f"{path} is no plain state dict: {type(error).__name__}.") from None
    if not isinstance(state, Mapping):
        raise DataError(f"{path} holds a {type(state).__name__}, expected a state dict: names with tensors.")
    return str(path), _read(kind, cast("Mapping[str, Tensor]", state), download)[1]


def _torchvision_name(kind: str, name: str) -> str:
    """The name that torchvision gives to what timm calls `name`; torchvision's own names stay."""
    if kind != "mobilenet_v2":
        return name  # timm's ResNet18 has torchvision's names
    head, _, last = name.rpartition(".")
    outside = {"conv_stem": "0.0", "bn1": "0.1", "conv_head": "18.0", "bn2": "18.1"}
    if head in outside:
        return f"features.{outside[head]}.{last}"
    match = re.fullmatch(r"blocks\.(\d+)\.(\d+)\.(\w+)", head)
    if match is None:
        return name
    stage, block, inner = int(match[1]), int(match[2]), match[3]
    # The first stage does not widen: its block starts with the convolution of single channels.
    places = (
        {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "1", "bn2": "2"}
        if stage == 0
        else {"conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0", "bn2": "1.1", "conv_pwl": "2", "bn3": "3"}
    )
    if stage >= len(_STAGES) or block >= _STAGES[stage] or inner not in places:
        return name
    return f"features.{1 + sum(_STAGES[:stage]) + block}.conv.{places[inner]}.{last}"
