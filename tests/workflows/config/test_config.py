"""Configuration: precedence, and the user's mistakes in one line."""

import pytest
import yaml

from workflows.config.assembly import config_of, method_of, schedule_of
from workflows.config.loading import RECIPES, load_config, recipe_names
from workflows.config.values import digest
from workflows.errors import ConfigError


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_resolves_and_says_what_it_is(name):
    config = load_config(name)
    assert config.recipe == name
    assert config_of(yaml.safe_load(config.yaml())) == config
    assert (RECIPES / f"{name}.yaml").read_text().startswith("# ")


def test_set_wins_over_recipe_over_defaults(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("teacher: {images: 1000, batch: 10}\n")
    config = load_config(str(path), ["teacher.batch=20", "teacher.optimiser.lr=1e-3"])
    assert (config.recipe, config.teacher.images, config.teacher.batch) == ("mine", 1000, 20)
    assert config.teacher.optimiser.lr == 1e-3
    assert config.teacher.log_every == config_of({"recipe": "defaults"}).teacher.log_every


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
    assert config.distill.for_k(1).w_s == "sigmoid"


def test_the_command_line_holds_for_every_k():
    """Also where the recipe has something else for one; what it says of a k itself comes before both."""
    recipe = load_config("digits").distill
    assert [recipe.for_k(k).images for k in (1, 2, 4, 8)] == [160_000, 128_000, 128_000, 76_800]
    assert [recipe.for_k(k).optimiser.lr for k in (1, 2, 4, 8)] == [1e-3, 3e-4, 3e-4, 3e-4]
    words = ["distill.optimiser.lr=1e-3", "distill.images=200000", "distill.overrides.4.images=9000"]
    own = load_config("digits", words).distill
    assert [own.for_k(k).images for k in (1, 2, 4, 8)] == [200_000, 200_000, 9_000, 200_000]
    assert {own.for_k(k).optimiser.lr for k in (1, 2, 4, 8)} == {1e-3}
    assert own.for_k(8).optimiser_of("auxiliary").lr == recipe.for_k(8).optimiser_of("auxiliary").lr == 2e-3


@pytest.mark.parametrize(
    ("words", "rates"),
    [
        ([], {"student": 1e-5, "auxiliary": 1e-5}),
        (["optimiser.lr=1e-3", "auxiliary_lr_ratio=2"], {"student": 1e-3, "auxiliary": 2e-3}),
        (["optimisers={auxiliary: {lr: 5.0e-4}}"], {"student": 1e-5, "auxiliary": 5e-4}),
    ],
)
def test_a_role_learns_at_the_ratio_that_the_method_declares_unless_the_recipe_states_its_rate(words, rates):
    from workflows.stages.teacher import optimiser_options

    config = load_config("imagenet64", [f"distill.{word}" for word in words])
    section = config.distill.for_k(4)
    found = optimiser_options(section, method_of(section, schedule_of(config)))
    assert {role: options["lr"] for role, options in found.items()} == pytest.approx(rates)


def written(folder, **files):
    """Recipes below a folder, by name; the path of the last one."""
    for name, text in files.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(path)


def test_what_a_recipe_extends_lies_beside_it(tmp_path, monkeypatch):
    written(tmp_path / "here", base="extends: digits\nseed: 9\n")
    written(tmp_path / "here/own", mine="extends: ../base.yaml\nprediction: x\n")
    written(tmp_path / "elsewhere", base="seed: 1\n")
    absolute = written(tmp_path, absolute=f"extends: {tmp_path}/here/own/mine.yaml\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    for recipe in ("../here/own/mine.yaml", absolute):
        config = load_config(recipe)
        assert (config.seed, config.prediction, config.network.depth) == (9, "x", 3)
    with pytest.raises(ConfigError, match=r"no such file .*/here/there\.yaml"):
        load_config(written(tmp_path / "here", lost="extends: there.yaml\n"))


def test_a_later_file_holds_for_every_k(tmp_path):
    """As the command line does; what it says of one k itself comes before."""
    (tmp_path / "house.yaml").write_text(
        "extends: digits\ndistill: {overrides: {8: {optimisers: {auxiliary: {lr: 1.0e-3}}}}}\n"
    )
    house = load_config(str(tmp_path / "house.yaml")).distill
    mine = written(
        tmp_path,
        base="extends: house.yaml\ndistill: {images: 19200, optimiser: {lr: 1.0e-3}, overrides: {8: {images: 640}}}\n",
        mine="extends: base.yaml\ngate: {recall: 0.5}\ndistill: {overrides: {'2': {images: 1280}}}\n",
    )
    own = load_config(mine).distill
    assert [own.for_k(k).images for k in (1, 2, 4, 8)] == [19_200, 1_280, 19_200, 640]
    assert {own.for_k(k).optimiser.lr for k in (1, 2, 4, 8)} == {1e-3}
    assert own.for_k(8).optimiser_of("auxiliary").lr == house.for_k(8).optimiser_of("auxiliary").lr == 1e-3
    assert load_config(mine, ["distill.images=320"]).distill.for_k(2).images == 320
    above = written(
        tmp_path, gated="gate: {overrides: {1: {recall: 0.9}}}\n", all="extends: gated.yaml\ngate: {recall: 0.2}\n"
    )
    assert load_config(above).gate.for_k(1).recall == 0.2


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
        "data.extractor_weights: the file of inception's weights is missing",
    ),
    "weights of nothing": (
        "digits",
        ["data.extractor_weights=x.pth"],
        "data.extractor_weights: belongs to inception, not to classifier",
    ),
    "what chooses reports": (
        "gmm",
        ["data.reporting=[mixture]"],
        "data.reporting: mixture chooses already (data.extractor); figures of what chose are too good, so take other features",
    ),
    "features twice": ("digits", ["data.reporting=[random,random]"], "has one of them twice"),
    "unknown features": ("digits", ["data.reporting=[pixel]"], "did you mean pixels?"),
    "neighbours": ("digits", ["evaluate.neighbour_samples=10", "evaluate.neighbours=10"], "should be at most 9"),
    "splits": ("digits", ["evaluate.inception_splits=5000"], "is more than the 1797 samples"),
    "guidance without the null label": ("digits", ["distill.guidance=1"], "never learns the null label"),
    "guidance without labels": (
        "photos",
        ["data.source=made", "data.image_size=8", "distill.guidance=1"],
        "the data have no labels",
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
        "the student of 1 steps is conditioned on nothing, that of 2 on guidance",
    ),
    "samplers": ("digits", ["evaluate.samplers=[dimm]"], "did you mean ddim"),
    "no steps": ("digits", ["evaluate.teacher_steps=[]"], "at least 1"),
    "0 steps": ("digits", ["evaluate.teacher_steps=[0]"], "greater than or equal to 1"),
    "shift of what": ("digits", ["schedule.name=shifted_cosine"], "shifted_cosine needs the images'"),
    "no number": ("digits", ["teacher.optimiser.lr=.nan"], "teacher.optimiser.lr: nan should be"),
    "infinite": ("digits", ["teacher.optimiser.lr=.inf"], "teacher.optimiser.lr: inf should be a finite number"),
    "infinite by a power": ("digits", ["distill.logsnr_shift=1e999"], "inf should be a finite number"),
    "infinite in a list": ("gmm", ["distill.guidance=[0,.inf]"], "distill.guidance.1: inf should be a finite number"),
    "infinite for one k": ("digits", ["distill.overrides.4.eta=.inf"], "distill.overrides.4.eta: inf should be"),
    "infinite gate": ("digits", ["gate.overrides.4.frechet=.nan"], "gate.overrides.4.frechet: nan should be"),
    "infinite memory": ("digits", ["data.memory_gib=1e300"], "data.memory_gib: 1e+300 should be less than or equal"),
    "huge seed": ("digits", ["seed=100000000000000000000000"], "seed: 100000000000000000000000 is more than"),
    "seed of 33 bits": ("digits", [f"seed={2**32}"], "seed: 4294967296 should be less than or equal to 4294967295"),
    "negative seed": ("digits", ["seed=-1"], "seed: -1 should be greater than or equal to 0"),
    "huge count": ("digits", [f"teacher.images={10**20}"], "teacher.images: 100000000000000000000 is more than"),
    "huge width": ("digits", [f"network.width=0x{'f' * 9000}"], "network.width: a number of thousands of digits"),
    "huge steps": ("digits", ["evaluate.teacher_steps=[1,100000000]"], "teacher_steps.1: 100000000 should be less"),
    "huge k": ("digits", ["distill.k=[100000000]"], "distill.k: [100000000] should be"),
    "true for a number": ("digits", ["teacher.batch=true"], "teacher.batch: true should be a number"),
    "yes in a list": ("digits", ["distill.k=[1,yes]"], "distill.k: true should be a number"),
    "off for one k": ("digits", ["distill.overrides.4.images=off"], "distill.overrides.4.images: false should be"),
    "true for a text": ("digits", ["data.path=true"], "data.path: true should be a text"),
    "empty": ("digits", ["data.path=''"], "data.path: '' is no text"),
    "of nothing": ("digits", ["recipe="], "recipe: None should be a valid string"),
    "a number for a name": ("digits", ["recipe=5"], "recipe: 5 should be a valid string"),
    "a path for a name": ("digits", ["recipe=a/b"], "recipe: 'a/b' can't be a recipe's name"),
    "a hidden name": ("digits", ["recipe=.a"], "recipe: '.a' can't be a recipe's name"),
    "an alias for a name": ("digits", ["recipe=a@b"], "recipe: 'a@b' can't be a recipe's name"),
    "a quoted name": ("digits", ['recipe="it\'s"'], "can't be a recipe's name"),
    "a long name": ("digits", [f"recipe={'é' * 51}"], "at most 100 bytes"),
    "no section": ("digits", ["data=5"], "data: 5 should be a valid dictionary"),
    "no overrides": ("digits", ["distill.overrides={4: 5}"], "distill.overrides.4: 5 should be a valid dictionary"),
    "no k, in another script": (
        "digits",
        ["distill.overrides.²=5"],
        "distill.overrides.²: '²' should be a valid integer",
    ),
    "k of 0": ("digits", ["distill.overrides.0.eta=1"], "distill.overrides.0: 0 should be greater than or equal to 1"),
    "k of yes": ("digits", ["distill.overrides={yes: {eta: 1}}"], "distill.overrides: True is no k"),
    "k twice": ("digits", ["distill.overrides={4: {eta: 1}, '4': {eta: 0}}"], "distill.overrides: '4' stands twice"),
    "k of a k": ("digits", ["distill.overrides.4.k=[2]"], "distill.overrides.4.k: can't differ for one k"),
    "no date": ("digits", ["seed=2020-99-99"], "seed: '2020-99-99' should be a valid integer"),
    "hours and minutes": ("digits", ["seed=1:30"], "seed: '1:30' should be a valid integer"),
    "not of its tag": ("digits", ["compute.shard=!!bool maybe"], "is not YAML: line 1: 'maybe' is no bool"),
    "nothing of a tag": ("digits", ["seed=!!int ''"], "is not YAML: line 1: '' is no int"),
    "no name of a field": ("digits", [".seed=1"], "'.seed=1' should read section.field=value"),
    "no name in the middle": ("digits", ["teacher..images=1"], "'teacher..images=1' should read section.field=value"),
    "steps twice": ("digits", ["evaluate.teacher_steps=[4,4]"], "evaluate.teacher_steps: [4, 4] has one of them twice"),
    "deep": ("digits", ["distill.overrides=" + "[" * 1500], "is nested deeper than 20 levels"),
    "deep field": ("digits", [".".join("a" * 3000) + "=1"], "no such option"),
    "a line break": ("digits", ['data={"a\\nb": 1}'], "data.a b: no such option"),
    "a long value": ("digits", ["prediction=" + "x" * 9999], "is not one of 'x', 'eps'"),
    "samplers twice": ("digits", ["evaluate.samplers=[ancestral,ancestral]"], "has one of them twice"),
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
    assert len(message) < 500


def test_values_are_read_as_they_look():
    """A leading zero makes no octal of a number, and a folder may have the name of a date, or of a number with a zero."""
    assert load_config("digits", ["seed=010"]).seed == 10
    assert load_config("digits", ["distill.overrides={08: {images: 640}}"]).distill.for_k(8).images == 640
    assert load_config("digits", ["seed = 5"]).seed == 5
    for name in ("2024-01-31", "0012"):
        set_ = ["data.source=folder", f"data.path={name}", "data.image_size=8", "data.extractor=pixels"]
        assert load_config("digits", set_, only_shown=True).data.path == name


BAD_FILES = {
    "Latin-1": ("seed: 1  # caf\xe9".encode("latin-1"), "is not text in UTF-8"),
    "bytes": (b"seed: \x00", "is not text in UTF-8"),
    "a list": (b"- seed", "should hold sections, not a list"),
    "a text": (b"seed", "should hold sections, not a str"),
    "two documents": (b"seed: 1\n---\nseed: 2\n", "is not YAML: line 2: but found another document"),
    "a key twice": (
        b"teacher: {images: 9}\nseed: 1\nteacher: {batch: 5}\n",
        "is not YAML: line 3: 'teacher' stands twice",
    ),
    "no key": (b"[1, 2]: 3", "is not YAML: line 1: found unhashable key"),
    "no name": (b"null: 3", "None: "),
    "an object": (b"seed: !!python/object:os.system x", "is not YAML: line 1: could not determine a constructor"),
    "a long number": (b"seed: " + b"9" * 9000, "is not YAML: Exceeds the limit"),
    "deep": (b"[" * 1500, "is nested deeper than 20 levels"),
    "deep sections": (
        b"distill: {overrides: {1: " + b"{a: " * 200 + b"1" + b"}" * 202,
        "is nested deeper than 20 levels",
    ),
    "itself": (b"data: &a {b: *a}", "is nested deeper than 20 levels"),
    "much of little": (
        b"a: &a [x, x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (c, c, b", ".join([b"*%c" % (c - 1)] * 9)) for c in b"bcdefgh"),
        "a: no such option",
    ),
    "extends what": (b"extends: [digits]", "extends: ['digits'] should be a recipe's name"),
    "extends nothing": (b"extends: ''", "extends: '' should be a recipe's name"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_mistakes_in_a_file_are_one_line(tmp_path, case):
    content, said = BAD_FILES[case]
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(str(tmp_path / "mine.yaml"))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["exp:1", "a?b", "100%", "-x", "[v2]", "a#b"])
def test_a_files_name_is_the_recipes_and_has_to_fit(tmp_path, name):
    with pytest.raises(ConfigError, match="can't be a recipe's name"):
        load_config(written(tmp_path, **{name: "seed: 1\n"}))


@pytest.mark.parametrize("name", ["my exp", "v1.2", "_mine", "Größe", "a+b=c,d~e"])
def test_names_that_files_and_registered_models_take(tmp_path, name):
    from mlflow.utils.validation import _validate_model_name

    config = load_config(written(tmp_path, **{name: "seed: 1\n"}))
    assert config.recipe == name
    _validate_model_name(f"mmdistill-{name}-student")


def test_a_folder_and_a_name_too_long_are_no_recipes(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    for recipe in (str(tmp_path / "folder.yaml"), "x" * 300 + ".yaml", "a\0b.yaml"):
        with pytest.raises(ConfigError, match="no such file"):
            load_config(recipe)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_by_its_mark(tmp_path, encoding):
    (tmp_path / "mine.yaml").write_text(
        "seed: 3  # é\nteacher: &t {batch: 50}\ndistill: {<<: *t, batch: 70}\n", encoding
    )
    config = load_config(str(tmp_path / "mine.yaml"))
    assert (config.seed, config.teacher.batch, config.distill.batch) == (3, 50, 70)


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

    from workflows.dataset.sources import SOURCES

    monkeypatch.setitem(SOURCES, "bare", replace(SOURCES["digits"], num_classes=0))
    for kind in ("classifier", "mixture"):
        with pytest.raises(ConfigError, match=rf"data\.extractor: {kind} needs labels, and the images have none"):
            load_config("digits", ["data.source=bare", f"data.extractor={kind}"])
    load_config("digits", ["data.source=bare"])


def test_places_are_absolute_and_addresses_stay(tmp_path, monkeypatch):
    """Workers run in other folders."""
    from workflows.config.places import local_places, with_absolute_places

    monkeypatch.chdir(tmp_path)
    here = [
        "data.source=folder",
        "data.path=pictures",
        "data.image_size=8",
        "data.num_classes=3",
        "evaluate.reference=file:///there/statistics",
        "teacher=old/model",
    ]
    config = load_config("digits", [*here, "distill.given={features: nets/one, other: 's3://b/two'}"])
    assert local_places(config) == {
        "data.path": "pictures",
        "teacher.model": "old/model",
        "evaluate.reference": "file:///there/statistics",
        "distill.given.features": "nets/one",
    }
    whole = with_absolute_places(config)
    assert whole.data.path == str(tmp_path / "pictures")
    assert whole.teacher.model == str(tmp_path / "old/model")
    assert whole.evaluate.reference == "/there/statistics"
    assert whole.distill.given == {"features": str(tmp_path / "nets/one"), "other": "s3://b/two"}
    registered = with_absolute_places(load_config("digits", ["teacher=models:/a-teacher@best"]))
    assert registered.teacher.model == "models:/a-teacher@best"
    assert with_absolute_places(registered) == registered
