"""The rows of the evaluation's table: who is sampled, by which sampler, under which name."""

from workflows.config.schema import load_config
from workflows.stages.evaluate import rows_of

GUIDED = ["teacher.label_dropout=0.1", "distill.guidance=[0,2]", "distill.k=[1,2,4]", "evaluate.guidance=[1,3]"]
OWN = "distill.overrides={1: {eta: 0.5}, 2: {transition: unconditional}}"


def test_a_row_names_the_sampler_that_was_taken():
    rows = rows_of(load_config("digits", [*GUIDED, OWN]), "teacher", {k: f"student {k}" for k in (1, 2, 4)})
    students = {(row.k, row.label): row.shown for row in rows if row.who == "student"}
    assert students == {
        (1, "ancestral"): "ancestral, eta 0.5",
        (2, "ancestral"): "renoise",
        (4, "ancestral"): "ancestral",
        (1, "ancestral, guidance 1"): "ancestral, eta 0.5, guidance 1",
        (2, "ancestral, guidance 1"): "renoise, guidance 1",
        (4, "ancestral, guidance 1"): "ancestral, guidance 1",
    }
    teachers = {row.shown for row in rows if row.who == "teacher"}
    assert teachers == {
        f"{sampler}{w}" for sampler in ("ancestral", "ddim") for w in ("", ", guidance 1", ", guidance 3")
    }
    assert len({row.name for row in rows}) == len(rows)
