"""Fit scaling laws robustly and say how sure the fit is (report §3.2; arXiv 2203.15556 §D.2).

The loss law is fitted in logs, with theta = (a, b, e, alpha, beta), a = ln A, b = ln B, e = ln E:

    r_i   = LSE(a - alpha ln N_i, b - beta ln D_i, e) - ln L_i
    theta = argmin  sum_i Huber_delta(r_i) / noise^2  (+ squared distance to priors, if any)

Inside, ln N and ln D are centred, because A-alpha and B-beta are nearly collinear otherwise.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from qwenlib.scaling.forms import LossLaw, PowerLaw

DELTA = 1e-3  # arXiv 2203.15556, eq. 3
COEFFICIENTS = ("E", "A", "B", "alpha", "beta")
PRIOR_NAMES = ("E", "alpha", "beta")


def huber(r, delta: float = DELTA):
    """Huber loss: r^2/2 inside |r| <= delta, delta (|r| - delta/2) outside."""
    r = np.abs(r)
    return np.where(r <= delta, 0.5 * r * r, delta * (r - 0.5 * delta))


@dataclass(frozen=True)
class Prior:
    """Normal prior: on ln(E) for E (mean given as E), on the exponent itself for alpha, beta."""

    mean: float
    sd: float


@dataclass(frozen=True)
class LossFit:
    """A fitted loss law and the evidence that the optimiser finished."""

    law: LossLaw
    objective: float  # at the minimum, divided by noise^2
    gradient: float  # largest absolute gradient entry at the minimum
    starts: int
    in_best_basin: int  # starts that ended at the same minimum
    residuals: np.ndarray  # ln L - ln prediction, one per run
    theta: np.ndarray  # centred parameters, to start bootstrap fits from


@dataclass(frozen=True)
class _Problem:
    """Objective in centred logs, with its analytic gradient."""

    n: np.ndarray
    d: np.ndarray
    target: np.ndarray
    delta: float
    noise: float
    prior_mean: np.ndarray  # one entry per theta; ignored where prior_weight is 0
    prior_weight: np.ndarray  # 1 / sd^2

    def residual_and_weights(self, theta):
        a, b, e, alpha, beta = theta
        terms = np.stack([a - alpha * self.n, b - beta * self.d, np.full_like(self.n, e)])
        top = terms.max(0)
        log_sum = top + np.log(np.exp(terms - top).sum(0))
        return log_sum - self.target, np.exp(terms - log_sum)

    def value_and_gradient(self, theta):
        r, w = self.residual_and_weights(theta)
        slope = np.clip(r, -self.delta, self.delta)
        gradient = np.array(
            [
                slope @ w[0],
                slope @ w[1],
                slope @ w[2],
                -slope @ (w[0] * self.n),
                -slope @ (w[1] * self.d),
            ]
        )
        gap = theta - self.prior_mean
        value = huber(r, self.delta).sum() / self.noise**2
        value += 0.5 * (self.prior_weight * gap * gap).sum()
        return value, gradient / self.noise**2 + self.prior_weight * gap


def fit_loss_law(
    N,
    D,
    loss,
    *,
    delta: float = DELTA,
    noise: float | None = None,
    priors: Mapping[str, Prior] | None = None,
    start: np.ndarray | None = None,
    max_iterations: int = 5000,
) -> LossFit:
    """Fit L = E + A/N^alpha + B/D^beta from 243 starts; loss in nats, N and D > 0, shapes (runs,).

    `noise` scales the objective (default `delta`) and sets how much a prior weighs against a run.
    `start` replaces the grid of starts by one centred theta (for bootstrap replicates).
    Raises ValueError for non-positive input or too few runs to determine the five coefficients.
    """
    N, D, loss = _checked(N, D, loss)
    if len(N) < 5 and not priors:
        raise ValueError(f"{len(N)} runs cannot determine 5 coefficients: add runs or priors")
    n0, d0 = np.log(N).mean(), np.log(D).mean()
    mean, weight = _prior_vectors(priors or {})
    problem = _Problem(
        np.log(N) - n0, np.log(D) - d0, np.log(loss), delta, noise or delta, mean, weight
    )
    starts = [np.asarray(start, float)] if start is not None else _starts(problem.target.mean())
    ends = [_minimise(problem, s, max_iterations) for s in starts]
    values = np.array([value for value, _ in ends])
    best = int(np.argmin(values))
    theta = ends[best][1]
    same = np.abs(values - values[best]) <= 1e-6 * max(1.0, abs(values[best]))
    a, b, e, alpha, beta = theta
    law = LossLaw(
        E=float(np.exp(e)),
        A=float(np.exp(a + alpha * n0)),
        B=float(np.exp(b + beta * d0)),
        alpha=float(alpha),
        beta=float(beta),
    )
    return LossFit(
        law=law,
        objective=float(values[best]),
        gradient=float(np.abs(problem.value_and_gradient(theta)[1]).max()),
        starts=len(starts),
        in_best_basin=int(same.sum()),
        residuals=-problem.residual_and_weights(theta)[0],
        theta=theta,
    )


def bootstrap_loss_law(
    N,
    D,
    loss,
    fit: LossFit,
    *,
    method: str = "cases",
    groups: Sequence | None = None,
    replicates: int = 200,
    seed: int = 0,
    **settings,
) -> np.ndarray:
    """Coefficients of refits, shape (replicates, 5), columns as in COEFFICIENTS.

    "cases" resamples runs, or whole `groups` when runs share something (same trunk, same N).
    "parametric" keeps the design and adds resampled residuals of `fit` to its predictions.
    With priors, each replicate also draws its prior means, so that a coefficient which the data
    leave open keeps the width of its prior. `settings` go to `fit_loss_law`.
    Raises ValueError for an unknown method.
    """
    if method not in ("cases", "parametric"):
        raise ValueError(f"bootstrap method {method!r}: use 'cases' or 'parametric'")
    N, D, loss = _checked(N, D, loss)
    rng = np.random.default_rng(seed)
    priors = settings.pop("priors", None) or {}
    n0, d0 = np.log(N).mean(), np.log(D).mean()
    labels = np.arange(len(N)) if groups is None else np.asarray(groups)
    members = [np.flatnonzero(labels == g) for g in np.unique(labels)]
    # Residuals of a fit with p free coefficients are too small by sqrt((n - p) / n).
    free = 2 + sum(name not in priors for name in PRIOR_NAMES)
    inflate = np.sqrt(len(N) / max(1, len(N) - free))
    rows = []
    for _ in range(replicates):
        drawn = {k: _draw(k, prior, rng) for k, prior in priors.items()}
        if method == "cases":
            pick = rng.integers(len(members), size=len(members))
            rows_i = np.concatenate([members[i] for i in pick])
            y = loss[rows_i]
        else:
            rows_i = np.arange(len(N))
            noise = rng.choice(fit.residuals - fit.residuals.mean(), size=len(N)) * inflate
            y = fit.law.loss(N, D) * np.exp(noise)
        start = fit.theta.copy()  # move the centre from all runs to this replicate's runs
        start[0] -= fit.law.alpha * (np.log(N[rows_i]).mean() - n0)
        start[1] -= fit.law.beta * (np.log(D[rows_i]).mean() - d0)
        law = fit_loss_law(N[rows_i], D[rows_i], y, start=start, priors=drawn, **settings).law
        rows.append([getattr(law, name) for name in COEFFICIENTS])
    return np.array(rows)


def interval(samples, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) percentiles over the first axis that hold `level` of the samples."""
    tail = 100 * (1 - level) / 2
    low, high = np.nanpercentile(samples, [tail, 100 - tail], axis=0)
    return low, high


