"""The engine: resume, determinism, guards, averages, learning rates, batches."""

import copy
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from oracles import COSINE, Affine, gaussian_batch, together
from states import START, create_state, matching
from torch import nn
from trainings import MAKE, denoiser, make_batches, make_state, same, weights

from mmdistill_core.engine import (
    FitOptions,
    InMemoryBatches,
    NonFiniteError,
    OptimiserOptions,
    fit,
    train_step,
)
from mmdistill_core.engine.batches import share_of
from mmdistill_core.engine.checkpoint import load_checkpoint, save_checkpoint
from mmdistill_core.engine.fit import LogWindow
from mmdistill_core.engine.optim import Average
from mmdistill_core.engine.preparation import Finished, squared_gradients
from mmdistill_core.engine.step import PATIENCE, PhaseLog, _parts, parts_of
from mmdistill_core.methods import METHODS
from mmdistill_core.methods.base import Average as AverageOf
from mmdistill_core.methods.base import Batch, Losses, Method, New, Phase, Progress, Role
from mmdistill_core.methods.denoising import Denoising
from mmdistill_core.rng import derive_seed, generator


def test_every_method_is_tested():
    assert {name.split()[0] for name in MAKE} == set(METHODS)


@pytest.mark.parametrize("name", MAKE)
class TestEveryMethod:
    def run(self, state, until=None, **callbacks):
        reports = []

        class Cut(Exception):
            pass

        def save(s):
            if callbacks.get("save"):
                callbacks["save"](s)
            if until is not None and s.n_images >= until:
                raise Cut

        options = FitOptions(log_every=128, checkpoint_every=64, validate_every=256, seed=3)
        with suppress(Cut):
            fit(
                state=state,
                batches=make_batches(),
                options=options,
                report=reports.append,
                save=save,
                validate=lambda s: {"score": next(s.networks[s.best.role].parameters()).detach().sum().abs().item()},
            )
        return reports

    def test_resume_equals_an_uninterrupted_run_bit_for_bit(self, name, tmp_path):
        whole = make_state(MAKE[name]())
        self.run(whole)

        first = make_state(MAKE[name]())
        self.run(first, until=64 * 11, save=lambda s: save_checkpoint(tmp_path / "c", s.state_dict()))
        second = make_state(MAKE[name]())
        torch.manual_seed(999)
        second.load_state_dict(load_checkpoint(tmp_path / "c"))
        assert second.n_images == 64 * 11
        reports = self.run(second)
        assert same(weights(whole), weights(second))
        assert whole.best.score == second.best.score
        assert same(whole.best.weights, second.best.weights)
        assert whole.forwards == second.forwards
        for role, optimiser in whole.optimisers.items():
            for p, q in zip(
                optimiser.param_groups[0]["params"], second.optimisers[role].param_groups[0]["params"], strict=True
            ):
                assert torch.equal(optimiser.state[p]["exp_avg_sq"], second.optimisers[role].state[q]["exp_avg_sq"])
        assert reports[-1]["n_images"] == whole.total_images

    def test_frozen_stay_trained_move(self, name):
        state = make_state(MAKE[name]())
        before = weights(state)
        for _ in range(4):
            train_step(state=state, batches=make_batches(), seed=0)
        after = weights(state)
        for role in state.method.roles:
            names = [n for n in before if n.startswith(role.name + "/") and before[n].is_floating_point()]
            unchanged = [n for n in names if torch.equal(before[n], after[n])]
            if not role.trained and not isinstance(role.origin, AverageOf):
                assert unchanged == names
            else:
                assert not unchanged

    def test_a_seed_fixes_the_run(self, name):
        runs = []
        for seed in (0, 0, 1):
            state = make_state(MAKE[name]())
            for _ in range(3):
                train_step(state=state, batches=make_batches(), seed=seed)
            runs.append(weights(state))
        assert same(runs[0], runs[1])
        assert not same(runs[0], runs[2])

    def test_logs(self, name):
        reports = self.run(make_state(MAKE[name]()))
        for key in ("n_images", "images_per_second", "lr", "forwards", "skipped"):
            assert key in reports[-1]
        assert any(key.startswith("grad_norm/") for key in reports[-1])
        levels = [key for key in reports[-1] if "/level" in key]
        assert len(levels) >= 6
        assert reports[-1]["skipped"] == 0


