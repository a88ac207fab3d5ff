"""The rows of the evaluation's table: which model is sampled, by which sampler, under which name."""

from workflows.config.assembly import rounds_of, schedule_of
from workflows.config.loading import load_config
from workflows.stages.evaluate import rows_of

GUIDED = ["teacher.label_dropout=0.1", "distill.guidance=[0,2]", "distill.k=[1,2,4]", "evaluate.guidance=[1,3]"]
OWN = "distill.overrides={1: {eta: 0.5}, 2: {transition: unconditional}}"


def test_a_row_names_its_sampler_and_options():
    config = load_config("digits", [*GUIDED, OWN])
    samplers = {k: one.method.sampler(k) for one in rounds_of(config.distill, schedule_of(config)) for k in one.ks}
    rows = rows_of(config, "teacher", {k: f"student {k}" for k in (1, 2, 4)}, samplers)
    students = {(row.k, bool(row.options)): row.label for row in rows if row.who == "student"}
    assert students == {
        (1, False): "ancestral, eta 0.5",
        (2, False): "renoise",
        (4, False): "ancestral",
        (1, True): "ancestral, eta 0.5, guidance 1",
        (2, True): "renoise, guidance 1",
        (4, True): "ancestral, guidance 1",
    }
    teachers = {row.label for row in rows if row.who == "teacher"}
    assert teachers == {
        f"{sampler}{w}" for sampler in ("ancestral", "ddim") for w in ("", ", guidance 1", ", guidance 3")
    }
    assert len({row.name for row in rows}) == len(rows)