def hold_out_largest(C, runs: int) -> tuple[np.ndarray, np.ndarray]:
    """(fit, held-out) index arrays: the `runs` largest values of C (e.g. FLOPs) are held out."""
    C = np.asarray(C, float)
    if not 0 < runs < len(C):
        raise ValueError(f"cannot hold out {runs} of {len(C)} runs")
    order = np.argsort(C, kind="stable")
    return np.sort(order[:-runs]), np.sort(order[-runs:])


def near_optimal(loss, cell, tolerance: float = 0.0025) -> np.ndarray:
    """Mask of runs within `tolerance` (relative) of the best loss of their cell (2503.04715).

    The set is used and not the argmin: the optimum is flat, and the best grid point is noise.
    """
    loss, cell = np.asarray(loss, float), np.asarray(cell)
    keep = np.zeros(len(loss), bool)
    for c in np.unique(cell):
        here = cell == c
        keep |= here & (loss <= loss[here].min() * (1 + tolerance))
    return keep


def fit_power_law(y, N, D, *, use_N: bool = True, use_D: bool = True) -> PowerLaw:
    """Least squares of ln y = ln c + a ln N + b ln D over runs; a or b is 0 when not used.

    Raises ValueError when the runs do not vary enough to determine the exponents.
    """
    N, D, y = _checked(N, D, y)
    columns = [np.ones_like(y)]
    columns += [np.log(N)] if use_N else []
    columns += [np.log(D)] if use_D else []
    X = np.stack(columns, 1)
    solution, _, rank, _ = np.linalg.lstsq(X, np.log(y), rcond=None)
    if rank < X.shape[1]:
        raise ValueError("runs do not vary in each of the variables used: exponents undetermined")
    rest = iter(solution[1:])
    return PowerLaw(
        c=float(np.exp(solution[0])),
        a=float(next(rest)) if use_N else 0.0,
        b=float(next(rest)) if use_D else 0.0,
    )


