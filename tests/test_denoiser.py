import pytest

from lightning_diffclf import Candidates, ClassConditionalDiT, ConditionalDenoiser, NoiseSchedule


class Minimal:
    schedule, candidates = NoiseSchedule.linear(), Candidates(["a"])

    def encode(self, images): ...


def test_four_members_make_a_denoiser():
    assert not isinstance(Minimal(), ConditionalDenoiser)
    Minimal.predict = lambda self, x_t, t, candidate: x_t
    assert isinstance(Minimal(), ConditionalDenoiser)
    module = ClassConditionalDiT(input_size=4, hidden_size=8, depth=1, num_heads=1, num_classes=3)
    assert isinstance(module, ConditionalDenoiser)
    assert module.candidates.names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "none given"),
        ((["a", "b"], [0]), "2 names but 1 class"),
        ((["a"], [-1]), "class index -1"),
    ],
)
def test_bad_candidates(arguments, message):
    with pytest.raises(ValueError, match=message):
        Candidates(*arguments)
