"""The schema of a run's configuration: typed, validated sections, with each default written once. Recipes hold only what differs.

A method or a network declares its own options in its dataclass (mmdistill_core/options.py). They join its section in assembly.py.
Nothing heavy is imported here, so that the command line starts fast.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from mmdistill_core.defaults import METHOD, NETWORK, TEACHER, TEACHER_SAMPLERS
from workflows.config.section import MOST_STEPS, SEEDS, Section, Steps
from workflows.config.values import merge
from workflows.dataset.sources import SHAPED, SOURCES
from workflows.errors import brief

if TYPE_CHECKING:
    from mmdistill_core.methods.base import Round

DATA_SET = "dataset://"
ONLY_SHOWN = {"only_shown": True}
"""The validation context that skips the checks which would open a data set."""


NAME = re.compile(r"\w[\w .+=,~-]*")
LONGEST = 100
"""Most bytes of a recipe's name. It becomes part of the names of files and of registered models, which hold 255."""


class Data(Section):
    """The training data. `source` names a data set of sources/, or one that `mmdistill prepare` wrote: dataset://PATH or
    dataset://s3://BUCKET/PREFIX. `folder` reads the user's images. `made` generates images, to try a recipe without its data. These
    two take their shape from this section.
    """

    source: str = "digits"
    path: str | None = Field(
        None, description="folder: the images, in a subfolder for each class; dataset: where its manifest is"
    )
    image_size: int | None = Field(None, ge=1, description="folder and made")
    channels: Literal[1, 3] | None = Field(None, description="folder and made; by default 3")
    num_classes: int | None = Field(None, ge=0, description="folder and made; by default 0: no labels")
    limit: int | None = Field(None, ge=10, description="use at most so many images, spread over all")
    # 52/256: keeps the split of the published figures, made when shares were rounded up to a multiple of 1/256.
    holdout: float = Field(0.203125, gt=0, lt=1, description="share kept from the classifier, to state its accuracy")
    reference: Literal["all", "holdout"] = Field(
        "all", description="what samples are measured against. holdout: the share held out, which no training then sees"
    )
    extractor: str | None = Field(
        None,
        description="whose features choose the kept weights, and the best trials of a sweep; by default classifier, or random "
        "for images without labels",
    )
    reporting: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="whose features are reported, the main ones first; none of them chooses. By default those of classifier, "
        "random and pixels that suit the images",
    )
    extractor_weights: str | None = Field(None, description="the file of inception's weights: .pth or .safetensors")
    shard_rows: int = Field(512, ge=1)
    memory_gib: float = Field(
        4,
        ge=0,
        le=2**20,
        description="every worker holds a data set of at most so many GiB in memory; it streams a larger one",
    )
    window: int = Field(4, ge=1, description="shards that are shuffled together, when the data are streamed")
    classifier_epochs: int = Field(25, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _data_set(cls, values: Any) -> Any:
        if isinstance(values, dict) and str(source := values.get("source")).startswith(DATA_SET):
            return values | {"source": "dataset", "path": str(source).removeprefix(DATA_SET)}
        return values

    @field_validator("source")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in (*SOURCES, *SHAPED):
            raise ValueError(f"{name!r} is not one of {', '.join((*SOURCES, *SHAPED))}")
        return name

    @model_validator(mode="after")
    def _only_its_own(self) -> Data:
        own = {
            "folder": {"path", "image_size", "channels", "num_classes"},
            "made": {"image_size", "channels", "num_classes"},
            "dataset": {"path"},
        }
        for name in ("path", "image_size", "channels", "num_classes"):
            if getattr(self, name) is not None and name not in own.get(self.source, ()):
                raise ValueError(f"{name} does not belong to source {self.source}")
        if self.source == "dataset" and self.path is None:
            raise ValueError("source: dataset needs its path: dataset://PATH or dataset://s3://BUCKET/PREFIX")
        if self.source == "dataset" and self.limit is not None:
            raise ValueError("limit: belongs to the preparation of a data set: mmdistill prepare --limit")
        if self.source in ("folder", "made") and self.image_size is None:
            raise ValueError(f"image_size: the source {self.source} needs one, such as 64")
        return self

    @field_validator("reporting")
    @classmethod
    def _once(cls, kinds: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if kinds and len(set(kinds)) < len(kinds):
            raise ValueError(f"{brief(list(kinds))} has one of them twice")
        return kinds

    @property
    def trained(self) -> Literal["all", "rest"]:
        """The rows that trainings see."""
        return "rest" if self.reference == "holdout" else "all"


class Schedule(Section):
    name: Literal["cosine", "shifted_cosine", "linear", "karras"] = "cosine"
    resolution: int | None = Field(None, ge=1, description="shifted_cosine only")
    reference: int | None = Field(None, ge=1, description="shifted_cosine only")

    @model_validator(mode="after")
    def _only_its_own(self) -> Schedule:
        if self.name != "shifted_cosine" and (self.resolution or self.reference):
            raise ValueError("resolution and reference belong to shifted_cosine")
        if self.name == "shifted_cosine" and not self.resolution:
            raise ValueError("resolution: shifted_cosine needs the images'")
        return self

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


class Network(Section):
    """The network of the teacher, and so of students that start as its copies. `kind` is one of networks.config.NETWORKS, and its
    options are fields of this section. Image size, channels and classes come from the data.
    """

    kind: str = NETWORK


class Compute(Section):
    """How networks are computed. Apart from the precision, these settings change results by rounding only. A training may resume
    with other settings than it began with.
    """

    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the networks' operations; weights, averages and optimisers are float32"
    )
    shard: bool = Field(False, description="divide weights, gradients and optimisers among the workers (FSDP2)")
    recompute: bool = Field(False, description="keep no activations within blocks: less memory, a third more work")
    compile: bool = Field(False, description="torch.compile: minutes before the first step, faster ones after it")


class Optimiser(Section):
    name: Literal["Adam", "AdamW", "RAdam"] = "Adam"
    lr: float = Field(3e-4, gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.99, ge=0, lt=1)
    eps: float = Field(1e-12, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    warmup_images: int = Field(12_800, ge=0)
    decay: Literal["linear", "constant"] = "linear"


class Training(Section):
    """What teacher and distill share. Counts are in images. `method` is one of METHODS; its options are fields of this section."""

    method: str
    images: int = Field(384_000, ge=1)
    batch: int = Field(128, ge=1)
    micro_batch: int | None = Field(None, ge=1, description="images a worker takes at once; gradients are accumulated")
    log_every: int = Field(6_400, ge=1)
    checkpoint_every: int = Field(64_000, ge=1)
    ema_half_life_images: int = Field(500_000, ge=1)
    ema_ramp: float = Field(0.05, gt=0, le=1, description="the half-life is at most this share of the images seen")


class Reading(Section):
    """How the output of a teacher from elsewhere is read. A pipeline of diffusers says it itself; otherwise prediction and schedule
    are needed.
    """

    prediction: Literal["x", "eps", "v", "flow"] | None = None
    schedule: dict[str, Any] | None = Field(
        None, description="such as {name: betas, betas: linear}; schedules.SCHEDULES"
    )
    time: Literal["index", "one_based", "unit", "sigma", "log_sigma"] | None = Field(
        None, description="what the network is told of the time (foreign.TIMES); by default t"
    )
    preconditioned: float | None = Field(
        None, gt=0, description="the data's deviation in EDM's preconditioning; prediction is then x"
    )
    classes: int | None = Field(None, ge=0, description="real ones, if the embedding has one more for no label")
    weights: str | None = Field(None, description="a safetensors file with the weights of a function's network")
    options: dict[str, Any] = Field(default_factory=dict, description="arguments of the function")


class Teacher(Training):
    """The teacher. `kind: exact` uses the optimal denoiser, for data whose distribution is known; students then start from the
    trained network. `model` names an existing teacher: a folder or s3://... of ours or of diffusers, models:/NAME@ALIAS, or
    package.module:function, which makes a network. `teacher: NAME` is short for it.
    """

    method: str = TEACHER
    kind: Literal["trained", "exact"] = "trained"
    model: str | None = Field(None, description="an existing teacher, which is not trained")
    read: Reading = Reading()
    optimiser: Optimiser = Optimiser(lr=1e-3)

    @model_validator(mode="after")
    def _trained_or_not(self) -> Teacher:
        if self.model is not None and self.kind == "exact":
            raise ValueError(f"model: {self.model} is given, so kind can't be exact")
        return self


class Distill(Training):
    """The distillation. `overrides` holds, per k, the fields of this section that differ: `overrides: {1: {images: 64_000}}`. Those
    of a k that is not distilled have no effect.
    """

    k: tuple[int, ...] = (1, 2, 4, 8)
    method: str = METHOD
    given: dict[str, str] = Field(
        default_factory=dict, description="models that the method needs beside the teacher, by name"
    )
    warm_start: bool = Field(False, description="the k-step student starts from that of 2k steps, if k has both")
    dropout: float = Field(0.0, ge=0, lt=1, description="in the networks that are trained")
    optimiser: Optimiser = Optimiser(lr=3e-4, beta1=0.0, decay="constant")
    optimisers: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="by trained role, the fields that differ"
    )
    ema_ramp: float = Field(0.1, gt=0, le=1, description="the half-life is at most this share of the images seen")
    validate_every: int = Field(
        25_600, ge=0, description="images between two measurements of the student; the best is kept. 0: keep the last"
    )
    validate_samples: int = Field(1000, ge=2)
    overrides: dict[Steps, dict[str, Any]] = Field(default_factory=dict)

    @field_validator("k")
    @classmethod
    def _different(cls, k: tuple[int, ...]) -> tuple[int, ...]:
        if not k or len(set(k)) < len(k) or not 1 <= min(k) <= max(k) <= MOST_STEPS:
            raise ValueError(f"{brief(list(k))} should be different whole numbers, at least 1 and at most {MOST_STEPS}")
        return k

    def for_k(self, k: int) -> Distill:
        """This section as it holds for the k-step student alone."""
        common = self.model_dump(exclude={"overrides"}) | {"k": (k,)}
        return type(self).model_validate(merge(common, of_one(self.overrides.get(k, {}), "k", "method", "overrides")))

    def for_round(self, one: Round) -> Distill:
        """This section as it holds for a round: with the settings of one k, or those common to all."""
        return self if one.settings_of is None else self.for_k(one.settings_of)

    def optimiser_of(self, role: str) -> Optimiser:
        return Optimiser.model_validate(merge(self.optimiser.model_dump(), self.optimisers.get(role, {})))


class Evaluate(Section):
    """The evaluation: each row of the table is measured on `samples` samples, with each of `seeds` seeds."""

    samples: int = Field(1000, ge=10)
    seeds: int = Field(3, ge=1)
    teacher_steps: tuple[Steps, ...] = Field((1, 2, 4, 8, 16, 64, 256), min_length=1)
    samplers: tuple[str, ...] = Field(
        TEACHER_SAMPLERS, min_length=1, description="of the teacher; students are compared with it by the first"
    )
    teacher_noise: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (), description="extra noise, up to 1, of the teacher's ancestral steps: to tune it before it is compared with"
    )
    guidance: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (), description="strengths at which the teacher, and students conditioned on it, are measured too"
    )
    reference: str | None = Field(
        None, description="a folder of reference statistics; by default those of the run's data"
    )
    neighbours: int = Field(3, ge=1, description="k of precision and recall")
    neighbour_samples: int = Field(
        10_000, ge=10, description="at most so many of each set for precision, recall and kernel distance"
    )
    kid_subsets: int = Field(0, ge=0, description="of 1,000 each; 100 are usual. 0: all pairs, with the same mean")
    inception_splits: int = Field(10, ge=1)

    @field_validator("samplers", "teacher_steps", "teacher_noise", "guidance")
    @classmethod
    def _once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(values)) < len(values):
            raise ValueError(f"{brief(list(values))} has one of them twice")
        return values

    @model_validator(mode="after")
    def _enough(self) -> Evaluate:
        if (most := min(self.samples, self.neighbour_samples) - 1) < self.neighbours:
            raise ValueError(
                f"neighbours: {self.neighbours} should be at most {most}, one fewer than the samples compared"
            )
        if self.inception_splits > self.samples:
            raise ValueError(f"inception_splits: {self.inception_splits} is more than the {self.samples} samples")
        return self