def bootstrap_power_law(
    y, N, D, cell, *, replicates: int = 400, seed: int = 0, use_N: bool = True, use_D: bool = True
) -> np.ndarray:
    """(c, a, b) of refits, shape (replicates, 3): resamples whole (N, D) cells, not runs.

    Runs of one cell share their optimum; resampling single runs understates the interval.
    """
    y, N, D, cell = (np.asarray(v) for v in (y, N, D, cell))
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(cell == c) for c in np.unique(cell)]
    rows = []
    while len(rows) < replicates:
        pick = rng.integers(len(members), size=len(members))
        i = np.concatenate([members[k] for k in pick])
        try:
            law = fit_power_law(y[i], N[i], D[i], use_N=use_N, use_D=use_D)
        except ValueError:
            if len(members) < 4:
                raise
            continue  # a draw of too few distinct cells; draw again
        rows.append((law.c, law.a, law.b))
    return np.array(rows)


def parabola_minimum(x, y) -> tuple[float, float]:
    """Position of the minimum of y(ln x), by a least-squares parabola through all points.

    All points and not the best three: near the optimum the curve is flatter than the noise of a
    run. Returns (x_min, curvature in y per (ln x)^2). Raises ValueError when the minimum is not
    inside the grid, where no fit can place it.
    """
    u, v = np.log(np.asarray(x, float)), np.asarray(y, float)
    if len(np.unique(u)) < 3:
        raise ValueError(f"{len(np.unique(u))} different points cannot determine a parabola")
    centre = u.mean()
    c2, c1, _ = np.polyfit(u - centre, v, 2)
    place = centre - c1 / (2 * c2) if c2 > 0 else np.inf
    if not u.min() <= place <= u.max():
        raise ValueError(f"no minimum inside {np.exp(u.min()):.3g} to {np.exp(u.max()):.3g}: widen")
    return float(np.exp(place)), float(c2)


