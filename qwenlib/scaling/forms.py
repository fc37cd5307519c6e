"""Functional forms of scaling laws, and published coefficients (report §3.2).

Symbols: N parameters, D training tokens, C training FLOPs, L loss in nats per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LossLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al., arXiv 2203.15556, eq. 2)."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, N, D):
        """Predicted loss in nats per token; N and D broadcast."""
        N, D = np.asarray(N, float), np.asarray(D, float)
        return self.E + self.A / N**self.alpha + self.B / D**self.beta

    @property
    def size_exponent(self) -> float:
        """a in N_opt proportional to C^a, a = beta / (alpha + beta)."""
        return self.beta / (self.alpha + self.beta)

    def compute_optimal(self, C, flops_per_parameter_token: float = 6.0):
        """(N_opt, D_opt) that minimise L under C = k N D (arXiv 2203.15556, eq. 4)."""
        nd = np.asarray(C, float) / flops_per_parameter_token
        g = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        N = g * nd**self.size_exponent
        return N, nd / N


@dataclass(frozen=True)
class PowerLaw:
    """y = c N^a D^b: the form of learning-rate and batch-size laws (b or a may be 0)."""

    c: float
    a: float = 0.0
    b: float = 0.0

    def __call__(self, N, D):
        """Value at N parameters and D tokens; broadcasts."""
        return self.c * np.asarray(N, float) ** self.a * np.asarray(D, float) ** self.b


@dataclass(frozen=True)
class ComputeLaw:
    """y = c C^p: hyper-parameters as a function of training compute C."""

    c: float
    p: float

    def __call__(self, C):
        """Value at C training FLOPs; broadcasts."""
        return self.c * np.asarray(C, float) ** self.p


# Hoffmann et al. arXiv 2203.15556, approach 3, unrounded values of the TeX source.
CHINCHILLA_PUBLISHED = LossLaw(E=1.6934, A=406.4, B=410.7, alpha=0.33917, beta=0.28491)
# Besiroglu et al. arXiv 2404.10102: refit of the extracted points without the five worst runs.
CHINCHILLA_REFIT = LossLaw(E=1.8169, A=482.01, B=2085.43, alpha=0.3478, beta=0.3659)
# Li et al. arXiv 2503.04715 ("Step Law"): N without embeddings, batch in tokens.
STEP_LAW_LR = PowerLaw(c=1.79, a=-0.713, b=0.307)
STEP_LAW_BATCH = PowerLaw(c=0.58, a=0.0, b=0.571)
# DeepSeek LLM arXiv 2401.02954: C = (non-embedding FLOPs per token) D, batch in tokens.
DEEPSEEK_LR = ComputeLaw(c=0.3118, p=-0.1250)
DEEPSEEK_BATCH = ComputeLaw(c=0.2920, p=0.3271)
