"""Reference statistics: kept whole, refused where they do not fit, and measured against."""

import json
from dataclasses import replace
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jobs import NETWORK, job_of, noise, write_data
from oracles import together
from safetensors.torch import save_file

from mmdistill_core.artifact import save_extractor
from mmdistill_core.images import centred
from mmdistill_core.metrics.frechet import frechet_distance, moments
from mmdistill_core.metrics.statistics import Statistics
from mmdistill_core.networks.inception import Inception
from mmdistill_core.networks.pixels import Pixels
from workflows.config.loading import load_config
from workflows.dataset import reference
from workflows.dataset.extractors import make_extractor, wanted_in
from workflows.dataset.reference import (
    ABOUT,
    Reference,
    build_reference,
    check_inputs,
    check_reference,
    load_reference,
    save_reference,
)
from workflows.dataset.shards import Arrays, Rows, manifest_of, read_shards, save_shard
from workflows.errors import UserError
from workflows.stages.evaluate import (
    CHUNK,
    Space,
    _comparison,
    measure,
    measure_spaces,
    measures_in,
    sample_statistics,
    samples_per_task,
)

ABOUT_PIXELS = {
    "data": "d", "resolution": [1, 4, 4], "preprocessing": "whole; none", "extractor": "pixels", "weights": "w",
    "rows": "all", "count": 30,
}  # fmt: skip

ALL = ["data.reference=all"]


def data_set(root, values, rows=40):
    """(folder, manifest) of shards of these values."""
    made = []
    for start in range(0, len(values), rows):
        part = values[start : start + rows]
        zeros = np.zeros(len(part), int)
        made.append(
            save_shard(root, f"{start}.parquet", Rows(part, zeros, zeros > 0, list(map(str, zeros))), "float32")
        )
    return str(root), manifest_of(made, source="test", shape=values.shape[1:], encoding="float32", num_classes=0)


def built(folder, extractor, n=30, near=20, **about):
    save_extractor(folder / "extractor", extractor, provenance={})
    reference = build_reference(
        *data_set(folder / "data", noise(n), rows=7),
        "all",
        extractor=str(folder / "extractor"),
        near=near,
        seed=0,
        fingerprint=ABOUT_PIXELS | {"count": n} | about,
        cpus=2,
        tick=lambda _: None,
    )
    save_reference(folder / "statistics" / "all", reference)
    return reference


@pytest.fixture
def prepared(tmp_path, ray_cluster):
    """(the folder of a stage `prepare`, its result)."""
    return tmp_path, reported(built(tmp_path / "reporting" / "pixels", Pixels()).fingerprint)


def reported(fingerprint):
    """A result of the stage `prepare`."""
    statistics = {"all": {"fingerprint": fingerprint}}
    return {"reporting": [{"kind": "pixels", "place": "reporting/pixels", "statistics": statistics}]}


@pytest.mark.ray
@pytest.mark.parametrize("at_hand", [0, reference.AT_HAND])
def test_statistics_by_tasks_or_at_once_are_those_of_all_images_and_are_kept(
    tmp_path, ray_cluster, monkeypatch, at_hand
):
    by_tasks, spread = [], reference._spread
    monkeypatch.setattr(reference, "AT_HAND", at_hand)
    monkeypatch.setattr(reference, "_spread", lambda *how, **at_once: by_tasks.append(1) or spread(*how, **at_once))
    threads = torch.get_num_threads()
    built(tmp_path, Pixels())
    assert bool(by_tasks) == (at_hand == 0)
    assert torch.get_num_threads() == threads
    back = load_reference(tmp_path / "statistics" / "all")
    whole = moments(torch.from_numpy(noise(30)).flatten(1))
    assert back.statistics.count == 30
    torch.testing.assert_close(back.statistics.features.covariance, whole.covariance, atol=1e-10, rtol=0)
    assert back.fingerprint == ABOUT_PIXELS
    rows = {tuple(row) for row in noise(30).reshape(30, -1).tolist()}
    near = [tuple(row) for row in back.statistics.near.tolist()]
    assert len(set(near)) == 20
    assert set(near) <= rows
    assert back.floor > 0


@pytest.mark.ray
def test_its_own_statistics_must_agree_in_everything(prepared):
    folder, result = prepared
    config = load_config("digits", ALL)
    assert check_reference(config, str(folder), result) == folder / "reporting/pixels/statistics/all"
    for field, other in (("data", "e"), ("count", 31), ("resolution", [3, 4, 4]), ("extractor", "inception")):
        with pytest.raises(UserError) as caught:
            check_reference(config, str(folder), reported(ABOUT_PIXELS | {field: other}))
        assert f"{field} {ABOUT_PIXELS[field]!r} where this run has {other!r}" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.ray
