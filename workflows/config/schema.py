"""The run configuration: typed, validated, each default written once, here. Recipes hold only what differs.

Precedence: defaults < recipe < `--set section.field=value`. Nothing heavy is imported here, so that the command line starts fast.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from functools import cache, reduce
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from workflows.config.smoke import smoke_values
from workflows.config.values import DEEPEST, brief, merge, nested, parsed, without
from workflows.dataset.sources import SHAPED, SOURCES, Source, source_of
from workflows.errors import ConfigError, expanded

RECIPES = Path(__file__).parent / "recipes"
DATA_SET = "dataset://"
ONLY_SHOWN = {"only_shown": True}
"""The context of a validation that looks at no data set."""
OF_THE_DATA = ("path", "image_size", "channels", "num_classes", "extractor", "extractor_weights")
"""What a recipe says of its own data, which does not hold for others that have a shape of their own."""


LARGEST = 2**63 - 1
"""What a whole number of 64 bits holds."""
SEEDS = 2**32 - 1
"""The largest seed that all take, NumPy among them."""
MOST_STEPS = 2**24
"""Of sampling: float32 tells no more times apart."""
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]
POWER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][+-]?[0-9]+")
NAME = re.compile(r"\w[\w .+=,~-]*")
LONGEST = 100
"""Bytes of a recipe's name: it becomes part of the names of files and of registered models, which hold 255."""


def _takes(annotation: Any, kind: type) -> bool:
    """Whether a field of this type takes values of this kind."""
    return annotation is kind or any(_takes(part, kind) for part in get_args(annotation))