def test_network_evaluations_are_counted():
    """joint: 3 forwards a sample for a pair of updates; alternating: 3 for each of the two."""
    counts = {}
    for update in ("joint", "alternating"):
        state = make_state(matching(schedule=COSINE, k=4, update=update))
        calls = 0

        def count(*_):
            nonlocal calls
            calls += 1

        for network in state.networks.values():
            network.register_forward_hook(count)
        for _ in range(2):
            train_step(state=state, batches=make_batches(), seed=0)
        assert state.forwards == calls * 64
        counts[update] = calls
    assert counts == {"joint": 6, "alternating": 6}


class TestNonFinite:
    def state(self):
        return create_state(
            method=Denoising(schedule=COSINE),
            given={"teacher": Affine(0.5, 0.0)},
            options=OptimiserOptions(lr=1e-2, warmup_images=0),
            global_batch=8,
            total_images=8 * 1000,
            best_role="teacher_ema",
        )

    def test_a_bad_step_is_skipped_and_counted(self):
        state = self.state()
        train_step(state=state, batches=lambda n: Batch(gaussian_batch(8, generator(n))), seed=0)
        before = copy.deepcopy(state.networks["teacher"].state_dict())
        train_step(state=state, batches=lambda n: Batch(torch.full((8, 1), float("nan"))), seed=0)
        assert (state.skipped, state.skipped_in_a_row) == (1, {"teacher": 1})
        assert all(torch.equal(v, before[k]) for k, v in state.networks["teacher"].state_dict().items())
        train_step(state=state, batches=lambda n: Batch(gaussian_batch(8, generator(n))), seed=0)
        assert (state.skipped, state.skipped_in_a_row) == (1, {"teacher": 0})
        assert not all(torch.equal(v, before[k]) for k, v in state.networks["teacher"].state_dict().items())

    def test_an_infinite_loss_with_finite_gradients_is_skipped_too(self):
        state = self.state()
        train_step(state=state, batches=lambda n: Batch(torch.full((8, 1), 1e30)), seed=0)
        assert state.skipped == 1

    def test_too_many_in_a_row_stop_the_run(self):
        state = self.state()
        bad = Batch(torch.full((8, 1), float("inf")))
        for _ in range(PATIENCE - 1):
            train_step(state=state, batches=lambda n: bad, seed=0)
        with pytest.raises(NonFiniteError, match=f"teacher was not finite in {PATIENCE} updates in a row"):
            train_step(state=state, batches=lambda n: bad, seed=0)
        assert state.skipped == PATIENCE

    def alternating(self):
        """A state whose student's gradient is nan, and whose auxiliary's is not."""
        state = make_state(matching(schedule=COSINE, k=1, update="alternating"), total=10**6, batch=4)
        for parameter in state.networks["student"].parameters():
            parameter.register_hook(lambda gradient: gradient * float("nan"))
        return state

    def steps(self, state, count):
        for _ in range(count):
            train_step(state=state, batches=make_batches(batch=4), seed=0)

    def test_the_good_steps_of_one_role_do_not_hide_the_bad_ones_of_another(self):
        state = self.alternating()
        self.steps(state, 2 * PATIENCE - 1)
        assert state.skipped_in_a_row == {"auxiliary": 0, "student": PATIENCE - 1}
        with pytest.raises(NonFiniteError, match=f"gradient of student was not finite in {PATIENCE} updates in a row"):
            self.steps(state, 1)

    def test_the_counts_go_with_the_checkpoint(self, tmp_path):
        state = self.alternating()
        self.steps(state, 8)
        save_checkpoint(tmp_path / "c", state.state_dict())
        again = self.alternating()
        again.load_state_dict(load_checkpoint(tmp_path / "c"))
        assert again.skipped_in_a_row == {"auxiliary": 0, "student": 4}
        older = load_checkpoint(tmp_path / "c")
        older["counters"]["skipped_in_a_row"] = 3  # one count for all roles
        again.load_state_dict(older)
        assert again.skipped_in_a_row == {"student": 3, "auxiliary": 3}


