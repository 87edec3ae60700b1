"""The estimator as scikit-learn and its users treat it."""

import pickle
import warnings
from functools import partial

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score
from sklearn.utils.estimator_checks import estimator_checks_generator

from lightning_diffclf.estimator import DiTClassifier

LEARNS = {"hidden_size": 32, "lr": 5e-3, "max_steps": 150, "draws": 32}

TINY = partial(
    DiTClassifier,
    hidden_size=16,
    depth=1,
    num_heads=2,
    batch_size=64,
    lr=1e-2,
    ema_decay=0.9,
    max_steps=2,
    draws=2,
    device="cpu",
    random_state=0,
)


def checks():
    """scikit-learn's own, each in one of its variants."""
    found = {}
    for estimator, check in estimator_checks_generator(TINY()):
        found.setdefault(check.func.__name__, (estimator, check))
    return [pytest.param(*one, id=name) for name, one in found.items()]


@pytest.mark.parametrize(("estimator", "check"), checks())
def test_checks_of_scikit_learn(estimator, check):
    if check.func.__name__ == "check_classifiers_train":  # to an accuracy
        estimator = clone(estimator).set_params(max_steps=100, draws=16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


@pytest.fixture(scope="module")
def digits():
    """Images of zeros and ones (n, 8, 8) in 0 … 16, and what they are, as text."""
    pixels, known = load_digits(n_class=2, return_X_y=True)
    return pixels.reshape(-1, 8, 8)[:160], np.array(["zero", "one"])[known][:160]


@pytest.fixture(scope="module")
def fitted(digits):
    return TINY(**LEARNS).fit(*digits)


def test_cross_validation(digits):
    assert cross_val_score(TINY(**LEARNS), *digits, cv=2).mean() > 0.9


def test_probabilities(digits, fitted):
    X, y = digits
    p_NC = fitted.predict_proba(X[:20])
    assert p_NC.shape == (20, 2)
    np.testing.assert_allclose(p_NC.sum(1), 1)
    assert fitted.classes_.tolist() == ["one", "zero"]
    assert (fitted.predict(X[:20]) == fitted.classes_[p_NC.argmax(1)]).all()
    assert fitted.score(X, y) > 0.9
    hot = clone(fitted).set_params(temperature=100.0)
    hot.__dict__.update({name: value for name, value in vars(fitted).items() if name.endswith("_")})
    assert (hot.predict_proba(X[:20]).max(1) < p_NC.max(1)).all()


def test_a_row_is_decided_alone_and_by_a_copy_alike(digits, fitted):
    X = digits[0][:12]
    together = fitted.predict_proba(X)
    np.testing.assert_allclose(fitted.predict_proba(X[::-1])[::-1], together, atol=1e-4)
    np.testing.assert_allclose(pickle.loads(pickle.dumps(fitted)).predict_proba(X[3:5]), together[3:5], atol=1e-4)


def test_values_of_any_range_and_shape(digits):
    X, y = digits
    expected = TINY().fit(X, y).predict_proba(X[:8])
    for other, settings in ((X * 10 - 7, {}), (X.reshape(len(X), -1), {"image_shape": (8, 8)}), (X[..., None], {})):
        found = TINY(**settings).fit(other, y)
        assert found.shape_ == (1, 8, 8)
        np.testing.assert_allclose(found.predict_proba(other[:8]), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_shape": (3, 3)}, r"image_shape: \(3, 3\), expected \(H, W\) or \(H, W, C\) of 64 values"),
        ({"draws": 0}, "draws: 0, expected at least 1"),
        ({"lr": 1e20}, "lr: 1e\\+20 makes training diverge"),
        ({"ema_decay": 2.0}, "ema: decay 2.0"),
    ],
)
def test_what_cannot_be_trained(digits, settings, message):
    X, y = digits
    with pytest.raises(ValueError, match=message):
        TINY(**{"image_shape": (8, 8)} | settings).fit(X.reshape(len(X), -1), y)


def test_images_of_another_shape(digits, fitted):
    with pytest.raises(ValueError, match=r"\(1, 8, 4\), expected \(1, 8, 8\)"):
        fitted.predict(digits[0][:, :, :4])
