"""SQ-VAE: a variational autoencoder of steps whose latent is one of a few codes (planning tokens, arXiv 2310.05707,
section 3). Which code a step has is its type.

The decoder is to give back the step's own vector (vae), or the one of the trace's next step (vae-next-step); with
vae-contrastive the codes of neighbouring steps are driven apart as well. The paper's latent is Gaussian and mixes all
codes by its softmax; here one code is drawn, as it will be used. On arithmetic whose four types are known
(docs/family.md) that recovers them wholly in two of three runs; the paper's form, tried with its sizes in four settings
of 10 to 100 passes, did in 2 of 15.
"""

from __future__ import annotations

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
APART = 0.1  # published weight of how far neighbours' codes are apart; by their angle, since a distance has no bound
EVEN = 1.0  # weight of the prior: over all steps the codes are to be about equally common, or one would take all
Arrays = dict[str, NDArray[np.float32]]


class SQVAE(nn.Module):
    """Encoder (features -> types), codes (types, LATENT), decoder (LATENT -> features)."""

    def __init__(self, features: int, types: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(features, WIDTH), nn.GELU(), nn.Linear(WIDTH, types))
        self.codes = nn.Linear(types, LATENT, bias=False)
        self.decoder = nn.Sequential(nn.Linear(LATENT, WIDTH), nn.GELU(), nn.Linear(WIDTH, features))

    def forward(self, vectors: Tensor, heat: float) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (steps, types), a code drawn by them (steps, LATENT), and what is decoded from it (steps, features).

        The code's gradient goes straight through.
        """
        logits = self.encoder(vectors)
        codes = self.codes(F.gumbel_softmax(logits, heat, hard=True))
        return logits, codes, self.decoder(codes)


def fit_vae(vectors: Any, data: DataRecipe, traces: NDArray[np.intp]) -> Arrays:
    """The encoder's weights. `vectors` are (steps, features), of mean 0 and deviation 1; `traces` tells of which trace
    each step is. Raises DataError if the next step is to be told and no trace has one.
    """
    followed = np.flatnonzero(traces[:-1] == traces[1:])
    given, wanted = np.arange(len(traces)), np.arange(len(traces))
    if data.step_types == "vae-next-step":
        given, wanted = followed, followed + 1
        if not len(given):
            raise DataError("data.step_types vae-next-step: no trace has two steps; use vae")
    own, targets = (torch.from_numpy(np.ascontiguousarray(vectors[rows])) for rows in (given, wanted))
    neighbours = torch.from_numpy(followed) if data.step_types == "vae-contrastive" else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(data.seed)
        encoder = _trained(own, targets, neighbours, data).encoder
    return {f"encoder.{name}": weight.numpy().copy() for name, weight in encoder.state_dict().items()}


def _trained(own: Tensor, targets: Tensor, neighbours: Tensor | None, data: DataRecipe) -> SQVAE:
    """`neighbours`: steps whose next one is of the same trace, if the codes of both are to be driven apart."""
    model = SQVAE(own.shape[1], data.n_types)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    for epoch in range(data.type_epochs):
        heat = WARM * (COOL / WARM) ** (epoch / max(1, data.type_epochs - 1))
        for rows in torch.randperm(len(own)).split(BATCH):
            logits, _, made = model(own[rows], heat)
            loss = F.mse_loss(made, targets[rows]) + EVEN * _uneven(logits)
            if neighbours is not None and len(neighbours):
                some = neighbours[torch.randint(len(neighbours), (BATCH,))]
                (_, one, _), (_, other, _) = model(own[some], heat), model(own[some + 1], heat)
                loss = loss - APART * (1 - F.cosine_similarity(one, other)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def _uneven(logits: Tensor) -> Tensor:
    """How far the codes are from being equally common: the divergence of their mean share from an even one."""
    share = logits.softmax(1).mean(0)
    return (share * (share * logits.shape[1]).clamp_min(1e-9).log()).sum()


@torch.no_grad()
def vae_types(vectors: Any, arrays: Arrays) -> NDArray[np.intp]:
    """The likeliest code of each vector: (n, features) -> (n,)."""
    weights = {name.removeprefix("encoder."): torch.from_numpy(w) for name, w in arrays.items() if "encoder." in name}
    hidden = F.gelu(F.linear(torch.from_numpy(np.ascontiguousarray(vectors)), weights["0.weight"], weights["0.bias"]))
    types: NDArray[np.intp] = F.linear(hidden, weights["2.weight"], weights["2.bias"]).argmax(1).numpy()
    return types
