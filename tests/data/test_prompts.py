import pytest

from lightning_diffclf.data.prompts import TEMPLATES, from_csv, from_names


def test_every_template_with_every_name():
    found = from_names(["cat", "hot_dog"], ["a photo of a {}.", "a drawing of a {}."])
    assert found.prompts == [
        "a photo of a cat.",
        "a drawing of a cat.",
        "a photo of a hot dog.",
        "a drawing of a hot dog.",
    ]
    assert found.candidates.classes == (0, 0, 1, 1)
    assert from_names(["cat", "dog"]).candidates.names == ("cat", "dog")


def test_the_papers_templates():
    """Section 6.1 and the prompts of its code."""
    assert TEMPLATES["cifar10"].replace("{}", "frog") == "a blurry photo of a frog."
    assert TEMPLATES["food101"].replace("{}", "apple pie") == "a photo of apple pie, a type of food."
    assert TEMPLATES["aircraft"].replace("{}", "707-320") == "a photo of a 707-320, a type of aircraft."
    assert TEMPLATES["pets"].replace("{}", "pug dog") == "a photo of a pug dog, a type of pet."
    assert TEMPLATES["flowers102"].replace("{}", "pink primrose") == "a photo of a pink primrose, a type of flower."
    assert {TEMPLATES[name] for name in ("stl10", "imagenet", "objectnet")} == {"a photo of a {}."}


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], "{}", "labels: none given"),
        (["cat", " "], "{}", "labels: label 1 is empty"),
        (["cat", "dog", "cat"], "{}", "labels: 'cat' occurs twice, as 0 and 2"),
        (["hot dog", "hot_dog"], "{}", "labels: 'hot dog' occurs twice"),
        (["cat"], "a photo", "template: 'a photo', expected '{}' where the label goes"),
        (["cat"], [], "template: none given"),
    ],
)
def test_bad_labels_and_templates(names, templates, message):
    with pytest.raises(ValueError, match=message):
        from_names(names, templates)


def test_csv(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text('prompt,classname,classidx\n"a photo of a cat, alive",cat,1\na dog,dog,0\na drawn cat,cat,1\n')
    found = from_csv(path)
    assert found.prompts == ["a photo of a cat, alive", "a dog", "a drawn cat"]
    assert found.candidates.classes == (1, 0, 1)
    path.write_text("prompt,classname,classidx\na cat,cat,0\na dog,dog,1\n")
    assert from_csv(path).candidates.names == ("cat", "dog")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,classidx\na,0\n", r"lacks \['classname'\]"),
        ("", r"lacks \['prompt', 'classname', 'classidx'\]"),
        ("prompt,classname,classidx\n", "has no rows"),
        ("prompt,classname,classidx\na,b,x\n", "line 2: .* expected a prompt and a class index"),
        ("prompt,classname,classidx\na,b,0\nc,d,3\n", r"has no prompt for class 1 \(2 classes without one\)"),
    ],
)
def test_bad_csv(text, message, tmp_path):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        from_csv(tmp_path / "p.csv")
    with pytest.raises(FileNotFoundError, match="prompts: no file"):
        from_csv(tmp_path / "q.csv")
