import numpy as np
import pyarrow.parquet as pq
import pytest

from lightning_diffclf.commands import main
from lightning_diffclf.errors import UserError
from lightning_diffclf.files import read_json
from lightning_diffclf.results import attacks, certificates, trials
from lightning_diffclf.results.attacks import AttackedImage
from lightning_diffclf.results.certificates import CertifiedImage
from lightning_diffclf.results.conformal import CalibrationRun
from lightning_diffclf.results.evaluation import Evaluation
from lightning_diffclf.results.predictions import to_table
from lightning_diffclf.results.settings import Settings
from lightning_diffclf.results.statistics import wilson
from lightning_diffclf.results.store import Store, claim, finish, merge
from lightning_diffclf.results.stored import read_table, scan

# label, decided by two seeds without attack, and with it
IMAGES = [
    (0, (0, 0), (0, 0)),  # robust
    (1, (1, 1), (1, 2)),  # fooled under one seed
    (2, (2, 0), (2, 2)),  # wrong without attack under one seed: neither right nor robust
    (3, (3, 3), (0, 1)),  # fooled under both
    (1, (0, 0), (1, 1)),  # wrong without attack; what it became does not count
]


def attacked(number: int) -> AttackedImage:
    label, clean, found = IMAGES[number]
    moved = 0.1 * number
    return AttackedImage(str(number), label, np.array(clean), np.array(found), 2.0, -1.0, moved, 7.0, 0.5, 0)


def test_the_worst_seed_counts():
    rows = [attacked(number) for number in range(5)]
    tables = [to_table(rows[:2], attacks.SCHEMA), to_table(rows[2:], attacks.SCHEMA)]
    found = attacks.numbers(tables)
    for name, right in (("accuracy", 3), ("robust_accuracy", 1)):
        assert (found[name], found[f"{name}_low"], found[f"{name}_high"]) == wilson(right, 5)
    assert found["robust_accuracy_of_a_seed"] == pytest.approx((2 + 1 + 1) / 10)  # of images 0, 1 and 2
    assert found["distance_of_fooled"] == pytest.approx((0.1 + 0.3) / 2)  # of images 1 and 3
    assert (found["images"], found["seeds"], found["queries_per_image"], found["seconds"]) == (5, 2, 7.0, 2.5)
    of_one_seed = attacks.numbers([to_table([attacked(0)], attacks.SCHEMA)])
    assert "distance_of_fooled" not in of_one_seed


def test_certified_accuracy_is_of_right_answers_with_that_radius():
    rows = [
        CertifiedImage("a", 1, 1, 0.3, 99, 1.0, 0),
        CertifiedImage("b", 1, 2, 0.9, 99, 1.0, 0),  # certainly wrong
        CertifiedImage("c", 1, None, 0.0, 40, 1.0, 0),
        CertifiedImage("d", 0, 0, 0.1, 60, 1.0, 0),
    ]
    found = certificates.numbers([to_table(rows, certificates.SCHEMA)], [0.0, 0.1, 0.2, 0.5])
    expected = [(r, *wilson(right, 4)) for r, right in ((0.0, 2), (0.1, 2), (0.2, 1), (0.5, 0))]
    assert [tuple(row.values()) for row in found["certified"]] == expected
    assert (found["answered"], found["images"], found["seconds"]) == (0.75, 4, 4.0)
    assert found["median_radius"] == pytest.approx(0.05)  # of 0.3, 0, 0, 0.1: wrong ones have none


@pytest.fixture
def run(tmp_path):
    """An attack that was killed after three images, and gone on with."""
    settings = Settings({"kind": "attack", "attack": {"eps": 0.1}}, {"summary": {"title": "an attack", "calls": 40}})
    folder = claim(tmp_path / "run", settings)
    store = Store(folder, settings, flush_every=1)
    for number in (4, 1, 0):
        store.add(attacked(number))
    again = Store(claim(folder, settings), settings)
    assert again.finished == {"0", "1", "4"}
    again.add(attacked(2))
    again.flush()
    return folder, settings


def test_rows_are_stored_as_those_of_evaluations(run):
    folder, settings = run
    assert finish(folder, settings) == 4
    assert not (folder / "parts").exists()
    stored = read_table(folder)
    assert stored["id"].to_pylist() == ["0", "1", "2", "4"]
    assert stored["attacked_S"].to_pylist() == [list(IMAGES[number][2]) for number in (0, 1, 2, 4)]
    assert attacks.numbers(scan(folder)) == attacks.numbers([stored])
    whole = folder / "predictions.parquet"
    assert pq.read_table(whole).num_rows == 4
    damaged = bytearray(whole.read_bytes())
    damaged[len(damaged) // 3] ^= 1
    whole.write_bytes(bytes(damaged))
    with pytest.raises(UserError, match="it is damaged: its checksum"):
        read_table(folder)


def test_runs_are_merged_and_say_what_they_come_to(run, tmp_path, capsys):
    folder, settings = run
    main(["merge", str(folder), "--out", str(tmp_path / "whole")])
    printed = capsys.readouterr().out
    assert "an attack" in printed
    assert "7.0 an image, of 40 network calls each" in printed
    found = read_json(tmp_path / "whole" / "metrics.json")
    assert found["metrics"] == attacks.numbers(scan(folder))
    assert found["settings"]["attack"] == {"eps": 0.1}
    evaluation = claim(tmp_path / "evaluation", Settings({}))
    with pytest.raises(UserError, match=r"^settings: .* of the kind 'evaluation', expected 'attack'$"):
        merge([folder, evaluation], tmp_path / "mixed")
    untold = Settings(settings.identity)
    with pytest.raises(UserError, match=r"settings\.json of the kind 'attack' does not say 'title'"):
        trials.to_table(untold, found["metrics"])


def test_other_settings_and_other_readers_are_refused(run, tmp_path):
    folder, _ = run
    with pytest.raises(UserError, match=r"attack.eps: 0.1 there, 0.2 here\); give another folder"):
        claim(folder, Settings({"kind": "attack", "attack": {"eps": 0.2}}))
    for read in (
        lambda: Evaluation.read(folder),
        lambda: CalibrationRun.read(folder, 0.9),
    ):
        with pytest.raises(UserError, match="holds results of the kind 'attack', expected an evaluation"):
            read()
    with pytest.raises(UserError, match="of the kind 'seance', expected one of evaluation, attack, certification"):
        Store(tmp_path / "other", Settings({"kind": "seance"})).add(attacked(0))
