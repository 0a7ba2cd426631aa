"""SQ-VAE: a variational autoencoder of steps whose latent is one of a few codes (planning tokens, arXiv 2310.05707,
section 3). Which code a step has is its type.

The decoder is to give back the step's own vector (vae), the one of the trace's next step (vae-next-step), or one that
is nearer to the step's own than to those of other steps (vae-contrastive, InfoNCE, arXiv 1807.03748).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from memreason.core.errors import DataError
from memreason.core.stages import DataRecipe

__all__ = ["fit_vae", "vae_types"]

WIDTH, LATENT = 128, 32  # of the hidden layers, of a code
BATCH, RATE = 64, 1e-3  # steps in one update; Adam's learning rate
WARM, COOL = 2.0, 0.5  # the temperature of the Gumbel-softmax (arXiv 1611.01144) falls from one to the other
NEAR = 0.1  # the temperature of InfoNCE
EVEN = 1.0  # weight of the prior: over all steps the codes are to be about equally common, or one would take all
Arrays = dict[str, NDArray[np.float32]]


class SQVAE(nn.Module):
    """Encoder (features -> types), codes (types, LATENT), decoder (LATENT -> features)."""

    def __init__(self, features: int, types: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(features, WIDTH), nn.GELU(), nn.Linear(WIDTH, types))
        self.codes = nn.Linear(types, LATENT, bias=False)
        self.decoder = nn.Sequential(nn.Linear(LATENT, WIDTH), nn.GELU(), nn.Linear(WIDTH, features))

    def forward(self, vectors: Tensor, heat: float) -> tuple[Tensor, Tensor]:
        """Logits (steps, types), and what the decoder makes (steps, features) of a code drawn by them: one code, whose
        gradient goes straight through."""
        logits = self.encoder(vectors)
        return logits, self.decoder(self.codes(F.gumbel_softmax(logits, heat, hard=True)))


def _squared(made: Tensor, wanted: Tensor) -> Tensor:
    return F.mse_loss(made, wanted)


def _contrastive(made: Tensor, wanted: Tensor) -> Tensor:
    likeness = F.normalize(made, dim=1) @ F.normalize(wanted, dim=1).T
    return F.cross_entropy(likeness / NEAR, torch.arange(len(made)))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "vae": _squared,
    "vae-next-step": _squared,
    "vae-contrastive": _contrastive,
}


def fit_vae(vectors: Any, data: DataRecipe, traces: NDArray[np.intp]) -> Arrays:
    """The encoder's weights. `vectors` are (steps, features), of mean 0 and deviation 1; `traces` tells of which trace
    each step is. Raises DataError if the next step is to be told and no trace has one.
    """
    given = np.arange(len(traces))
    wanted = given
    if data.step_types == "vae-next-step":
        given = np.flatnonzero(traces[:-1] == traces[1:])
        wanted = given + 1
        if not len(given):
            raise DataError("data.step_types vae-next-step: no trace has two steps; use vae")
    own, targets = (torch.from_numpy(np.ascontiguousarray(vectors[rows])) for rows in (given, wanted))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(data.seed)
        encoder = _trained(own, targets, data).encoder
    return {f"encoder.{name}": weight.numpy().copy() for name, weight in encoder.state_dict().items()}


def _trained(own: Tensor, targets: Tensor, data: DataRecipe) -> SQVAE:
    model = SQVAE(own.shape[1], data.n_types)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    loss_of = LOSSES[data.step_types]
    for epoch in range(data.type_epochs):
        heat = WARM * (COOL / WARM) ** (epoch / max(1, data.type_epochs - 1))
        for rows in torch.randperm(len(own)).split(BATCH):
            logits, made = model(own[rows], heat)
            share = logits.softmax(1).mean(0)
            prior = (share * (share * data.n_types).clamp_min(1e-9).log()).sum()
            optimizer.zero_grad()
            (loss_of(made, targets[rows]) + EVEN * prior).backward()
            optimizer.step()
    return model


@torch.no_grad()
def vae_types(vectors: Any, arrays: Arrays) -> NDArray[np.intp]:
    """The likeliest code of each vector: (n, features) -> (n,)."""
    weights = {name.removeprefix("encoder."): torch.from_numpy(w) for name, w in arrays.items() if "encoder." in name}
    hidden = F.gelu(F.linear(torch.from_numpy(np.ascontiguousarray(vectors)), weights["0.weight"], weights["0.bias"]))
    types: NDArray[np.intp] = F.linear(hidden, weights["2.weight"], weights["2.bias"]).argmax(1).numpy()
    return types
