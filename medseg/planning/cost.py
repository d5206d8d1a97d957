"""Cost: bytes and seconds of a training step, from the layers of its network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from medseg.planning.layers import Layer
from medseg.records.plan import Budget, Price

# Outputs kept for the backward pass: of convolution and norm, or of what is joined.
KEPT = {"conv": 2, "again": 0, "project": 2, "up": 2, "head": 0}
TRAINED = 3  # a step is a pass forward and two of the same size backward


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """Bytes of a step, as shares of four sizes, plus a constant (fitted; see ``step_memory_bytes``)."""

    kept: float
    largest: float
    logits: float
    parameters: float
    fixed: float


# Least squares of the relative error over 61 measured steps, all within 13 % (scripts/bench/plan_memory.py; torch 2.13,
# AVX-512). Weights: value, gradient and momentum in float32 and a copy in bfloat16 are 3.5 of 3.85.
ON_CPU = MemoryModel(kept=1.06, largest=8.9, logits=6.3, parameters=3.85, fixed=104e6)
ON_CUDA = MemoryModel(kept=1.06, largest=8.9, logits=6.3, parameters=3.85, fixed=600e6)  # not measured; CUDA context
MODELS = {"cpu": ON_CPU, "cuda": ON_CUDA}
SECONDS_PER_TFLOP = {"cpu": 2.5, "cuda": 0.05}  # where nothing was measured


def step_memory_bytes(layers: Sequence[Layer], batch: int, budget: Budget, dimensions: int) -> float:
    """Memory of a training step at its peak: weights, their gradients and momentum, feature maps, workspaces.

    The model is linear in the sizes of what lives at the same time: all values kept for the backward pass, the largest
    feature map (several times, for gradients and workspaces), float32 logits of all levels, and the weights. Its
    coefficients are fitted to measured steps; ``memory_factor`` of the budget corrects it for the device at hand.
    """
    model, width = MODELS[budget.device], 2 if budget.half else 4
    kept = width * batch * sum(KEPT[layer.kind] * layer.values for layer in layers)
    largest = width * batch * max(layer.values for layer in layers)
    logits = 4 * batch * sum(layer.values for layer in layers if layer.kind == "head")
    weights = 4 * sum(layer.parameters for layer in layers)
    total = model.kept * kept + model.largest * largest + model.logits * logits + model.parameters * weights
    price = price_of(budget, dimensions)
    return (total + model.fixed) * (price.memory_factor if price else 1)


def step_tflop(layers: Sequence[Layer], batch: int) -> float:
    """Operations of a training step in 10¹²."""
    return batch * sum((TRAINED + (layer.kind == "again")) * layer.flop for layer in layers) / 1e12


def step_seconds(layers: Sequence[Layer], batch: int, budget: Budget, dimensions: int) -> float:
    """Seconds of a training step."""
    price = price_of(budget, dimensions)
    each = price.seconds_per_tflop if price else SECONDS_PER_TFLOP[budget.device]
    return each * step_tflop(layers, batch)


def price_of(budget: Budget, dimensions: int) -> Price | None:
    """What was measured for networks of 2 or 3 dimensions, or None."""
    return budget.flat if dimensions == 2 else budget.solid