class TestBatches:
    def test_every_image_comes_once_an_epoch(self):
        source = InMemoryBatches(x=torch.arange(150.0)[:, None], label=None, global_batch=50, seed=0)
        for epoch in range(2):
            seen = torch.cat([source(epoch * 150 + i).x for i in (0, 50, 100)]).flatten()
            assert sorted(seen.tolist()) == list(range(150))
        assert not torch.equal(source(0).x, source(150).x)

    def test_a_batch_may_span_epochs(self):
        source = InMemoryBatches(x=torch.arange(10.0)[:, None], label=None, global_batch=8, seed=0)
        drawn = torch.cat([source(n).x for n in range(0, 40, 8)]).flatten()
        assert all(sorted(part.tolist()) == list(range(10)) for part in drawn.split(10))

    @pytest.mark.parametrize("world", [2, 3, 5])
    def test_workers_share_the_global_batch(self, world):
        whole = make_batches()(128)
        parts = [make_batches(rank=r, world=world)(128) for r in range(world)]
        assert torch.equal(torch.cat([p.x for p in parts]), whole.x)
        assert torch.equal(torch.cat([p.label for p in parts]), whole.label)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1

    def test_a_batch_of_less_than_an_image_each_is_refused(self):
        with pytest.raises(ValueError, match="less than an image for each of the 65 workers"):
            make_batches(world=65)


class TestOptimiser:
    def test_warm_up_and_linear_decay(self):
        options = OptimiserOptions(lr=1.0, warmup_images=100)
        rates = [options.lr_at(n_images=n, total=1000) for n in (0, 49, 99, 500, 1000)]
        assert rates == pytest.approx([0.01, 0.5 * 0.951, 0.901, 0.5, 0.0], abs=1e-9)
        assert OptimiserOptions(lr=1.0, warmup_images=0, decay="constant").lr_at(n_images=999, total=1000) == 1.0

    def test_defaults_are_the_papers(self):
        options = OptimiserOptions()
        adam = options.build(nn.Linear(1, 1)).param_groups[0]
        assert (adam["betas"], adam["eps"], options.clip_norm) == ((0.0, 0.99), 1e-12, 1.0)

    def test_average_forgets_by_half_in_its_half_life(self):
        network = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(network.weight)
        average = Average(network, half_life_images=800, ramp=1e9)
        average.follow(network, images=8, progress=Progress(1, 8, 10**6))
        nn.init.ones_(network.weight)
        for step in range(100):
            average.follow(network, images=8, progress=Progress(step, 16 + 8 * step, 10**6))
        assert average.module.weight.item() == pytest.approx(0.5, abs=1e-5)

    def test_the_ramp_is_a_share_of_the_images_seen(self):
        network = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(network.weight)
        average = Average(network, half_life_images=800, ramp=0.5)
        average.follow(network, images=8, progress=Progress(1, 8, 10**6))
        nn.init.ones_(network.weight)
        average.follow(network, images=20, progress=Progress(2, 40, 10**6))
        assert average.module.weight.item() == pytest.approx(0.5)
        average.follow(network, images=800, progress=Progress(3, 10**6, 10**6))
        assert average.module.weight.item() == pytest.approx(0.75)

    @pytest.mark.parametrize("phases", [1, 2, 5])
    def test_half_lives_count_the_images_of_all_phases_of_a_step(self, phases):
        """As progress does. 800 images after the weights jump, the average contains half of the jump."""
        state = create_state(
            method=InPhases(COSINE, count=phases),
            given={"teacher": Affine(0.0, 0.1)},
            options=OptimiserOptions(lr=0.0, warmup_images=0),
            global_batch=8,
            total_images=10**6,
            best_role="teacher_ema",
            ema_half_life_images=800,
            ema_ramp=1e9,
        )
        batch = Batch(gaussian_batch(8, generator(0)))
        train_step(state=state, batches=lambda n: batch, seed=0)
        state.networks["teacher"].slope.data.fill_(1.0)
        start = state.n_images
        while state.n_images < start + 800:
            train_step(state=state, batches=lambda n: batch, seed=0)
        assert state.n_images == start + 800
        assert state.networks["teacher_ema"].module.slope.item() == pytest.approx(0.5, abs=1e-4)