@dataclass(frozen=True)
class Law:
    """A loss law with its bootstrap samples: what a later chapter loads to predict its run.

    `parameters` says which N the law takes: "total" (tied embeddings once) or "non_embedding".
    """

    loss: LossLaw
    parameters: str
    samples: tuple[LossLaw, ...]
    residual_sd: float  # of ln L, added to the interval of a single new run
    learning_rate: PowerLaw | None = None
    notes: Mapping[str, object] | None = None

    def __post_init__(self):
        if self.parameters not in ("total", "non_embedding"):
            raise ValueError(f"parameters={self.parameters!r}: use 'total' or 'non_embedding'")

    def predict(self, N: float, D: float, level: float = 0.95) -> tuple[float, float, float]:
        """(loss, low, high) in nats per token for one new run of N parameters on D tokens.

        N counts as `self.parameters` says. The interval holds the spread of the bootstrap fits
        and the noise of one run. Raises ValueError for N or D that are not positive.
        """
        if not (N > 0 and D > 0):
            raise ValueError(f"N={N} and D={D} must be positive")
        logs = np.log([s.loss(N, D) for s in self.samples])
        # Normal noise at fixed quantiles, not drawn: the interval does not depend on a seed.
        z = _normal_grid()
        spread = np.exp((logs[:, None] + self.residual_sd * z[None, :]).ravel())
        low, high = interval(spread, level)
        return float(self.loss.loss(N, D)), float(low), float(high)

    def save(self, path: str | Path) -> Path:
        """Write JSON atomically; `Law.load` reads it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "form": "L = E + A/N^alpha + B/D^beta",
            "parameters": self.parameters,
            "coefficients": asdict(self.loss),
            "residual_sd": self.residual_sd,
            "learning_rate": asdict(self.learning_rate) if self.learning_rate else None,
            "notes": dict(self.notes or {}),
            "samples": [[getattr(s, k) for k in COEFFICIENTS] for s in self.samples],
        }
        temporary = path.with_suffix(path.suffix + ".part")
        temporary.write_text(json.dumps(content, indent=1))
        os.replace(temporary, path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Law:
        """Read a law written by `save`. Raises FileNotFoundError or ValueError naming the file."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no fitted law; run chapter 05_scaling_laws first")
        try:
            content = json.loads(path.read_text())
            rate = content["learning_rate"]
            return cls(
                loss=LossLaw(**content["coefficients"]),
                parameters=content["parameters"],
                samples=tuple(
                    LossLaw(**dict(zip(COEFFICIENTS, row, strict=True)))
                    for row in content["samples"]
                ),
                residual_sd=float(content["residual_sd"]),
                learning_rate=PowerLaw(**rate) if rate else None,
                notes=content["notes"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a law written by Law.save ({error})") from error


def _checked(*arrays):
    arrays = [np.asarray(v, float).ravel() for v in arrays]
    if len({len(v) for v in arrays}) != 1:
        raise ValueError(f"arrays differ in length: {[len(v) for v in arrays]}")
    for v in arrays:
        if not (np.isfinite(v).all() and (v > 0).all()):
            raise ValueError("N, D and the fitted values must be finite and positive")
    return arrays


def _starts(mean_log_loss: float) -> list[np.ndarray]:
    terms, floors, exponents = (-2.0, -1.0, -0.2), (-2.0, -0.7, -0.1), (0.15, 0.4, 1.0)
    grid = itertools.product(terms, terms, floors, exponents, exponents)
    shift = np.array([mean_log_loss] * 3 + [0.0, 0.0])
    return [np.array(point) + shift for point in grid]


def _minimise(problem: _Problem, start: np.ndarray, max_iterations: int):
    from scipy.optimize import minimize

    # The default tolerances stop on this flat valley long before its floor.
    result = minimize(
        problem.value_and_gradient,
        start,
        jac=True,
        method="L-BFGS-B",
        options={
            "maxiter": max_iterations,
            "maxfun": 10 * max_iterations,
            "maxcor": 20,
            "ftol": 1e-15,
            "gtol": 1e-9,
        },
    )
    return float(result.fun), result.x


def _prior_vectors(priors: Mapping[str, Prior]) -> tuple[np.ndarray, np.ndarray]:
    mean, weight = np.zeros(5), np.zeros(5)
    place = {"E": 2, "alpha": 3, "beta": 4}
    for name, prior in priors.items():
        if name not in place:
            raise ValueError(f"no prior for {name!r}: use one of {PRIOR_NAMES}")
        mean[place[name]] = np.log(prior.mean) if name == "E" else prior.mean
        weight[place[name]] = 1 / prior.sd**2
    return mean, weight


def _draw(name: str, prior: Prior, rng: np.random.Generator) -> Prior:
    shift = prior.sd * rng.standard_normal()
    mean = prior.mean * np.exp(shift) if name == "E" else prior.mean + shift
    return Prior(float(mean), prior.sd)


def _normal_grid(points: int = 101) -> np.ndarray:
    from scipy.stats import norm

    return norm.ppf((np.arange(points) + 0.5) / points)