def test_the_users_statistics_may_be_of_other_data_and_counts_but_not_of_other_features(prepared):
    named = prepared[0] / "reporting/pixels/statistics/all"
    config = load_config("digits", [*ALL, "data.reporting=[pixels,random]", f"evaluate.reference={named}"])
    check_inputs(config)
    for field, other in (("data", "e"), ("count", 31), ("rows", "holdout")):
        assert check_reference(config, "elsewhere", reported(ABOUT_PIXELS | {field: other})) == named
    for field, other in (("resolution", [1, 8, 8]), ("preprocessing", "cropped; none"), ("weights", "v")):
        with pytest.raises(UserError, match=f"are of {field} "):
            check_reference(config, "elsewhere", reported(ABOUT_PIXELS | {field: other}))
    with pytest.raises(UserError, match="come from extractor 'pixels', the main ones of this run from 'classifier'"):
        check_inputs(load_config("digits", [f"evaluate.reference={named}"]))


@pytest.mark.ray
def test_a_reference_with_fewer_features_than_neighbours_is_refused(prepared):
    folder, result = prepared
    check_reference(load_config("digits", [*ALL, "evaluate.neighbours=19"]), str(folder), result)
    with pytest.raises(UserError, match="neighbours: 20 is too many for the 20 features"):
        check_reference(load_config("digits", [*ALL, "evaluate.neighbours=20"]), str(folder), result)


@pytest.mark.ray
@pytest.mark.parametrize("damage", ["gone", "no json", "other format", "no tensors"])
def test_what_is_not_a_folder_of_statistics_is_refused(prepared, damage):
    folder = prepared[0] / "reporting/pixels/statistics/all"
    about = folder / ABOUT
    if damage == "gone":
        about.unlink()
    elif damage == "no json":
        about.write_text("[1")
    elif damage == "other format":
        about.write_text(json.dumps(json.loads(about.read_text()) | {"format": 99}))
    else:
        (folder / "statistics.safetensors").unlink()
    with pytest.raises(UserError, match="holds no statistics of format 1"):
        load_reference(folder)


def space(count, dims, *, suffix="", rows=("all",)):
    features = torch.randn(count, dims, generator=torch.Generator().manual_seed(0))
    about = Reference(Statistics(moments(features), None, features, None, None), ABOUT_PIXELS, 0.1)
    return Space("pixels", "nowhere", suffix, dict.fromkeys(rows, about))


def test_counts_that_differ_are_shown_and_a_singular_covariance_is_warned_of():
    def against(samples, count, dims=16):
        config, made = load_config("digits", [f"evaluate.samples={samples}"]), {"kind": "pixels", "accuracy": None}
        result = {
            "fingerprint": "other",
            "choosing": {"kind": "random"},
            "reporting": [made | {"weights": "w", "training_images": {}}],
        }
        return _comparison(config, [space(count, dims)], SimpleNamespace(result=result))

    fine = against(10_000, 50_000)
    assert fine["counts"] == "10,000 samples against 50,000 images"
    assert fine["warnings"] == []
    assert fine["floor_of"] == "half the data against the other half"
    assert not fine["reference"]["own_data"]
    few = against(16, 15)["warnings"]
    assert [text.split(" are")[0] for text in few] == ["16 samples", "15 images of the reference"]
    assert "singular" in few[0]


def test_a_task_draws_as_many_samples_as_its_moments_are_wide():
    assert samples_per_task([space(2, 32), space(2, 64)]) == CHUNK
    assert samples_per_task([space(2, 1100), space(2, 32)]) == 2 * CHUNK


def test_every_space_and_all_rows_are_measured_by_names_of_their_own():
    """Against further rows, the Frechet distance alone: of samples that are these rows, nothing."""
    spaces = [space(40, 3, rows=("holdout", "all")), space(40, 2, suffix="_random", rows=("holdout", "all"))]
    fakes = [replace(s.main.statistics, near=s.main.statistics.near[:30]) for s in spaces]
    options, label = load_config("digits").evaluate, torch.full((40,), -1)
    values = measure_spaces([s.statistics for s in spaces], fakes, label, options, 0)
    own = ["frechet", "kid", "precision", "recall"]
    assert {*values} == {*own, "frechet_all", *(f"{name}_random" for name in own), "frechet_random_all"}
    assert {name for s in spaces for name in measures_in(s)} >= values.keys()
    assert all(values[name] == pytest.approx(0, abs=1e-6) for name in values if name.startswith("frechet"))


def test_held_out_rows_and_the_rest_share_nothing():
    held = np.array([True, False, False, True, False])
    arrays = Arrays(noise(5), np.arange(5), held)
    assert arrays.rows("all") is arrays
    assert arrays.rows("holdout").labels.tolist() == [0, 3]
    assert arrays.rows("rest").labels.tolist() == [1, 2, 4]
    assert np.array_equal(arrays.rows("rest").images, arrays.images[~held])