def test_given_networks_are_checked():
    with pytest.raises(ValueError, match="teacher"):
        create_state(
            method=Denoising(schedule=COSINE),
            given={},
            options=OptimiserOptions(),
            global_batch=1,
            total_images=1,
            best_role="teacher_ema",
        )


def test_seeds_are_apart():
    seeds = {derive_seed(a, b, c) for a in range(5) for b in range(5) for c in range(5)}
    assert len(seeds) == 125
    assert derive_seed(1, 23) != derive_seed(12, 3)


@dataclass(frozen=True)
class Square(Method):
    """A loss without randomness: |x_hat|^2. Its statistic is the mean of x."""

    statistic: bool = False
    name: ClassVar[str] = "square"
    result = "teacher"

    @property
    def roles(self):
        return (Role("teacher", New(), trained=True),)

    def phases(self, progress):
        given = (lambda nets, batch, rng, progress: {"mean": batch.x.mean()}) if self.statistic else None
        return (Phase(("teacher",), self._loss, statistic=given),)

    def _loss(self, nets, batch, rng, progress, statistic=None):
        loss = (nets["teacher"](batch.x, batch.x[:, 0]) - (statistic or {"mean": 0})["mean"]).square().mean(1)
        return Losses({"teacher": loss}, logs={"l": loss}, by_level={"l": loss}, logsnr=batch.x[:, 0], forwards=1)


@dataclass(frozen=True)
class InPhases(Square):
    """Several updates a step, each on its own batch, and an average."""

    count: int = 1
    result = "teacher_ema"

    @property
    def roles(self):
        return (*super().roles, Role("teacher_ema", AverageOf("teacher")))

    def phases(self, progress):
        return super().phases(progress) * self.count


