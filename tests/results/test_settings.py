import pytest

from lightning_diffclf.errors import UserError
from lightning_diffclf.results.settings import Settings

NAMES = [f"a class with a name, number {c}" for c in range(1000)]


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        ({"size": 8, "loss": "l2"}, {"size": 16, "loss": "l2"}, "size: 8 there, 16 here"),
        ({"x": [1, 2]}, {"x": [1, 3, 4]}, "x: [1, 2] there, [1, 3, 4] here"),
        ({"x": NAMES}, {"x": [*NAMES[:7], "a dog", *NAMES[8:]]}, f"x[7]: {NAMES[7]!r} there, 'a dog' here"),
        ({"x": NAMES}, {"x": NAMES[::-1]}, f"x[0]: {NAMES[0]!r} there, {NAMES[-1]!r} here; x: 999 more of 1,000"),
        ({"x": NAMES}, {"x": NAMES[1:]}, "x: 1,000 values there, 999 here"),
        ({"x": [{"of": NAMES}]}, {"x": ({"of": (*NAMES[:-1], 1)},)}, f"x[0].of[999]: {NAMES[-1]!r} there, 1 here"),
        ({"x": [1.0] * 50}, {"x": [1] * 50}, "x[0]: 1.0 there, 1 here; x: 49 more of 50"),
        ({"x": "ab" * 100}, {"x": None}, f"x: '{'ab' * 39}… there, None here"),
    ],
)  # fmt: skip
def test_what_differs_is_said_in_short(there, here, message):
    with pytest.raises(UserError) as error:
        Settings(here).check_same(Settings(there), "the run")
    assert str(error.value) == f"settings: the run was made with other ones ({message})"