class Gate(Section):
    """What a student must show before an alias is moved to it. Each registered version keeps the gate that it was tested with.

    teacher_ratio  1: a student no nearer to the data than its teacher at the same steps is no better than the teacher's sampler.
                   One value fits every k, since the teacher's distance falls with k: on the digits the students of 1, 2, 4, 8 steps
                   stand at .06, .20, .41, .58 of it.
    frechet        none: distances compare only within one set of features and one count of samples. Set it for a recipe's goal.
    recall         .3 stops a student that has lost most of the data. In the ablations (docs/ablation) the failed trainings end
                   below it (digits at 1 and 2 steps with a distance above .99: 0 to .29). One other training does too. The recipe
                   `digits` stands at .67 and more.
    spreads        1: sampling with other seeds changes the distance by about one spread, so a difference within it is no loss. With
                   one seed there is no spread, and any distance above the champion's counts as worse.
    overrides      per k, the fields that differ, as in distill.
    """

    teacher_ratio: float | None = Field(1.0, gt=0, description="largest distance, over the teacher's at the same steps")
    frechet: float | None = Field(None, gt=0, description="largest distance")
    recall: float = Field(0.3, ge=0, le=1, description="least recall")
    spreads: float = Field(1.0, ge=0, description="how far above the champion's distance, in spreads of the two")
    overrides: dict[Steps, dict[str, Any]] = Field(default_factory=dict)

    def for_k(self, k: int) -> Gate:
        """This section as it holds for the k-step student alone."""
        common = self.model_dump(exclude={"overrides"})
        return Gate.model_validate(merge(common, of_one(self.overrides.get(k, {}), "k", "overrides")))


