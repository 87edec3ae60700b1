import pytest

from lightning_diffclf import Candidates, ClassConditionalDiT, ConditionalDenoiser, NoiseSchedule


def members() -> dict:
    return {
        "schedule": NoiseSchedule.linear(),
        "candidates": Candidates(["a"]),
        "encode": lambda self, images: images,
        "predict": lambda self, x_t, t, candidate: x_t,
    }


def test_four_members_make_a_denoiser():
    assert isinstance(type("Plain", (), members())(), ConditionalDenoiser)
    module = ClassConditionalDiT(input_size=4, hidden_size=8, depth=1, num_heads=1, num_classes=3)
    assert isinstance(module, ConditionalDenoiser)
    assert module.candidates.names == ("0", "1", "2")


@pytest.mark.parametrize("lacking", list(members()))
def test_three_members_do_not(lacking):
    three = {name: member for name, member in members().items() if name != lacking}
    assert not isinstance(type("Plain", (), three)(), ConditionalDenoiser)


def test_candidates_are_their_own_classes_unless_told_otherwise():
    assert Candidates(["cat", "dog", "cow"]).classes == (0, 1, 2)
    prompts = Candidates(["a cat", "some cat", "a dog", 7], [4, 4, 0, 2])
    assert prompts.names == ("a cat", "some cat", "a dog", "7")
    assert (len(prompts), prompts.classes, prompts.num_classes) == (4, (4, 4, 0, 2), 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "candidates: none given"),
        ((["a", "b"], [0]), "2 names but 1 class"),
        ((["a"], [0, 1]), "1 names but 2 class"),
        ((["a"], [-1]), "class index -1"),
    ],
)
def test_bad_candidates(arguments, message):
    with pytest.raises(ValueError, match=message):
        Candidates(*arguments)
