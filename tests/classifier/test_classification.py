"""What the decision on one image says in plain words: names and probabilities."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import softmax

from lightning_diffclf import (
    Candidates,
    DiffusionClassifier,
    Draws,
    Elimination,
    LikelihoodRatio,
    PairedTest,
    Posterior,
    Stages,
)
from lightning_diffclf.classifier.posterior import class_differences
from tests.classifier.toys import DropOneEachDraw, Toy, some_images


class DropTheFirst(Elimination):
    """Drops whom it likes to see go: candidate 0, after two draws."""

    needs = "scores"

    def __repr__(self):
        return "DropTheFirst()"

    def start(self, num_candidates):
        return None

    def next_stop(self, done, total):
        return 2 if done == 0 else total

    def survivors(self, state, current):
        return (current.active_A != 0) | (len(current.active_A) == 1)


RULES = [None, Stages((2, 8), (3, 1)), PairedTest(0.2), LikelihoodRatio(0.2), DropOneEachDraw(), DropTheFirst()]


def prompts(classes=(4, 1, 4, 0, 1, 1), class_names=None):
    denoiser = Toy(6)
    denoiser.candidates = Candidates([f"a {letter}" for letter in "abcdef"], classes, class_names)
    return denoiser


def results_of(denoiser, images=40, **settings):
    return DiffusionClassifier(denoiser, Draws(8), **settings)(some_images(images))


@pytest.mark.parametrize("ensemble", ["best", "mean"])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_nothing_is_likelier_than_the_prediction(rule, ensemble):
    """A softmax of scores is not so: they are means over different draws, once candidates are dropped."""
    results = results_of(prompts(), elimination=rule, ensemble=ensemble)
    for result in results:
        classes_K = torch.tensor(result.candidates.classes)[result.candidates_K]
        p_K = result.probabilities_K
        assert p_K.max() == p_K[classes_K == result.prediction].min()
        assert result.top(1)[0][0] == result.candidates.class_names[result.prediction]
        of_class = {c: float(p_K[classes_K == c].mean()) for c in set(classes_K.tolist())}
        assert sum(of_class.values()) == pytest.approx(1)
        assert dict(result.top(9)) == pytest.approx({result.candidates.class_names[c]: p for c, p in of_class.items()})
        likely = [p for _, p in result.top(9)]
        assert likely == sorted(likely, reverse=True)


def test_scores_after_elimination_would_mislead():
    results = results_of(Toy(6), elimination=DropOneEachDraw())
    assert any(result.scores_K.argmin() != result.prediction for result in results)


def test_they_are_those_of_the_differences():
    """Equation 6 of Li et al. 2023, over what the metrics are made of as well."""
    recipe = {"elimination": PairedTest(0.2), "reduction": "mean", "temperature": 0.01}
    for result in results_of(Toy(6), **recipe):
        expected = softmax(-result.differences_K.numpy() / 0.01)
        np.testing.assert_allclose(result.probabilities_K, expected, rtol=1e-9)
        own = replace(result, posterior=Posterior("sum", 3.0)).probabilities_K
        np.testing.assert_allclose(own, softmax(-result.differences_K.numpy() * result.dims / 3), rtol=1e-9)
        in_class = class_differences(result.differences_K[None], torch.arange(6)[None], 6)
        torch.testing.assert_close(result.posterior(in_class, result.dims)[0], result.probabilities_K)


def test_names_are_those_in_play():
    classifier = DiffusionClassifier(prompts(class_names=list("vwxyz")), Draws(4))
    [result] = classifier(some_images(1), candidates=[5, 0, 3])
    assert result.names == ["a f", "a a", "a d"]
    assert {name for name, _ in result.top()} == {"w", "z", "v"}  # classes 1, 4 and 0
    assert len(result.top(2)) == 2
    with pytest.raises(ValueError, match="top: 0, expected at least 1"):
        result.top(0)


def test_broken_candidates_have_no_probability():
    denoiser = Toy(4)
    with torch.no_grad():
        denoiser.table[1] = torch.nan
    with pytest.warns(RuntimeWarning, match="NaN or infinity"):
        [result] = results_of(denoiser, 1)
    assert result.probabilities_K[1] == 0
    assert result.top()[-1] == ("c1", 0)
    with torch.no_grad():
        denoiser.table[:] = torch.nan
    with pytest.warns(RuntimeWarning, match="NaN or infinity"):
        [hopeless] = results_of(denoiser, 1)
    assert (hopeless.prediction, hopeless.probabilities_K.tolist()) == (None, [0.25] * 4)


def test_the_former_name_of_the_prediction_warns():
    [result] = results_of(Toy(3), 1)
    with pytest.warns(FutureWarning, match="now called prediction"):
        assert result.label == result.prediction