@pytest.mark.ray
def test_measures_in_inceptions_features(tmp_path, ray_cluster):
    """Weights from a file, statistics by Ray tasks, and every measure of a model's samples; random weights."""
    torch.manual_seed(0)
    save_file(Inception().state_dict(), tmp_path / "w.safetensors")
    config = load_config("digits", ["data.reporting=[inception]", f"data.extractor_weights={tmp_path}/w.safetensors"])
    check_inputs(config)
    _, [wanted] = wanted_in(config.data, shape=(1, 4, 4), num_classes=10)
    extractor, accuracy = make_extractor(wanted, "", SimpleNamespace(shape=(1, 4, 4), num_classes=10), tick=None)
    assert accuracy is None
    built(tmp_path, extractor, n=12, near=10)
    reference = load_reference(tmp_path / "statistics" / "all")
    assert reference.statistics.features.mean.shape == (2048,)

    class Model:
        network = SimpleNamespace(num_classes=0)

        def sample(self, n, **_):
            return torch.from_numpy(noise(n, seed=1))

    options = config.evaluate.model_copy(update={"inception_splits": 2})
    label = torch.full((10,), -1)
    values = measure(
        reference.statistics,
        *sample_statistics(Model(), [extractor], {"sampler": "ddim"}, 1, label, 0, 0, 8),
        label,
        options,
        0,
    )
    assert values.keys() == {"frechet", "kid", "precision", "recall", "inception_score"}
    assert values["inception_score"] >= 1
    assert np.isfinite(list(values.values())).all()


@pytest.mark.ray
def test_a_run_against_images_never_trained_on(runner):
    """Teacher and student leave out what is held out, and their weights are chosen by the rest. Few samples are warned of."""
    from workflows.dataset.manifest import read_manifest

    few = (
        "data.reference=holdout",
        "data.extractor=mixture",
        "data.reporting=[pixels]",
        "distill.k=[1]",
        "evaluate.samples=50",
        "evaluate.seeds=1",
    )
    summary = runner(*few, until="evaluate")
    folders = {p.name.rsplit("-", 1)[0]: p for p in (runner.workspace / "stages").iterdir()}
    count = read_manifest(folders["prepare"] / "data").count
    [chooses] = (folders["prepare"] / "choosing/statistics").iterdir()
    reported = {p.name: load_reference(p) for p in (folders["prepare"] / "reporting/pixels/statistics").iterdir()}
    assert (chooses.name, set(reported)) == ("rest", {"holdout", "all"})
    held = reported["holdout"].statistics.count
    assert held + load_reference(chooses).statistics.count == reported["all"].statistics.count == count
    table = json.loads((folders["evaluate"] / "table.json").read_text())
    assert table["reference"]["fingerprint"]["rows"] == "holdout"
    assert table["reference_count"] == held
    assert table["measures"] == ["frechet", "frechet_all", "kid", "precision", "recall"]
    assert (table["features"], table["chosen_by"]) == ("pixels", "mixture")
    assert [text.split(" are")[0] for text in table["warnings"]] == ["50 samples"]
    assert "50 samples are not more than the 64 dimensions" in runner.text
    assert summary["counts"] == f"50 samples against {held} images"
    root, manifest = folders["prepare"] / "data", read_manifest(folders["prepare"] / "data")
    rest, out = (read_shards(root, manifest, manifest.shards, which) for which in ("rest", "holdout"))
    shares = [np.bincount(rows.labels, minlength=10) / len(rows.labels) for rows in (rest, out)]
    pixels = [centred(torch.from_numpy(rows.images.copy())).flatten(1).double() for rows in (rest, out)]
    weight = torch.from_numpy((shares[1] / shares[0])[rest.labels])
    assert summary["floor_of"] == "the training images"
    assert summary["floor"] == pytest.approx(frechet_distance(moments(pixels[0], weight), moments(pixels[1])), rel=1e-6)
    assert summary["floors"]["frechet_all"] < summary["floor"], "most of all images are the training images"