class TestAccumulation:
    def step(self, micro_batch, statistic=False):
        state = create_state(
            method=Square(COSINE, statistic=statistic),
            given={"teacher": Affine(0.5, 0.1)},
            options=OptimiserOptions(lr=1e-3, warmup_images=0, clip_norm=1e9),
            global_batch=48,
            total_images=480,
            best_role="teacher",
            micro_batch=micro_batch,
        )
        entered = []

        @contextmanager
        def unsynced():
            entered.append(True)
            yield

        state.unsynced = unsynced
        batch = Batch(gaussian_batch(48, generator(0)), torch.arange(48))
        (log,) = train_step(state=state, batches=lambda n: batch, seed=0)
        return state, log, len(entered)

    @pytest.mark.parametrize("statistic", [False, True])
    @pytest.mark.parametrize("micro_batch", [1, 7, 16])
    def test_parts_of_a_batch_have_its_gradient(self, micro_batch, statistic):
        whole, in_parts = self.step(None, statistic), self.step(micro_batch, statistic)
        for a, b in zip(
            whole[0].networks["teacher"].parameters(), in_parts[0].networks["teacher"].parameters(), strict=True
        ):
            torch.testing.assert_close(a.grad, b.grad)
        images = 24 if statistic else 48
        assert in_parts[2] == -(-images // micro_batch) - 1  # all parts but the last exchange no gradients
        assert whole[2] == 0
        torch.testing.assert_close(whole[1].losses.by_level["l"].detach(), in_parts[1].losses.by_level["l"])
        assert torch.equal(whole[1].losses.logsnr, in_parts[1].losses.logsnr)
        assert whole[0].forwards == in_parts[0].forwards == images

    @pytest.mark.parametrize("micro_batch", [1, 2, 3, 16])
    @pytest.mark.parametrize("world", [2, 3, 5, 7])
    def test_all_workers_go_forward_as_often(self, world, micro_batch):
        """Each forward exchanges parameters if they are sharded."""
        shares = [share_of(128, rank=rank, world=world) for rank in range(world)]
        count = _parts(SimpleNamespace(micro_batch=micro_batch), 128 / world)
        parts = [parts_of(len(share), count) for share in shares]
        assert len({len(own) for own in parts}) == 1
        assert max(part.stop - part.start for own in parts for part in own) <= micro_batch + 1

    def test_labels_go_with_their_images(self):
        batch = Batch(torch.arange(10.0)[:, None], torch.arange(10))
        for at in (*parts_of(10, 3), slice(1, None, 2)):
            assert torch.equal(batch[at].x[:, 0].long(), batch[at].label)
        assert [len(Batch(batch.x)[at]) for at in parts_of(10, 3)] == [3, 3, 4]
        assert parts_of(2, 3) == [slice(0, 1), slice(1, 2)]


def test_logs_are_means_over_all_workers():
    """Three workers share a batch. All images of a noise level may be on one of them."""
    x = torch.linspace(-8, 9, 12)
    log = PhaseLog(
        Losses({"teacher": x}, logs={"l": 2 * x}, by_level={"l": x**2}, logsnr=x), {"teacher": x.norm()}, skipped=False
    )

    def of(part, summed):
        window = LogWindow()
        losses = Losses({"teacher": x[part]}, logs={"l": 2 * x[part]}, by_level={"l": x[part] ** 2}, logsnr=x[part])
        window.add(PhaseLog(losses, {"teacher": x.norm()}, skipped=False))
        return window.flush(lambda values: {name: summed(value) / 3 for name, value in values.items()})

    whole = LogWindow()
    whole.add(log)
    wanted = whole.flush(lambda values: values)
    assert wanted["l/level0"] == pytest.approx((x[x < -6] ** 2).mean().item())
    for found in together(3, lambda rank, summed: of(slice(4 * rank, 4 * rank + 4), summed)):
        assert found == pytest.approx(wanted)
    assert whole.flush(lambda values: values) == {}


def test_the_last_state_is_a_candidate_whatever_the_interval_and_after_a_stop(tmp_path):
    """24 steps, validated every 7: at 7, 14, 21 and 24."""

    def validated(state, stop_at=None):
        seen = []
        fit(
            state=state,
            batches=make_batches(),
            options=FitOptions(log_every=0, validate_every=64 * 7),
            report=lambda row: None,
            save=lambda s: None,
            validate=lambda s: seen.append(s.n_images // 64) or {"score": -float(s.n_images)},
            poll=lambda: "stop" if state.n_images == stop_at else "",
        )
        return seen

    whole, first = make_state(MAKE["denoising"]()), make_state(MAKE["denoising"]())
    assert validated(whole) == [7, 14, 21, 24]
    assert validated(first, stop_at=64 * 22) == [7, 14, 21]
    save_checkpoint(tmp_path / "c", first.state_dict())
    second = make_state(MAKE["denoising"]())
    second.load_state_dict(load_checkpoint(tmp_path / "c"))
    assert validated(second) == [24]
    assert whole.best.n_images == second.best.n_images == 64 * 24
    assert same(whole.best.weights, second.best.weights)


class TestFinalChoice:
    """At the end, new draws decide between the weights with the lowest score and the last weights."""

    def trained(self, scores, judge):
        """24 steps, validated every 8th with these scores; (the state, the last row)."""
        state, rows, scores = make_state(MAKE["denoising"]()), [], list(scores)
        fit(
            state=state,
            batches=make_batches(),
            options=FitOptions(log_every=0, validate_every=64 * 8),
            report=rows.append,
            validate=lambda s: {"score": scores.pop(0)},
            judge=judge,
        )
        return state, rows[-1]

    @pytest.mark.parametrize(
        ("kept", "last", "at"),
        [
            ([0.5], [0.4], 24),
            ([0.5], [0.5], 24),
            ([0.4], [0.5], 8),
            ([0.4], [float("nan")], 8),
            ([0.4, 0.5], [0.5, 0.6], 8),
            ([0.1, 0.5], [0.5, 0.4], 24),  # nearer in the mean, not on every draw
        ],
    )
    def test_the_kept_stay_if_better_on_every_draw(self, kept, last, at):
        judged = iter([kept, last])
        state, row = self.trained([0.1, 0.3, 0.2], lambda network: next(judged))
        assert state.best.n_images == row["best/n_images"] == 64 * at
        assert state.best.score == row["best/score"] == (0.2 if at == 24 else 0.1)
        assert row["judged/kept"] == sum(kept) / len(kept)
        assert same(state.best_network().state_dict(), state.best.weights)
        assert same(state.best.weights, state.networks["teacher_ema"].state_dict()) == (at == 24)

    def test_both_are_judged_as_they_are(self):
        seen = []

        def judge(network):
            seen.append(copy.deepcopy(network.state_dict()))
            return [float(len(seen))]

        state, _ = self.trained([0.1, 0.3, 0.2], judge)
        assert same(seen[0], state.best.weights)
        assert same(seen[1], state.networks["teacher_ema"].state_dict())

    def test_the_last_ones_that_are_the_kept_ones_are_not_judged(self):
        state, row = self.trained([0.3, 0.2, 0.1], None)
        again, judged = self.trained([0.3, 0.2, 0.1], lambda network: 1 / 0)
        assert same(state.best.weights, again.best.weights)
        assert "judged/kept" not in row | judged


class TestLogWindow:
    def rows(self, state, stop_at=None):
        """The rows that `fit` reports until the requested stop, without the values that depend on the clock."""
        rows = []
        fit(
            state=state,
            batches=make_batches(),
            options=FitOptions(log_every=64 * 6, checkpoint_every=64 * 4),
            report=rows.append,
            save=lambda s: None,
            poll=lambda: "stop" if state.n_images == stop_at else "",
        )
        return [{name: v for name, v in row.items() if name != "images_per_second"} for row in rows]

    @pytest.mark.parametrize("name", MAKE)
    def test_it_goes_on_after_a_stop_as_if_there_had_been_none(self, name, tmp_path):
        uninterrupted = self.rows(make_state(MAKE[name]()))
        first = make_state(MAKE[name]())
        before = self.rows(first, stop_at=64 * 9)
        save_checkpoint(tmp_path / "c", first.state_dict())
        second = make_state(MAKE[name]())
        second.load_state_dict(load_checkpoint(tmp_path / "c"))
        assert (len(before), len(uninterrupted)) == (1, 4)
        assert before + self.rows(second) == uninterrupted

    def test_the_rate_is_of_the_whole_window(self):
        state = make_state(MAKE["denoising"]())
        self.rows(state, stop_at=64 * 9)
        assert state.window["since"] == 64 * 6
        assert state.window["seconds"] > 0

    def test_a_checkpoint_of_before_starts_a_new_one(self, tmp_path):
        state = make_state(MAKE["denoising"]())
        self.rows(state, stop_at=64 * 9)
        older = {name: value for name, value in state.state_dict().items() if name != "window"}
        again = make_state(MAKE["denoising"]())
        again.load_state_dict(older)
        assert [row["n_images"] for row in self.rows(again)] == [64 * 12, 64 * 18, 64 * 24]

    def test_what_several_workers_added_goes_on_with_each_of_them(self):
        """A checkpoint holds the mean over the workers. Any number of workers that continue from it flush the mean of all."""

        def log(x):
            return PhaseLog(Losses({"teacher": x}, by_level={"l": x**2}, logsnr=x), {}, skipped=False)

        first, second = torch.linspace(-8, 9, 24).view(2, 12)
        whole = LogWindow()
        whole.add(log(first))
        whole.add(log(second))
        wanted = whole.flush(lambda values: values)

        def of(rank, summed):
            def averaged(values):
                return {name: summed(value) / 2 for name, value in values.items()}

            own, window = slice(6 * rank, 6 * rank + 6), LogWindow()
            window.add(log(first[own]))
            window = LogWindow(window.partial(averaged))
            window.add(log(second[own]))
            return window.flush(averaged)

        for found in together(2, of):
            assert found == pytest.approx(wanted)


def test_second_moments_collected_are_adams_at_learning_rate_zero():
    """Both are the mean of the squared gradients, for Adam with beta2 near 1 and its bias corrected."""
    method, teacher, batches = Denoising(schedule=COSINE), denoiser(), make_batches()
    got = squared_gradients(network=teacher, method=method, batches=batches, steps=6, global_batch=64, seed=0)
    assert all(p.grad is None for p in teacher.parameters())
    expected = {name: torch.zeros_like(p) for name, p in teacher.named_parameters()}
    own = copy.deepcopy(teacher)
    adam = torch.optim.Adam(own.parameters(), lr=0.0, betas=(0.0, 1 - 1e-7))
    for step in range(6):
        rng = generator(0, 0, step * 64, 5)
        loss = (
            method.phases(START)[0].loss({"teacher": own}, batches(step * 64), rng, START).per_sample["teacher"].mean()
        )
        adam.zero_grad()
        loss.backward()
        adam.step()
        for name, p in own.named_parameters():
            expected[name] += p.grad.square() / 6
    adams = Finished(SimpleNamespace(networks={"teacher": own}, optimisers={"teacher": adam})).second_moments("teacher")
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)
        torch.testing.assert_close(adams[name], value, rtol=1e-2, atol=1e-12)


def test_second_moments_of_a_parameter_without_gradient_are_zero():
    network = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(3, 1)})
    adam = torch.optim.Adam(network.parameters(), lr=0.0)
    network["used"](torch.ones(1, 2)).sum().backward()
    adam.step()
    found = Finished(SimpleNamespace(networks={"teacher": network}, optimisers={"teacher": adam})).second_moments(
        "teacher"
    )
    assert found.keys() == dict(network.named_parameters()).keys()
    assert found["unused.weight"].shape == (1, 3)
    assert not found["unused.weight"].any()
    assert found["used.weight"].all()


