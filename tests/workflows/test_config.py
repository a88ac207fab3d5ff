"""Configuration: precedence, and the user's mistakes in one line."""

import pytest
import yaml

from workflows.config import RECIPES, ConfigError, RunConfig, digest, load_config, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_resolves_and_says_what_it_is(name):
    config = load_config(name)
    assert config.recipe == name
    assert RunConfig.model_validate(yaml.safe_load(config.yaml())) == config
    assert (RECIPES / f"{name}.yaml").read_text().startswith("# ")


def test_set_wins_over_recipe_over_defaults(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("teacher: {images: 1000, batch: 10}\n")
    config = load_config(str(path), ["teacher.batch=20", "teacher.optimiser.lr=1e-3"])
    assert (config.recipe, config.teacher.images, config.teacher.batch) == ("mine", 1000, 20)
    assert config.teacher.optimiser.lr == 1e-3
    assert config.teacher.log_every == RunConfig(recipe="").teacher.log_every


def test_naming_one_field_leaves_the_sections_others(tmp_path):
    config = load_config("digits", ["distill.optimiser.lr=1e-2"])
    assert config.distill.optimiser.beta1 == 0.0


def test_a_recipe_may_extend_another(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: digits\nseed: 7\n")
    assert load_config(str(path)).seed == 7
    assert load_config(str(path)).network == load_config("digits").network


def test_overrides_hold_for_their_k_alone():
    config = load_config("digits", ["distill.overrides.2.w_s=snr", "distill.overrides.2.optimiser.lr=0.5"])
    assert config.distill.for_k(2).w_s == "snr"
    assert config.distill.for_k(2).optimiser.lr == 0.5
    assert config.distill.for_k(2).optimiser.beta1 == 0.0
    assert config.distill.for_k(1).w_s == "flat"


def test_the_command_line_holds_for_every_k():
    """Also where the recipe has something else for one; what it says of a k itself comes before both."""
    recipe = load_config("digits").distill
    assert (recipe.for_k(8).pairing, recipe.for_k(8).optimiser.lr, recipe.for_k(8).images) == (
        "uniform",
        1.5e-4,
        76_800,
    )
    words = [
        "distill.pairing=grid",
        "distill.optimiser.lr=1e-3",
        "distill.images=200000",
        "distill.overrides.4.images=9000",
    ]
    own = load_config("digits", words).distill
    assert [own.for_k(k).images for k in (1, 2, 4, 8)] == [200_000, 200_000, 9_000, 200_000]
    assert {own.for_k(k).optimiser.lr for k in (1, 2, 4, 8)} == {1e-3}
    assert own.for_k(8).pairing == "grid"
    assert own.for_k(8).auxiliary_lr == recipe.for_k(8).auxiliary_lr == 1e-3
    assert own.for_k(2).w_s == "sigmoid"


BAD = {
    "recipe digit": ("digit", [], "digits"),
    "recipe file": ("nope.yaml", [], "no such file"),
    "section": ("digits", ["distil.lr=3"], "did you mean distill"),
    "field": ("digits", ["distill.optimiser.l_r=3"], "distill.optimiser.l_r: no such option; did you mean lr"),
    "choice": (
        "digits",
        ["distill.update=both"],
        "distill.update: 'both' is not one of 'alternating', 'joint' or 'instant'",
    ),
    "range": ("digits", ["teacher.batch=0"], "teacher.batch: 0 should be greater than or equal to 1"),
    "type": ("digits", ["teacher.batch=many"], "teacher.batch: 'many'"),
    "no value": ("digits", ["teacher.batch"], "section.field=value"),
    "override field": ("digits", ["distill.overrides.8.pairin=grid"], "distill.overrides.8.pairin: no such option"),
    "override of a k not distilled": ("digits", ["distill.k=[8]", "distill.overrides.2.x=1"], "distill.overrides.2.x"),
    "k": ("digits", ["distill.k=[0]"], "at least 1"),
    "eps where no signal is left": ("digits", ["prediction=eps"], "take v, x or flow"),
    "heads": ("digits", ["network.heads=5"], "network.heads: 5 does not divide network.width 96"),
    "shift": ("digits", ["schedule.resolution=8"], "belong to shifted_cosine"),
    "no weights": (
        "digits",
        ["data.extractor=inception"],
        "data: extractor_weights: the file of inception's weights is missing",
    ),
    "weights of nothing": (
        "digits",
        ["data.extractor_weights=x.pth"],
        "belongs to extractor inception, not to classifier",
    ),
    "neighbours": ("digits", ["evaluate.neighbour_samples=10", "evaluate.neighbours=10"], "should be at most 9"),
    "splits": ("digits", ["evaluate.inception_splits=5000"], "is more than the 1797 samples"),
    "guidance without the null label": ("digits", ["distill.guidance=1"], "teacher.label_dropout is 0"),
    "guidance without labels": (
        "photos",
        ["data.source=made", "data.image_size=8", "distill.guidance=1", "data.extractor=pixels"],
        "made has no labels",
    ),
    "guidance in disorder": ("digits", ["distill.guidance=[2,1]"], "[low, high]"),
    "guidance measured": ("digits", ["evaluate.guidance=[1]"], "can't be guided"),
    "odd halves": ("digits", ["distill.update=instant", "distill.batch=33"], "halves"),
    "eta": ("digits", ["distill.transition=unconditional", "distill.eta=0.5"], "belongs to the conditional"),
    "no auxiliary": ("digits", ["distill.update=instant", "distill.auxiliary_sees_t=true"], "instant has no auxiliary"),
    "exact": ("digits", ["teacher.kind=exact"], "it is for gmm"),
    "exact has no Adam": ("gmm", ["distill.update=instant"], "take collected"),
    "told and untold": (
        "gmm",
        ["distill.warm_start=true", "distill.guidance=[0,1]", "distill.overrides={1: {guidance: 1.0}}"],
        "of 2 and 1 steps",
    ),
    "samplers": ("digits", ["evaluate.samplers=[ddim]"], "ancestral"),
    "no steps": ("digits", ["evaluate.teacher_steps=[]"], "at least 1"),
    "0 steps": ("digits", ["evaluate.teacher_steps=[0]"], "greater than or equal to 1"),
    "shift of what": ("digits", ["schedule.name=shifted_cosine"], "shifted_cosine needs the images'"),
    "patch": ("digits", ["network.patch=3"], "network.patch: 3 does not divide the image size 8"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_one_line_with_field_value_and_choices(case):
    recipe, overrides, said = BAD[case]
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, overrides)
    message = str(caught.value)
    assert said in message
    assert "\n" not in message


def test_recipes_in_a_circle(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"extends: {tmp_path / other}.yaml\n")
    with pytest.raises(ConfigError, match="in a circle"):
        load_config(str(tmp_path / "a.yaml"))


def test_a_recipe_that_is_not_yaml(tmp_path):
    (tmp_path / "bad.yaml").write_text("teacher: {batch: [\n")
    with pytest.raises(ConfigError, match="not YAML"):
        load_config(str(tmp_path / "bad.yaml"))


def test_digest_is_stable_and_does_not_mind_order():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_without_labels_there_is_no_classifier(monkeypatch):
    from dataclasses import replace

    from workflows.sources import SOURCES

    monkeypatch.setitem(SOURCES, "bare", replace(SOURCES["digits"], num_classes=0))
    for kind in ("classifier", "mixture"):
        with pytest.raises(
            ConfigError, match=rf"data\.extractor: {kind} needs labels, which bare has not; use pixels, or"
        ):
            load_config("digits", ["data.source=bare", f"data.extractor={kind}"])
    assert load_config("digits", ["data.source=bare", "data.extractor=pixels"]).data.extractor == "pixels"