@pytest.mark.ray
@pytest.mark.parametrize(("world", "count"), [(2, 550), (3, 550), (5, 550), (5, 8)])
def test_workers_share_a_validation_and_agree_on_its_score(world, count, tmp_path, ray_cluster):
    """Each draws its part, with the labels of its own; of 8 samples four workers draw two, and one has nothing to do."""
    from workflows.training.job import Validator, build_state

    save_extractor(tmp_path / "extractor", Pixels(), provenance={})
    real = build_reference(
        *data_set(tmp_path / "data", noise(90, size=8)), "all",
        extractor=str(tmp_path / "extractor"), near=20, seed=0, fingerprint=ABOUT_PIXELS, cpus=2,
        tick=lambda _: None,
    )  # fmt: skip
    save_reference(tmp_path / "statistics", real)
    samples = {"extractor": str(tmp_path / "extractor"), "reference": str(tmp_path / "statistics"), "samples": count}
    job, labels = job_of(tmp_path, validate=samples, network=NETWORK | {"num_classes": 2}), torch.arange(90) % 2

    def state():
        made = build_state(job)
        for parameter in made.networks["teacher_ema"].parameters():  # a new network's output is 0
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
        return made

    def scores(validator, state):
        """By the draw of the validations, and by others."""
        return [validator(state)["score"], fmean(validator.judge(state.networks["teacher_ema"]))]

    alone = scores(Validator(job, labels), state())
    assert alone[0] != pytest.approx(alone[1], rel=1e-6)
    assert alone[0] == pytest.approx(alone[1], rel=0.2)
    assert alone[0] != pytest.approx(Validator(job, 1 - labels)(state())["score"], rel=1e-3), "the labels matter"

    def on(rank, summed):
        return scores(Validator(job, labels, rank=rank, world=world, summed=summed), states[rank])

    states = [state() for _ in range(world)]
    rounding = 1e-8 if count > 500 else 1e-6  # of few samples the covariance is singular
    for found in together(world, on):
        assert found == pytest.approx(alone, rel=rounding)


@pytest.mark.ray
def test_a_collected_preconditioner_is_not_collected_again(tmp_path, ray_cluster):
    """A training that goes on has the one of before, from its checkpoint."""
    from mmdistill_core.artifact import DiffusionModel, build_denoiser, save_model
    from mmdistill_core.networks.dit import DiTConfig
    from workflows.cluster.session import Workers
    from workflows.training.crew import train
    from workflows.training.mailbox import Monitor
    from workflows.training.worker import set_up

    write_data(tmp_path)
    torch.manual_seed(0)
    teacher = build_denoiser(network=DiTConfig(**NETWORK), prediction="v", schedule={"name": "cosine"})
    for parameter in teacher.parameters():  # a new network's output is 0, and so are its gradients
        torch.nn.init.normal_(parameter, std=0.1)
    training = {"method": "denoising", "arguments": {"p_t": "uniform", "w_t": "v"}}
    save_model(tmp_path / "teacher", DiffusionModel(teacher, k=2, provenance={"training": training}))
    job = job_of(
        tmp_path, method="moment_matching", options={"student": {"lr": 1e-3}}, given={"teacher": str(tmp_path / "teacher")},
        arguments={"k": 2, "update": "instant", "ema": False, "preconditioner": "collected", "collect_batches": 3}, ks=(2,),
    )  # fmt: skip

    def first(config):
        from mmdistill_core.engine import fit

        t = set_up(config)
        fit(state=t.state, batches=t.batches, options=t.options, report=t.report, save=t.save)
        return {name: value.numpy() for name, value in t.state.networks["preconditioner"].state_dict().items()}

    def again(config):
        from mmdistill_core.engine import preparation

        def never(**_):
            raise AssertionError("collected again")

        with pytest.MonkeyPatch.context() as patch:  # its worker stays
            patch.setattr(preparation, "squared_gradients", never)
            t = set_up(config)
        assert t.state.n_images == 8
        return {name: value.numpy() for name, value in t.state.networks["preconditioner"].state_dict().items()}

    kept, found = (
        train(job, mailbox=Monitor().actor, workers=Workers.of(1), use_gpu=False, loop=loop) for loop in (first, again)
    )
    assert kept.keys() == found.keys()
    assert all(np.array_equal(kept[name], found[name]) for name in kept)
    assert any(value.std() > 0 for value in kept.values())


@pytest.mark.ray
def test_a_training_sees_its_rows_alone(tmp_path, ray_cluster):
    """What the loop of a worker is handed: the images not held out, and a validation against their statistics."""
    from workflows.dataset.shards import read_all
    from workflows.training.crew import train
    from workflows.training.worker import set_up

    write_data(tmp_path)
    rest = read_all(tmp_path / "data").rows("rest")
    assert 0 < len(rest.images) < 120

    def loop(config):
        return {"images": set_up(config).batches.x.numpy()}

    from workflows.cluster.session import Workers
    from workflows.training.mailbox import Monitor

    for rows, expected in (("rest", rest), ("all", read_all(tmp_path / "data"))):
        own = job_of(tmp_path, rows=rows, name=f"rows-{rows}")
        got = train(own, mailbox=Monitor().actor, workers=Workers.of(1), use_gpu=False, loop=loop)
        assert np.array_equal(got["images"], expected.images)