class Section(BaseModel):
    """Numbers are finite, and whole ones of 64 bits; true and false are no numbers; no text is empty."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _sound(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(one, bool) and not _takes(annotation, bool):
                raise ValueError(f"{str(one).lower()} should be a {'text' if _takes(annotation, str) else 'number'}")
            if isinstance(one, int) and abs(one) > LARGEST:
                raise ValueError(f"{brief(one)} is more than a whole number of 64 bits holds")
            if isinstance(one, str) and (not one.strip() or "\0" in one):
                raise ValueError(f"{one!r} is no text")
        return value


class Data(Section):
    """What is distilled from. `source` names a data set of sources/, or one that `mmdistill prepare` wrote: dataset://PATH or
    dataset://s3://BUCKET/PREFIX; `folder` is a user's own, and `made` tries a recipe without its data: these two have the shape
    that is given here.
    """

    source: str = "digits"
    path: str | None = Field(
        None, description="folder: the images, in a subfolder for each class; dataset: where its manifest is"
    )
    image_size: int | None = Field(None, ge=1, description="folder and made")
    channels: Literal[1, 3] | None = Field(None, description="folder and made; by default 3")
    num_classes: int | None = Field(None, ge=0, description="folder and made; by default 0: no labels")
    limit: int | None = Field(None, ge=10, description="use at most so many images, spread over all")
    # 52/256: the images that published figures were made with, from when shares were rounded up to whole 1/256.
    holdout: float = Field(0.203125, gt=0, lt=1, description="share kept from the classifier, to state its accuracy")
    reference: Literal["all", "holdout"] = Field(
        "all", description="what samples are measured against. holdout: the share held out, which no training then sees"
    )
    extractor: Literal["classifier", "inception", "mixture", "pixels"] = Field(
        "classifier", description="in whose features distances are measured"
    )
    extractor_weights: str | None = Field(None, description="the file of inception's weights: .pth or .safetensors")
    shard_rows: int = Field(512, ge=1)
    memory_gib: float = Field(
        4,
        ge=0,
        le=2**20,
        description="data of at most so many GiB are held by every worker; larger ones are read as they are wanted",
    )
    window: int = Field(4, ge=1, description="shards that are shuffled together, of data that are not held in memory")
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

    @model_validator(mode="after")
    def _extractor_fits(self) -> Data:
        if self.extractor == "inception" and self.extractor_weights is None:
            raise ValueError("extractor_weights: the file of inception's weights is missing; see docs/evaluation.md")
        if self.extractor != "inception" and self.extractor_weights is not None:
            raise ValueError(f"extractor_weights: belongs to extractor inception, not to {self.extractor}")
        return self

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
    """The house backbone, a DiT. Image size, channels and classes come from the data."""

    patch: int = Field(2, ge=1)
    width: int = Field(96, ge=8)
    depth: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1, description="in the teacher's training; distill has its own")


class Compute(Section):
    """How networks are computed. But for the precision, nothing of it changes what is learnt beyond rounding, and a training may
    go on with other choices than it began with.
    """

    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the networks' operations; weights, averages and optimisers are float32"
    )
    shard: bool = Field(False, description="cut weights, gradients and optimisers among the workers (FSDP2)")
    recompute: bool = Field(False, description="keep no activations within blocks: less memory, a third more work")
    compile: bool = Field(False, description="torch.compile: minutes before the first step, faster ones after it")


class Optimiser(Section):
    lr: float = Field(3e-4, gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.99, ge=0, lt=1)
    eps: float = Field(1e-12, gt=0)
    clip_norm: float = Field(1.0, gt=0)
    warmup_images: int = Field(12_800, ge=0)
    decay: Literal["linear", "constant"] = "linear"


class Training(Section):
    """What teacher and distill share. Counts are in images."""

    images: int = Field(384_000, ge=1)
    batch: int = Field(128, ge=1)
    micro_batch: int | None = Field(None, ge=1, description="images a worker takes at once; gradients are accumulated")
    log_every: int = Field(6_400, ge=1)
    checkpoint_every: int = Field(64_000, ge=1)
    ema_half_life_images: int = Field(500_000, ge=1)
    ema_ramp: float = Field(0.05, gt=0, le=1, description="the half-life is at most this share of the images seen")


class Teacher(Training):
    """`kind: exact` takes the optimal denoiser, of data whose law is known; what is trained is then where students start."""

    kind: Literal["trained", "exact"] = "trained"
    optimiser: Optimiser = Optimiser(lr=1e-3)
    p_t: Literal["uniform", "karras"] = "uniform"
    w_t: Literal["flat", "snr", "v", "edm", "sigmoid"] = "v"
    label_dropout: float = Field(0.0, ge=0, lt=1, description="share of labels hidden, so that it can be guided")


class Distill(Training):
    """`overrides` holds, per k, the fields of this section that differ: `overrides: {1: {pairing: grid}}`. Those of a k that
    is not distilled wait for the day it is.
    """

    k: tuple[int, ...] = (1, 2, 4, 8)
    method: Literal["moment_matching"] = "moment_matching"
    update: Literal["alternating", "joint", "instant"] = "joint"
    pairing: Literal["uniform", "grid"] = "grid"
    delta_power: float = Field(0.35, gt=0, description="below 1: t - s is more often as long as sampling's steps")
    p_s: Literal["uniform", "karras"] = "uniform"
    w_s: Literal["flat", "snr", "v", "edm", "sigmoid", "dmd"] = "flat"
    sigma_data: float = Field(0.5, gt=0)
    logsnr_shift: float = Field(0.0, description="of p(s) and w(s); 2 ln(64 / resolution) for larger images")
    transition: Literal["conditional", "unconditional"] = "conditional"
    eta: float = Field(1.0, ge=0, le=1, description="noise of the student's steps: 1 ancestral, 0 DDIM")
    guidance: float | tuple[float, float] = Field(
        0.0, description="of the teacher: 0 is off; [low, high] for each sample"
    )
    clip_x: bool = Field(False, description="clip the teacher's x_hat to [-1, 1]")
    pull: bool = True
    auxiliary_updates: int = Field(1, ge=1, description="of the auxiliary to one of the student")
    auxiliary_sees_t: bool = False
    derivative: Literal["forward", "double_backward"] = "forward"
    preconditioner: Literal["adam", "collected", "identity"] = Field(
        "adam", description="instant's Lambda: of the teacher's own optimiser, or of gradients collected now, or none"
    )
    collect_batches: int = Field(300, ge=1, description="for the collected preconditioner")
    dropout: float = Field(0.0, ge=0, lt=1, description="in student and auxiliary")
    warm_start: bool = Field(False, description="the k-step student starts from that of 2k steps, if k has both")
    ema: bool = Field(True, description="keep an average of the student, and measure and register that")
    optimiser: Optimiser = Optimiser(lr=3e-4, beta1=0.0, decay="constant")
    ema_ramp: float = Field(0.1, gt=0, le=1, description="the half-life is at most this share of the images seen")
    auxiliary_lr: float | None = Field(None, gt=0, description="by default the student's")
    validate_every: int = Field(
        25_600, ge=0, description="distance of the student so far; the best is kept. 0: keep the last"
    )
    validate_samples: int = Field(1000, ge=2)
    overrides: dict[Steps, dict[str, Any]] = {}

    @field_validator("k")
    @classmethod
    def _different(cls, k: tuple[int, ...]) -> tuple[int, ...]:
        if not k or len(set(k)) < len(k) or not 1 <= min(k) <= max(k) <= MOST_STEPS:
            raise ValueError(f"{brief(list(k))} should be different whole numbers, at least 1 and at most {MOST_STEPS}")
        return k

    @model_validator(mode="after")
    def _check_options(self) -> Distill:
        low, high = self.guidance if isinstance(self.guidance, tuple) else (self.guidance,) * 2
        if not 0 <= low <= high:
            raise ValueError(f"guidance: {self.guidance} should be at least 0, or [low, high]")
        if self.transition == "unconditional" and self.eta != 1:
            raise ValueError(f"eta: {self.eta} belongs to the conditional transition")
        if self.update == "instant" and self.batch % 2:
            raise ValueError(f"batch: {self.batch} is odd, and instant cuts every batch into halves")
        if self.update == "instant" and (self.auxiliary_sees_t or self.auxiliary_updates > 1):
            raise ValueError("auxiliary_sees_t and auxiliary_updates: instant has no auxiliary")
        return self

    @property
    def guided(self) -> bool:
        return bool(self.guidance[1] if isinstance(self.guidance, tuple) else self.guidance)

    @property
    def told(self) -> tuple[float, float] | None:
        """The range of guidance that the student is told, if it is one."""
        return self.guidance if isinstance(self.guidance, tuple) and self.guidance[0] < self.guidance[1] else None

    def for_k(self, k: int) -> Distill:
        """This section as it holds for the k-step student alone."""
        own = self.model_dump(exclude={"overrides"}) | {"k": (k,)}
        return Distill.model_validate(merge(own, _of_one(self.overrides.get(k, {}))))


class Evaluate(Section):
    """`samples` for every row of the table, `seeds` times."""

    samples: int = Field(1000, ge=10)
    seeds: int = Field(3, ge=1)
    teacher_steps: tuple[Steps, ...] = Field((1, 2, 4, 8, 16, 64, 256), min_length=1)
    samplers: tuple[Literal["ancestral", "ddim", "heun"], ...] = ("ancestral", "ddim")
    teacher_noise: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (), description="extra noise, up to 1, of the teacher's ancestral steps: to tune it before it is compared with"
    )
    guidance: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (), description="strengths at which the teacher, and students that were told it, are measured too"
    )
    reference: str | None = Field(
        None, description="a folder of reference statistics; by default those of the run's data"
    )
    neighbours: int = Field(3, ge=1, description="k of precision and recall")
    neighbour_samples: int = Field(
        10_000, ge=10, description="at most so many a side for precision, recall and kernel distance"
    )
    kid_subsets: int = Field(0, ge=0, description="of 1,000 each, as the field has 100 of; 0: all pairs, the same mean")
    inception_splits: int = Field(10, ge=1)

    @field_validator("samplers", "teacher_steps", "teacher_noise", "guidance")
    @classmethod
    def _once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(values)) < len(values):
            raise ValueError(f"{brief(list(values))} has one of them twice")
        return values

    @model_validator(mode="after")
    def _enough(self) -> Evaluate:
        if "ancestral" not in self.samplers:
            raise ValueError(
                "samplers: ancestral, by which students are compared with their teacher, should be among them"
            )
        if (most := min(self.samples, self.neighbour_samples) - 1) < self.neighbours:
            raise ValueError(
                f"neighbours: {self.neighbours} should be at most {most}, one fewer than the samples compared"
            )
        if self.inception_splits > self.samples:
            raise ValueError(f"inception_splits: {self.inception_splits} is more than the {self.samples} samples")
        return self


class Gate(Section):
    """What a student must show before an alias is moved to it. Kept with every registered version, as it was then.

    teacher_ratio  1: a student no nearer to the data than its teacher in as many steps has nothing to offer over the teacher's
                   own sampler. This fits every k as it is, since the teacher's distance falls with k: on the digits students of 1,
                   2, 4, 8 steps stand at .03, .10, .12, .13 of it.
    frechet        none: a distance means something in one set of features and one count of samples only. For a recipe's own goal.
    recall         .3 is there to stop a student that has lost most of the data. In the ablations (docs/ablation) trainings that had
                   failed end below it (digits of 1 and 2 steps at a distance above .99: 0 to .29); of the others one does, and
                   the recipes' own settings stand above (.46 to .88 on the digits, .66 and more on the mixture).
    spreads        1: samplings with other seeds differ by about as much, so that what lies within it is no worse. A measurement of
                   one seed has no spread; any distance above the champion's is then worse.
    overrides      per k, the fields that differ, as in distill.
    """

    teacher_ratio: float | None = Field(1.0, gt=0, description="largest distance, over the teacher's at the same steps")
    frechet: float | None = Field(None, gt=0, description="largest distance")
    recall: float = Field(0.3, ge=0, le=1, description="least recall")
    spreads: float = Field(1.0, ge=0, description="how far above the champion's distance, in spreads of the two")
    overrides: dict[Steps, dict[str, Any]] = {}

    def for_k(self, k: int) -> Gate:
        """This section as it holds for the k-step student alone."""
        own = self.model_dump(exclude={"overrides"})
        return Gate.model_validate(merge(own, _of_one(self.overrides.get(k, {}))))


def _of_one(overrides: dict[str, Any]) -> dict[str, Any]:
    """The settings for one k. Raises ValueError for one that is of all of them."""
    for name in ("k", "overrides"):
        if name in overrides:
            raise ValueError(f"{name}: can't differ for one k")
    return overrides


class RunConfig(Section):
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
        """What the names of files and of MLflow's registered models are made of."""
        if not NAME.fullmatch(name) or len(name.encode()) > LONGEST:
            raise ValueError(
                f"{brief(name)} can't be a recipe's name, which names files and registered models: it takes letters, digits, "
                f"spaces and _ . + = , ~ -, begins with a letter, a digit or _, and has at most {LONGEST} bytes"
            )
        return name

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> RunConfig:
        for k in self.distill.overrides:
            try:
                self.distill.for_k(k)
            except ValueError as error:
                raise ValueError(f"distill.overrides.{k}.{one_line(error, Distill)}") from None
        for k in self.gate.overrides:
            try:
                self.gate.for_k(k)
            except ValueError as error:
                raise ValueError(f"gate.overrides.{k}.{one_line(error, Gate)}") from None
        # Of a data set that lies elsewhere nothing is asked if the configuration is only to be shown.
        source = None if info.context == ONLY_SHOWN and self.data.source == "dataset" else source_of(self.data)
        exact = self.teacher.kind == "exact"
        if exact and (source is None or source.exact is None):
            raise ValueError(f"teacher.kind: exact is not known for {self.data.source}; it is for gmm")
        for k in self.distill.k:
            own = self.distill.for_k(k)
            if exact and own.update == "instant" and own.preconditioner == "adam":
                raise ValueError(
                    "distill.preconditioner: adam has no optimiser to read where the teacher is exact; take collected"
                )
            start = self.distill.for_k(2 * k) if own.warm_start and 2 * k in self.distill.k else own
            if (start.told is None) != (own.told is None):
                raise ValueError(
                    f"distill.overrides: of {2 * k} and {k} steps one is told its guidance, so neither can start the other"
                )
            if own.guided:
                if source is not None and not source.num_classes:
                    raise ValueError(
                        f"distill.guidance: {self.data.source} has no labels, so there is nothing to guide by"
                    )
                if not self.teacher.label_dropout and not exact:
                    raise ValueError(
                        "distill.guidance: teacher.label_dropout is 0, so the teacher never learns the null label that guidance "
                        "needs; 0.1 is usual"
                    )
        labelled = source is None or bool(source.num_classes)
        if self.evaluate.guidance and not (labelled and (self.teacher.label_dropout or exact)):
            raise ValueError(
                "evaluate.guidance: the teacher can't be guided: it needs labels, and teacher.label_dropout"
            )
        if self.prediction == "eps" and self.schedule.name != "karras":
            raise ValueError(
                "prediction: eps says nothing of the image at t = 1, where sampling starts and no signal is left; take v, x or flow"
            )
        if self.network.width % self.network.heads:
            raise ValueError(f"network.heads: {self.network.heads} does not divide network.width {self.network.width}")
        if source is None:
            return self
        self._check_extractor(source)
        if (size := source.shape[1]) % self.network.patch:
            raise ValueError(f"network.patch: {self.network.patch} does not divide the image size {size}")
        return self

    def _check_extractor(self, source: Source) -> None:
        kind = self.data.extractor
        if kind in ("classifier", "mixture") and not source.num_classes:
            raise ValueError(
                f"data.extractor: {kind} needs labels, which {self.data.source} has not; use pixels, or inception and a file "
                "of its weights in data.extractor_weights"
            )
        if kind == "inception" and (channels := source.shape[0]) not in (1, 3):
            raise ValueError(f"data.extractor: inception takes 1 or 3 channels, {self.data.source} has {channels}")

    def yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _over(recipe: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given`, the later, on top of a recipe. A field that it sets for all k holds for all of them: what the recipe has of that
    field for one k goes, and what `given` has for one k comes before both.
    """
    for name in ("distill", "gate"):
        section, said = recipe.get(name), given.get(name)
        if isinstance(section, dict) and isinstance(said, dict) and isinstance(section.get("overrides"), dict):
            of_k = {k: without(own, said) if isinstance(own, dict) else own for k, own in section["overrides"].items()}
            recipe = recipe | {name: section | {"overrides": of_k}}
    return merge(recipe, given)


def _by_k(values: dict[str, Any]) -> dict[str, Any]:
    """The values with each k of `overrides` a whole number: "4" and 4 are one."""
    for name in ("distill", "gate"):
        section = values.get(name)
        if isinstance(section, dict) and isinstance(section.get("overrides"), dict):
            of_k: dict[Any, Any] = {}
            for key, own in section["overrides"].items():
                k = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key
                if k in of_k or isinstance(k, bool):
                    raise ConfigError(
                        f"{name}.overrides: {key!r} {'is no k' if isinstance(k, bool) else 'stands twice'}"
                    )
                of_k[k] = own
            values = values | {name: section | {"overrides": of_k}}
    return values


def _for_its_data(recipe: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The recipe less what it says of its own data, if the command line names a data set, or a source with a shape of its own."""
    own, said = recipe.get("data"), given.get("data")
    source = str(said.get("source", "")) if isinstance(said, dict) else ""
    if not (source in SOURCES or source == "dataset" or source.startswith(DATA_SET)):
        return recipe
    if isinstance(own, dict) and own.get("source") != source:
        recipe = recipe | {"data": {name: value for name, value in own.items() if name not in OF_THE_DATA}}
    teacher = recipe.get("teacher")
    if isinstance(teacher, dict) and (source not in SOURCES or SOURCES[source].exact is None):
        recipe = recipe | {"teacher": without(teacher, {"kind": None})}
    return recipe


@cache
def recipe_names() -> tuple[str, ...]:
    return tuple(sorted(p.stem for p in RECIPES.glob("*.yaml")))


def recipe_file(recipe: str) -> Path:
    """The file of a recipe: of the house's, by name, or the user's own. Raises ConfigError where there is none."""
    path = expanded(recipe)
    if path.suffix in (".yaml", ".yml"):
        if not exists(path):
            raise ConfigError(f"recipe: no such file {recipe}")
        return path
    if recipe in recipe_names():
        return RECIPES / f"{recipe}.yaml"
    raise ConfigError(
        f"recipe: {brief(recipe)} does not exist; there are: {', '.join(recipe_names())}, or a .yaml file"
    )


def read_mapping(path: Path, what: str, holds: str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError that begins with `what` the file is, and says what it `holds`."""
    try:
        values = parsed(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{what}: {path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{what}: {path} is {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{what}: {path} should hold {holds}, not a {type(values).__name__}")
    return values


def chain(recipe: str) -> list[tuple[Path, dict[str, Any]]]:
    """A recipe's file with what it says, and before it those that it extends, the first of all first. A file that is named by
    `extends` lies beside the one that names it, unless its path is absolute. Raises ConfigError.
    """
    found: list[tuple[Path, dict[str, Any]]] = []
    name: str | None = recipe
    while name is not None:
        path = recipe_file(name)
        if any(exists(other) and path.samefile(other) for other, _ in found):
            names = " extends ".join(str(other) for other in (*(other for other, _ in reversed(found)), path))
            raise ConfigError(f"recipe: {names}: in a circle")
        values = _by_k(read_mapping(path, "recipe", "sections"))
        name = _beside(path, values.pop("extends", None))
        found.insert(0, (path, values))
    return found


def _beside(path: Path, parent: Any) -> str | None:
    """The recipe that the one at `path` extends."""
    if parent is None:
        return None
    if not isinstance(parent, str) or not parent.strip():
        raise ConfigError(
            f"recipe: {path}: extends: {brief(parent)} should be a recipe's name, or a .yaml file beside it"
        )
    if Path(parent).suffix not in (".yaml", ".yml"):
        return parent
    return str(path.parent / expanded(parent))


def whole(recipe: str) -> dict[str, Any]:
    """What a recipe says, with what it extends below it. Raises ConfigError."""
    return reduce(_over, (values for _, values in chain(recipe)), dict[str, Any]())


def sendable(recipe: str) -> bytes:
    """A recipe's file for another machine: as it is, or, where it extends other files of the user's, with what they say in it.
    Raises ConfigError.
    """
    own = [path for path, _ in chain(recipe) if path.parent != RECIPES]
    return own[0].read_bytes() if len(own) == 1 else yaml.safe_dump(whole(recipe), sort_keys=False).encode()


def exists(path: Path) -> bool:
    """Whether it is a file; a name that no file can have is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _parse_override(text: str) -> dict[str, Any]:
    field, equals, value = text.partition("=")
    field = field.strip()
    if not equals or not all(field.split(".")):
        raise ConfigError(f"--set: {brief(text)} should read section.field=value")
    if field.count(".") >= DEEPEST:
        raise ConfigError(f"--set: {brief(field)}: no such option")
    try:
        result = parsed(value)
    except ValueError as error:
        raise ConfigError(f"--set: the value of {brief(text)} is {error}") from None
    if isinstance(result, str) and POWER.fullmatch(result):  # YAML 1.1 reads 1e-3 as text
        result = float(result)
    return _by_k(nested(field, result))


def _fields_at(model: Any, path: tuple[Any, ...]) -> list[str]:
    """The names that are valid where `path` ends, below `model`, for a message about an unknown one."""
    for part in path:
        info = getattr(model, "model_fields", {}).get(part)
        if info is None:
            return []
        model = info.annotation
    return sorted(getattr(model, "model_fields", {}))


KIND = re.compile(r"^(float|tuple\[.*\]|\[key\])$")
"""Of the places that an error names, those that are no field."""


def _first(error: ValidationError) -> Any:
    """The first mistake; of a field that is a number or a list of them, that of what was given."""
    first, *others = error.errors()
    if first["loc"] and first["loc"][-1] == "float":
        others = [e for e in others if e["loc"][: len(first["loc"]) - 1] == first["loc"][:-1]]
        first = next((e for e in others if isinstance(first["input"], (list, tuple))), first)
    return first


def one_line(error: ValueError, model: type[Section]) -> str:
    """The first mistake: its field, its value, what was expected, and the nearest name if it was misspelt."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = _first(error)
    value, parts = first.get("input"), [p for p in first["loc"] if not KIND.search(str(p))]
    where = ".".join(" ".join(str(p).split()) for p in parts)
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if first["type"] == "extra_forbidden":
        names = _fields_at(model, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"{where}: no such option; {hint}valid: {', '.join(names)}"
    if first["type"] == "literal_error":
        return f"{where}: {brief(value)} is not one of {first['ctx']['expected']}"
    if first["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {brief(value)} {message}"


def load_config(
    recipe: str, overrides: list[str] | None = None, *, smoke: bool = False, only_shown: bool = False
) -> RunConfig:
    """The resolved configuration of a recipe (a name, or a path to a YAML file); `smoke`: made small; `only_shown`: what depends on
    a data set is not checked, so that none is looked for. Raises ConfigError, in one line.
    """
    given: dict[str, Any] = reduce(merge, map(_parse_override, overrides or []), dict[str, Any]())
    context = ONLY_SHOWN if only_shown else None
    own = _over(_for_its_data(whole(recipe), given), given)
    config = _resolve({"recipe": Path(recipe).stem} | own, context)
    # What the command line says holds for the small run too.
    return _resolve(merge(smoke_values(config), given), context) if smoke else config


def _resolve(values: dict[str, Any], context: dict[str, Any] | None = None) -> RunConfig:
    # Merged over the defaults as values: a recipe that names one field of a section leaves that section's others as they are.
    try:
        return RunConfig.model_validate(merge(_defaults(), values), context=context)
    except ValidationError as error:
        raise ConfigError(one_line(error, RunConfig)) from None


@cache
def _defaults() -> dict[str, Any]:
    return RunConfig(recipe="defaults").model_dump()


def digest(value: Any, length: int = 12) -> str:
    """A short stable hash of anything JSON can hold."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]
