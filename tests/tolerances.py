"""How far two computations of the same number may lie apart, and why: the bounds of the numeric tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """`bound` is relative to the scale named in `of`; `of="1"` is an absolute bound."""

    bound: float
    of: str
    reason: str


GOLDEN_SIMILARITY = Tolerance(
    1e-5,
    "1",
    "float32 sums over up to 4096 channels, in another order than the published code; maps lie in 0..1",
)
GOLDEN_ACTIVATION = Tolerance(
    1e-4, "largest magnitude", "float32 rounding of some twenty layers; logits and merging blocks alike"
)
GOLDEN_EVAL_LOSS = Tolerance(1e-5, "the loss", "the logits' bound, averaged over the pixels, in float32")
GOLDEN_TRAINING = Tolerance(
    1e-8, "the value", "float64: rounding 1e-16, amplified by batch norm and by up to five steps of training"
)
ZERO_GRADIENT = Tolerance(
    1e-12,
    "1",
    "biases before a batch norm have gradient 0, of which float64 leaves 1e-14; all others exceed 3e-3",
)
PARITY_FORWARD = Tolerance(
    1e-11, "largest magnitude", "float64 rounding; batch norm over 18 values at level 5 amplifies it most"
)
PARITY_GRADIENT = Tolerance(
    1e-9, "largest magnitude of the tensor's gradient", "float64 rounding through forward and backward"
)
SAME_COMPUTATION = Tolerance(
    1e-10, "largest magnitude", "float64: the same sums in another order (of shots, of the batch)"
)
SAME_UPDATE = Tolerance(
    1e-5, "largest magnitude", "float32: three updates of a small network, shared among processes or not"
)
COSINE_FLOAT64 = Tolerance(1e-12, "1", "float64 sums in another order; maps lie in 0..1")
COSINE_FLOAT32 = Tolerance(1e-5, "1", "float32 sums in another order, the features' own rounding included")
COSINE_BFLOAT16 = Tolerance(
    4e-3,
    "1",
    "features rounded to 8 bits, and on a CPU each product too: 2^-9 of it; seen: 2e-3 with one object position, "
    "2e-4 with hundreds, as the errors average out",
)
COMPILED = Tolerance(1e-4, "largest magnitude, 1 at least", "float32: the compiler may order sums otherwise")
SAME_TRAINING = Tolerance(
    1e-3, "the loss", "float32: epochs of a network of 65 px shared among other numbers of processes; 2e-5 was seen"
)
FOLDED_FLOAT32 = Tolerance(1e-5, "a level's largest magnitude", "batch norm in the weights: each rounded once more")
FOLDED_BFLOAT16 = Tolerance(
    3e-2, "a level's largest magnitude", "8 bits in every weight and activation of up to fifty convolutions"
)
SAME_PREDICTION = Tolerance(
    1e-5, "1, or the logits' largest", "float32: the same sums over shots or windows in another order"
)
BFLOAT16_PREDICTION = Tolerance(
    0.2, "1, on average", "8 bits in every activation of random weights, scaled up so that pixels differ"
)
