"""Weights: a network's values as safetensors, committed, checked to be finite, loaded without running any code."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medseg.artefacts import commit, sha256_of
from medseg.errors import IntegrityError, NonFiniteError, Problem


def save_weights(path: Path, network: nn.Module) -> str:
    """Commit a network's weights as float32 safetensors and return the file's SHA-256.

    Raises:
        NonFiniteError: E1001 a weight is not finite; nothing is written.
    """
    return save_tensors(path, dict(network.state_dict()))


def load_weights(path: Path, network: nn.Module, sha256: str | None = None) -> None:
    """Load weights into ``network``; every name and shape must match.

    Raises:
        IntegrityError: E0701 the file is missing, damaged or not the one that ``sha256`` names.
    """
    try:
        if sha256 is not None and sha256_of(path) != sha256:
            raise IntegrityError(Problem("E0701", f"{path.name} is not the file its model.json vouches for"))
        network.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise IntegrityError(Problem("E0701", f"{path.name}: {reason}", "", "restore the file")) from error


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Commit named tensors as float32 safetensors and return the file's SHA-256; none may hold NaN or infinity."""
    plain = {name: t.detach().to("cpu", torch.float32).contiguous() for name, t in tensors.items()}
    broken = [name for name, t in plain.items() if not torch.isfinite(t).all()]
    if broken:
        raise NonFiniteError(Problem("E1001", f"{path.name} would hold values that are not finite ({broken[0]})"))
    return commit(path, lambda temporary: save_file(plain, temporary))