def of_one(overrides: dict[str, Any], *of_all: str) -> dict[str, Any]:
    """The settings for one k. Raises ValueError for a field that is the same for all of them."""
    for name in of_all:
        if name in overrides:
            raise ValueError(f"{name}: can't differ for one k")
    return overrides


class RunConfig(Section):
    """A whole configuration. Made by `assembly.config_of`, which adds the options of methods and network and checks consistency."""

    recipe: str
    seed: int = Field(0, ge=0, le=SEEDS)
    prediction: Literal["x", "eps", "v", "flow"] = "v"
    data: Data = Data()
    schedule: Schedule = Schedule()
    network: Network = Network()
    compute: Compute = Compute()
    teacher: Teacher = Teacher()
    distill: Distill = Distill()
    evaluate: Evaluate = Evaluate()
    gate: Gate = Gate()

    @field_validator("recipe")
    @classmethod
    def _a_name(cls, name: str) -> str:
        """Files and MLflow's registered models are named after the recipe."""
        if not NAME.fullmatch(name) or len(name.encode()) > LONGEST:
            raise ValueError(
                f"{brief(name)} can't be a recipe's name, which names files and registered models: it takes letters, digits, "
                f"spaces and _ . + = , ~ -, begins with a letter, a digit or _, and has at most {LONGEST} bytes"
            )
        return name

    def yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
