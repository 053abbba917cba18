"""A router that foretells, from a layer's input, which experts will be active."""

from __future__ import annotations

import torch

# Against the mean energy of the inputs. The error on held-out text is flat from 0.1 to 1.
_RIDGE = 0.3
# Largest logit on the text the router is fitted to. Tiny, because an expert's weight must be 1, as
# in the dense layer: after normalisation it is 1 + (logit - mean logit) / 2, here within 2^-9 of 1,
# half of what rounding to bfloat16 may change. Not tinier: scores are float32 near 0.5, in steps of
# 6e-8, and a typical logit of the demo model is a fiftieth of the largest.
LOGIT_LIMIT = 2.0**-8


def fit_router(hidden: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Fit expert activity as a linear function of the hidden state, by ridge regression.

    Args:
        hidden: [tokens, hidden] inputs of the layer.
        mass: [tokens, experts] how much each expert adds to the output of the layer.

    Returns:
        [experts, hidden] router weights. The part that all experts share is taken out: it cannot
        change the choice, only the weights.
    """
    num_tokens, width = hidden.shape
    energy = hidden.square().mean()
    gram = hidden.T @ hidden + _RIDGE * num_tokens * energy * torch.eye(width, dtype=hidden.dtype)
    weights: torch.Tensor = torch.linalg.solve(gram, hidden.T @ mass).T
    weights = weights - weights.mean(dim=0)
    return weights * (LOGIT_LIMIT / (hidden @ weights.T).abs().max())