def test_a_student_with_dropout_resumes_as_if_it_had_not_stopped(tmp_path):
    """Other draws from torch's own generator do not matter. Every worker has its own masks."""

    def dropped(rank=0):
        state = make_state(matching(schedule=COSINE, k=4))
        for role in state.optimisers:
            for part in state.networks[role].modules():
                if isinstance(part, nn.Dropout):
                    part.p = 0.3
        return state

    whole = dropped()
    for _ in range(4):
        train_step(state=whole, batches=make_batches(), seed=0)
    half = dropped()
    for _ in range(2):
        train_step(state=half, batches=make_batches(), seed=0)
    again = dropped()
    again.load_state_dict(half.state_dict())
    torch.rand(100)
    for _ in range(2):
        train_step(state=again, batches=make_batches(), seed=0)
    assert same(weights(whole), weights(again))

    masks = []
    for rank in (0, 1):
        state = dropped()
        drop = next(p for p in state.networks["student"].modules() if isinstance(p, nn.Dropout))
        drop.register_forward_hook(lambda _, inputs, out: masks.append((out == 0) & (inputs[0] != 0)))
        train_step(state=state, batches=make_batches(rank, 2), seed=0, rank=rank, world=2)
    assert not torch.equal(masks[0], masks[1])


def test_roles_are_told_their_conditions():
    state = make_state(matching(schedule=COSINE, k=4, guidance=(0.0, 2.0), auxiliary_sees_t=True, ema=True))
    assert state.networks["student"].backbone.config.conditions == ("guidance",)
    assert state.networks["auxiliary"].backbone.config.conditions == ("guidance", "t")
    assert state.networks["teacher"].backbone.config.conditions == ()
    before = weights(state)
    train_step(state=state, batches=make_batches(), seed=0)
    moved = [n for n, value in weights(state).items() if "conditions" in n and not torch.equal(value, before[n])]
    assert {n.split("/")[0] for n in moved} == {"student", "auxiliary", "student_ema"}
