"""What is said of a teacher from elsewhere that can't be read."""

import pytest

from workflows.config.places import names_code
from workflows.config.schema import Reading
from workflows.errors import UserError
from workflows.ingest.teachers import identity_of_source, is_foreign, read_teacher


def test_a_function_is_told_from_a_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("package:function", "a.b_c.d:e"):
        assert names_code(place)
        assert is_foreign(place)
    (tmp_path / "a:b").mkdir()
    for place in ("a:b", "models:/name/1", "s3://bucket/x", "folder/x", "C:\\x", "name"):
        assert not names_code(place)


def test_another_code_or_another_reading_is_another_teacher(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "nets.py").write_text("a = 1")
    plain = Reading(prediction="v", schedule={"name": "cosine"})
    first = identity_of_source("nets:a", plain)
    assert identity_of_source("nets:a", Reading(prediction="x", schedule={"name": "cosine"})) != first
    (tmp_path / "nets.py").write_text("a = 2")
    assert identity_of_source("nets:a", plain) != first


@pytest.mark.parametrize(
    ("place", "read", "said"),
    [
        ("nowhere.at:all", {}, "there is no module 'nowhere.at' on PYTHONPATH"),
        ("json:loads", {}, "a function says nothing of its network: teacher.read needs prediction and schedule"),
        ("json:loads", {"prediction": "x"}, "teacher.read.schedule is needed beside the other"),
        ("json:loads", {"prediction": "x", "schedule": {"name": "cosine"}}, "annotated to return one"),
        (
            "json:loads",
            {"prediction": "x", "schedule": {"name": "cosmic"}},
            "schedule.name: 'cosmic' is not one of cosine",
        ),
        ("json:nothing", {"prediction": "x", "schedule": {"name": "cosine"}}, "has no attribute 'nothing'"),
    ],
)
def test_what_can_not_be_read_is_a_line(place, read, said):
    def use():
        identity_of_source(place, Reading(**read))
        read_teacher(place, Reading(**read), shape=(1, 8, 8), num_classes=0)

    with pytest.raises(UserError, match=said) as caught:
        use()
    assert "\n" not in str(caught.value)


def test_a_folder_without_any_model(tmp_path):
    with pytest.raises(UserError, match="is not a model folder"):
        identity_of_source(str(tmp_path), Reading())
