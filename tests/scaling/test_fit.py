import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from qwenlib.scaling import fit as F
from qwenlib.scaling import forms, public_runs

TRUE = forms.LossLaw(E=1.7, A=420.0, B=1500.0, alpha=0.34, beta=0.36)


def design(sizes=9, tokens=7):
    N, D = np.meshgrid(np.geomspace(5e7, 1e10, sizes), np.geomspace(1e9, 5e11, tokens))
    return N.ravel(), D.ravel()


def planted(noise=0.0, seed=0):
    N, D = design()
    rng = np.random.default_rng(seed)
    return N, D, TRUE.loss(N, D) * np.exp(noise * rng.standard_normal(len(N)))


def values(law):
    return np.array([getattr(law, name) for name in F.COEFFICIENTS])


def shared_data() -> Path:
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("QWENLIB_SHARED_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"public run tables are not here: {folder} (set QWENLIB_SHARED_DATA)")
    return folder


def test_planted_coefficients_come_back_exactly():
    fit = F.fit_loss_law(*planted())
    np.testing.assert_allclose(values(fit.law), values(TRUE), rtol=1e-3)
    assert fit.in_best_basin > 0.5 * fit.starts
    assert np.abs(fit.residuals).max() < 1e-6


@pytest.mark.parametrize("method", ["cases", "parametric"])
def test_planted_coefficients_lie_inside_the_interval(method):
    inside = []
    for seed in range(2):
        N, D, loss = planted(noise=0.004, seed=seed)
        fit = F.fit_loss_law(N, D, loss)
        samples = F.bootstrap_loss_law(N, D, loss, fit, method=method, replicates=40, seed=seed)
        low, high = F.interval(samples, 0.95)
        assert (low < high).all()
        assert high[3] - low[3] < 0.1  # an interval that holds everything says nothing
        inside.append((low <= values(TRUE)) & (values(TRUE) <= high))
    assert np.mean(inside) >= 0.75


def test_bad_runs_do_not_move_the_fit():
    N, D, loss = planted(noise=0.0005)
    loss = loss.copy()
    loss[[3, 17, 40, 55]] *= 1.25  # diverged runs
    law = F.fit_loss_law(N, D, loss).law
    assert abs(law.alpha - TRUE.alpha) < 0.01
    assert abs(law.E / TRUE.E - 1) < 0.01


def test_gradient_is_that_of_the_objective():
    N, D, loss = planted(noise=0.01)
    mean, weight = F._prior_vectors({"beta": F.Prior(0.3, 0.1), "E": F.Prior(1.5, 0.2)})
    problem = F._Problem(np.log(N) - 20, np.log(D) - 24, np.log(loss), 3e-3, 2e-3, mean, weight)
    rng = np.random.default_rng(1)
    for _ in range(5):
        theta = np.array([0.0, 0.0, 0.5, 0.3, 0.3]) + 0.05 * rng.standard_normal(5)
        numeric = [
            (problem.value_and_gradient(theta + h)[0] - problem.value_and_gradient(theta - h)[0])
            / 2e-6
            for h in 1e-6 * np.eye(5)
        ]
        np.testing.assert_allclose(problem.value_and_gradient(theta)[1], numeric, rtol=1e-4)


def test_huber_by_hand():
    np.testing.assert_allclose(F.huber([0.5, -2.0, 1.0], 1.0), [0.125, 1.5, 0.5])


def test_prior_decides_what_the_data_leave_open():
    N, D = np.full(6, 1e6), np.geomspace(1e5, 1e6, 6)  # one size: alpha is unknown
    loss = forms.LossLaw(1.0, 20.0, 60.0, 0.3, 0.3).loss(N, D)
    priors = {"alpha": F.Prior(0.42, 0.05), "beta": F.Prior(0.3, 0.05), "E": F.Prior(1.0, 0.2)}
    scale = {"delta": 0.03, "noise": 0.02}
    fit = F.fit_loss_law(N, D, loss, priors=priors, **scale)
    assert fit.law.alpha == pytest.approx(0.42, abs=0.01)
    samples = F.bootstrap_loss_law(N, D, loss, fit, replicates=60, priors=priors, **scale)
    assert samples[:, 3].std() == pytest.approx(0.05, rel=0.4)


def test_groups_are_resampled_whole():
    N, D, loss = planted(noise=0.005)
    four = [np.repeat(v, 4) for v in (N, D, loss)]  # four checkpoints that are one observation
    fit = F.fit_loss_law(*four)
    width = {}
    for name, groups in {"runs": np.repeat(np.arange(len(N)), 4), "points": None}.items():
        samples = F.bootstrap_loss_law(*four, fit, groups=groups, replicates=40)
        low, high = F.interval(samples)
        width[name] = (high - low)[3]
    assert width["runs"] > 1.4 * width["points"]


def test_hold_out_takes_the_largest():
    kept, held = F.hold_out_largest([3.0, 9.0, 1.0, 7.0], 2)
    assert kept.tolist() == [0, 2] and held.tolist() == [1, 3]
    with pytest.raises(ValueError, match="hold out"):
        F.hold_out_largest([1.0, 2.0], 2)


def test_near_optimal_is_relative_to_its_own_cell():
    loss, cell = [2.000, 2.004, 2.006, 3.000, 3.007, 3.009], [0, 0, 0, 1, 1, 1]
    assert F.near_optimal(loss, cell).tolist() == [True, True, False, True, True, False]


def test_power_law_planted():
    rng = np.random.default_rng(0)
    N, D = design()
    cell = np.repeat(np.arange(len(N)), 5)
    N, D = np.repeat(N, 5), np.repeat(D, 5)
    y = forms.STEP_LAW_LR(N, D) * np.exp(0.2 * rng.standard_normal(len(N)))
    law = F.fit_power_law(y, N, D)
    low, high = F.interval(F.bootstrap_power_law(y, N, D, cell, replicates=200))
    assert low[1] < -0.713 < high[1] and low[2] < 0.307 < high[2]
    assert high[1] - low[1] < 0.15
    assert law.a == pytest.approx(-0.713, abs=0.04)
    alone = F.fit_power_law(y, N, D, use_N=False)
    assert alone.a == 0.0
    with pytest.raises(ValueError, match="do not vary"):
        F.fit_power_law(y[:5], N[:5], D[:5])


def test_parabola_minimum():
    x = np.array([0.004, 0.016, 0.008, 0.002])
    best, curvature = F.parabola_minimum(x, 3 + 0.4 * np.log(x / 0.007) ** 2)
    assert best == pytest.approx(0.007) and curvature == pytest.approx(0.4)
    # A flat floor with noise: the best point is the first, the optimum is not.
    best, _ = F.parabola_minimum([0.004, 0.008, 0.016, 0.032], [3.989, 4.036, 3.993, 4.254])
    assert 0.005 < best < 0.01
    for bad in (x, -(np.log(x) ** 2)):
        with pytest.raises(ValueError, match="widen"):
            F.parabola_minimum(x, bad)


def test_compute_optimal_is_a_minimum():
    N, D = TRUE.compute_optimal(1e21)
    assert 6 * N * D == pytest.approx(1e21)
    for shift in (0.9, 1.1):
        assert TRUE.loss(N, D) < TRUE.loss(N * shift, D / shift)


def test_law_file_round_trip(tmp_path):
    N, D, loss = planted(noise=0.004)
    fit = F.fit_loss_law(N, D, loss)
    samples = F.bootstrap_loss_law(N, D, loss, fit, replicates=50)
    laws = tuple(forms.LossLaw(*row) for row in samples)
    law = F.Law(fit.law, "total", laws, 0.004, forms.STEP_LAW_LR, {"runs": len(N)})
    again = F.Law.load(law.save(tmp_path / "law.json"))
    assert again.predict(2e10, 1e12) == law.predict(2e10, 1e12)
    middle, low, high = again.predict(2e10, 1e12)
    assert low < middle < high and low < TRUE.loss(2e10, 1e12) < high
    assert again.learning_rate == forms.STEP_LAW_LR
    wide = F.Law(fit.law, "total", laws, 0.04).predict(2e10, 1e12)
    assert wide[2] - wide[1] > 2 * (high - low)


def test_bad_input_is_named(tmp_path):
    N, D, loss = planted()
    with pytest.raises(ValueError, match="positive"):
        F.fit_loss_law(N, D, -loss)
    with pytest.raises(ValueError, match="length"):
        F.fit_loss_law(N, D[1:], loss)
    with pytest.raises(ValueError, match="coefficients"):
        F.fit_loss_law(N[:4], D[:4], loss[:4])
    with pytest.raises(ValueError, match="no prior"):
        F.fit_loss_law(N, D, loss, priors={"A": F.Prior(1, 1)})
    with pytest.raises(ValueError, match="total"):
        F.Law(TRUE, "all", (TRUE,), 0.01)
    with pytest.raises(FileNotFoundError, match="05_scaling_laws"):
        F.Law.load(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"parameters": "total"')
    with pytest.raises(ValueError, match="half.json"):
        F.Law.load(tmp_path / "half.json")
    with pytest.raises(ValueError, match="bootstrap method"):
        F.bootstrap_loss_law(N, D, loss, F.fit_loss_law(N, D, loss), method="block")


def test_loader_reads_tokens_from_compute():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "runs.csv"
        path.write_text("Model Size,Training FLOP,loss\n1e9,6e19,2.5\n2e9,2.4e20,9.0\n")
        runs = public_runs.chinchilla_runs(path)
        np.testing.assert_allclose(runs.D, [1e10, 2e10])
        assert runs.without_worst(1).loss.tolist() == [2.5]
        path.write_text("N,D,lr,bs,smooth loss\n1e9,1e10,1e-3,64,2.5\n1e9,2e10,1e-3,64,2.4\n")
        runs = public_runs.steplaw_dense_runs(path)
        np.testing.assert_allclose(runs.batch_tokens, 64 * 2048)
        assert runs.cell.tolist() == [0, 1]
        with pytest.raises(ValueError, match="Training FLOP"):
            public_runs.chinchilla_runs(path)


def test_published_refit_of_chinchilla():
    """arXiv 2404.10102: E 1.817, alpha 0.348, beta 0.366, A 482, B 2085 on 240 runs."""
    runs = public_runs.chinchilla_runs(shared_data()).without_worst(5)
    assert len(runs.N) == 240
    fit = F.fit_loss_law(runs.N, runs.D, runs.loss)
    assert fit.law.E == pytest.approx(1.8169, abs=0.003)
    assert fit.law.alpha == pytest.approx(0.3478, abs=0.003)
    assert fit.law.beta == pytest.approx(0.3659, abs=0.004)
    assert fit.law.A == pytest.approx(482.0, rel=0.05)
    assert fit.law.B == pytest.approx(2085.4, rel=0.05)
    assert fit.in_best_basin > 200
    samples = F.bootstrap_loss_law(runs.N, runs.D, runs.loss, fit, replicates=100)
    low, high = F.interval(samples)
    np.testing.assert_allclose(low[[0, 3, 4]], [1.769, 0.317, 0.331], atol=0.015)
    np.testing.assert_allclose(high[[0, 3, 4]], [1.871, 0.373, 0.415], atol=0.03)
    # The published coefficients of approach 3 fit their own runs worse.
    published = forms.CHINCHILLA_PUBLISHED.loss(runs.N, runs.D)
    assert F.huber(np.log(published / runs.loss)).sum() > 1.05 * F.huber(fit.residuals).sum()


def test_step_law_from_its_table():
    runs = public_runs.steplaw_dense_runs(shared_data())
    assert len(runs.N) == 1911 and runs.cell.max() == 16
    near = F.near_optimal(runs.loss, runs.cell)
    N, D, cell = runs.N[near], runs.D[near], runs.cell[near]
    rate = F.fit_power_law(runs.learning_rate[near], N, D)
    low, high = F.interval(F.bootstrap_power_law(runs.learning_rate[near], N, D, cell))
    assert low[1] < forms.STEP_LAW_LR.a < high[1]
    # The D exponent of this table is smaller than the published 0.307; both are near-optimal.
    assert 0.1 < rate.b < 0.307
    batch = runs.batch_tokens[near]
    low, high = F.interval(F.bootstrap_power_law(batch, N, D, cell, use_N=False))
    assert low[2] < forms.STEP_LAW_BATCH.b < high[2]
    ratio = rate(runs.N, runs.D) / forms.STEP_LAW_LR(runs.N, runs.D)
    assert (np.abs(np.log(ratio)) < np.log(1.5)).all()
