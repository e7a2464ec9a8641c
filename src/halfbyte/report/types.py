"""What a report says, as types: of a run (report.json), of its plan, a KV cache, an evaluation, a checkpoint.

A report is read only, and its entries are attributes by their names in report.json; `report["output"]` reads one too.
Entries that are not known of a run are not written.
"""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, Field, SerializerFunctionWrapHandler, field_serializer

from halfbyte.recipe import Entries, Recipe
from halfbyte.report.summary import headline, measured, measured_table, table

SCHEMA = 1
"""Counted up when an entry of report.json is renamed or means something else. One without it is read as of the
first."""

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Mean = Annotated[tuple[float, float | None], Field(strict=False)]
"""A mean and its standard error, which nobody knows of one value."""
Shape = Annotated[tuple[Count, ...], Field(strict=False, min_length=2)]


class Part(Entries, BaseModel, frozen=True, strict=True, extra="allow", protected_namespaces=()):
    """A part of a report."""  # BaseModel by name: linters look for it in this file

    def as_dict(self) -> dict[str, Any]:
        """All of it, as report.json has it."""
        return self.model_dump(exclude_unset=True)

    def __str__(self) -> str:
        """What a terminal shows of it, in place of every entry."""
        return repr(self)


class Origin(Part, frozen=True):
    """A model: where it was, and the digest of its files."""

    path: str
    xxh3_128: str | None = None


class Lineage(Origin, frozen=True):
    """A model and those that it was made of."""

    made_of: list[Origin] | None = None
    """Nearest first; empty for an original, None where it is quantized and nobody says of what."""


class Provenance(Part, frozen=True):
    """What a source's own card says of where it comes from and under which terms."""

    name: str
    repository: str | None = None
    """Its id on the hub, org/name."""
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    base_models: list[str] = []
    """Hub ids of what it was made from."""
    tags: list[str] = []
    languages: list[str] = []
    pipeline_tag: str | None = None

    @property
    def made_of(self) -> list[str]:
        """Hub ids of what a quantized version of it was made from: itself, or what is known to be behind it."""
        return [self.repository] if self.repository else self.base_models


class Source(Lineage, frozen=True):
    """The checkpoint that a run read."""

    hub: str | None = None
    """Its id on the hub, if it was asked for by one."""
    provenance: Provenance | None = None
    has_chat_template: bool = False
    is_decoder: bool = True
    """Others are not measured: eval runs decoders on text."""
    model_type: str
    dtype: str
    size_bytes: Count
    parameters: Annotated[Count, Field(gt=0)]


class Output(Part, frozen=True):
    """The checkpoint that a run wrote."""

    container: str
    grid: str | None = None
    """What its quantized weights are on, in a word."""
    size_bytes: Count
    """Of all its tensors."""
    bits_per_weight: float | None
    """Of quantized weights, scales counted."""
    bits_per_parameter: float
    """Of all parameters, everything counted."""
    quantized: Count
    """How many weights are quantized."""
    kept: Count
    """How many tensors are not."""
    file: str | None = None
    """The file that an engine opens; None: the folder."""
    files: list[str] = []
    """Of a plan: the files of tensors."""


class EngineReport(Part, frozen=True):
    """Whether an engine loads the output."""

    engine: str
    loads: bool
    word: str
    """What this rests on: tested here, documented there, or refused."""
    source: str
    """The test of this repository, or the file or page of the engine's."""
    reasons: list[str]
    """Why it is refused, and what would work."""
    notes: list[str]
    tensor_parallel: list[int]
    """Over how many GPUs it can be split."""
    command: str | None
    """What serves the folder {path}."""


class PlannedWeight(Part, frozen=True):
    """What a weight becomes."""

    name: str
    grid: str
    shape: Shape
    bits_per_weight: float
    note: str = ""


class ActivationReport(Part, frozen=True):
    """How the activations that a weight is multiplied by are rounded, on the calibration tokens; beside this, what is
    stored for it (scale, zero)."""

    grid: str
    low: float
    high: float
    error: float
    """Relative."""
    values: Count
    saturated: Count
    """How many values were beyond what the scale spans."""
    clipped: float
    """The share of these."""


class Distribution(Part, frozen=True):
    """How values are spread: their extremes, and percentiles of evenly spaced ones."""

    low: float
    p0_1: float
    p1: float
    p25: float
    median: float
    p75: float
    p99: float
    p99_9: float
    high: float


class OutlierChannel(Part, frozen=True):
    """An in-feature that is many times larger than the median one."""

    channel: Count
    largest: float
    """The largest size of its values."""


class ActivationDistribution(Distribution, frozen=True):
    """The same of what a weight reads on the calibration tokens, after transforms and before it is rounded."""

    median_channel: float
    """The largest size of the values of the median in-feature."""
    outliers: list[OutlierChannel]
    """The largest in-features, if any is far above the median one."""


class WeightReport(PlannedWeight, frozen=True):
    """What became of a weight."""

    error: float
    """Relative error: of the outputs on the calibration tokens, or of the weights where there are none."""
    tokens: Count | None = None
    """How many calibration tokens reached it."""
    activations: ActivationReport | None = Field(
        default=None,
        validation_alias=AliasChoices("activations", "input"),  # as it was called once
    )
    """How what it is multiplied by is rounded, where calibration saw that."""
    worst_row: float = 0.0
    """The largest relative error of a row, of those that were looked at."""
    distribution: Distribution | None = None
    """Of its values before they were rounded, after transforms; None where these were on a grid already."""
    activation_distribution: ActivationDistribution | None = None
    """None where no text ran through the model."""


class FoldReport(Part, frozen=True):
    """A scale that was moved from what reads a tensor into what makes it."""

    producer: str
    readers: list[str]
    alpha: float | None = None
    error: float | None = None
    """After the fold, as a share of that before it."""


class RotationReport(Part, frozen=True):
    """A rotation of hidden states that weights have in them, and how it was proved."""

    kind: str
    """`hadamard`, or `random` where no such matrix is known; with `-mean` if it keeps the mean that norms subtract."""
    seed: Count
    channels: Count
    """Of a hidden state."""
    tensors: Count
    """That took part."""
    heads: Count
    """Of these, tensors that make or read values of attention heads that are rotated by themselves."""
    untied_bytes: Count
    """What the head takes that was the embedding, in the source's precision; 0 where it was not."""
    error: float
    """How far the rotated model's logits are from the original's on random tokens, relative to these, in 32 bits."""


class Environment(Part, frozen=True):
    """What a run ran on: versions, threads, and the processor's instructions."""

    python: str
    torch: str
    transformers: str
    numpy: str
    numba: str
    threads: Count
    instructions: str


class Devices(Part, frozen=True):
    """What computed each part of a run, such as `cpu` or `cuda:0 (NVIDIA H100)`."""

    solve: str
    """Fitting, factorisation and rounding."""
    calibration: str | None = None
    """The model's forward; None where no text ran through it."""


class CalibrationReport(Part, frozen=True):
    """The text that ran through the model."""

    source: str
    windows: Shape
    """How many, and of how many tokens each."""
    opening: list[str] = []
    """The tokens that every window begins with."""
    chats: Count = 0
    """How many windows are of chats."""
    chat_opening: list[str] | None = None
    tokens_sha256: str


class AttentionReport(Part, frozen=True):
    """The scales of one attention's cached keys and values: the largest, where heads have their own."""

    module: str
    key_scale: float | None
    """None: it is found as the engine runs."""
    value_scale: float | None
    keys_clipped: float = 0.0
    """The share of keys beyond what the scale spans, on text that it was not found with."""
    values_clipped: float = 0.0


class CacheReport(Part, frozen=True):
    """A quantized KV cache."""

    grid: str
    observer: Annotated[str, Field(validation_alias=AliasChoices("observer", "input_range"))]
    """What the scales span."""
    calibration: CalibrationReport
    rows: list[AttentionReport]
    most_clipped: float
    """The largest share of an attention's keys or values beyond their scales."""
    serve: str
    """What to tell an engine."""
    device: str | None = None
    """What ran the model."""
    warnings: list[str]
    seconds: float | None = None


class ComparedWith(Part, frozen=True):
    """The original that models were compared with, and what ran them."""

    device: str | None = None
    reference_path: str
    reference_adapter: str | None = None
    reference_xxh3_128: str | None = None


class ModelRun(Part, frozen=True):
    """A model, and the KV cache that it ran with."""

    path: str
    kv: str | None = None


class Conditions(ComparedWith, frozen=True):
    """What an evaluation was measured on."""

    compared: str
    """`predictions`, or `last hidden states` of models that predict no tokens."""
    text: str
    text_name: str | None = None
    """What it is called, such as by its language."""
    length: Count
    windows: Count
    tokens_sha256: str
    convention: str
    opening: list[str] = []


class Measured(Part, frozen=True):
    """A model on the tokens of an evaluation."""

    tokens: Count
    """How many of its predictions, or states, were scored."""
    size_bytes: Count | None = None
    bits_per_parameter: float | None = None


class Perplexity(Measured, frozen=True):
    """How well a model predicts the tokens."""

    nll: float
    """Nats per token."""
    perplexity: float
    perplexity_error: float | None = None


class AtPositions(Part, frozen=True):
    """A measure at some positions of the windows, of which each token before them was read."""

    first: Count
    last: Count
    kl: float
    kl_error: float | None


class OfClass(Part, frozen=True):
    """A measure where a token of a kind comes next."""

    name: str
    tokens: Count
    kl: float
    kl_error: float | None


class Divergence(Perplexity, frozen=True):
    """How far a model's predictions are from the reference's, in nats per token."""

    path: str
    kv: str | None = None
    """The KV cache that it ran with; None: in 16 bits."""
    kl: float
    kl_error: float | None
    reverse_kl: Mean | None = None
    """From the model to the reference: what it says that the reference would not."""
    kl_median: float
    kl_p99: float
    kl_max: float
    kl_by_position: list[AtPositions] = []
    kl_by_class: list[OfClass] = []
    in_calibration: float | None = None
    """Share of the text's runs of four letters that the model's calibration text has: below 0.8 it is in another
    language; None where that text is not known."""
    findings: list[str] = []
    """What stands out: kinds of tokens, positions, languages, weights, inputs."""
    same_top: float
    """The share of places where both have the same most likely token."""
    same_top_error: float | None = None
    probability_change: float
    """Of the token that came next: the mean."""
    probability_change_rms: float
    """The same, root mean square."""
    nll_minus_reference: Mean | None = None
    perplexity_minus_reference: Mean | None = None
    kl_minus_first: Mean | None = None
    """Token by token, against the first of the models."""
    nll_minus_first: Mean | None = None


class StateError(Measured, frozen=True):
    """How far a model's last hidden states are from the reference's, relative to the length of these."""

    path: str
    kv: str | None = None
    state_error: float
    state_error_error: float | None
    """The standard error of the mean."""
    state_error_p99: float
    state_error_max: float
    cosine: float
    cosine_min: float


class Gate(Part, frozen=True):
    """A limit that a model was to keep to."""

    path: str
    kv: str | None = None
    of: str = "predictions"
    """What was held to it: `predictions` of a text, or answers of suites or tasks."""
    name: str
    limit: float
    value: float
    holds: bool


class Evaluation(Conditions, frozen=True):
    """Models of which predictions were compared with the reference's."""

    reference: Perplexity
    noise_floor: Divergence | None = None
    """The reference computed in bfloat16: less than this cannot be told from rounding while a model runs."""
    models: list[Divergence]
    gates: list[Gate] = []
    """The limits that were asked for, for every model."""
    warnings: list[str] = []

    def __repr__(self) -> str:
        return f"<Evaluation: {measured(self)}>"

    def _repr_html_(self) -> str:
        return measured_table(self)


class StatesEvaluation(Conditions, frozen=True):
    """Models of which last hidden states were compared with the reference's."""

    reference: Measured
    models: list[StateError]
    warnings: list[str] = []


class EvaluationRecord(Conditions, frozen=True):
    """One model of an evaluation, for the report beside it."""

    foreign: bool = False
    """Whether the reference is another model than it was made of."""
    reference: Perplexity
    model: Divergence
    other_caches: list[Divergence] = []
    """The same model with other KV caches."""


class StatesRecord(Conditions, frozen=True):
    """The same for last hidden states."""

    foreign: bool = False
    reference: Measured
    model: StateError
    other_caches: list[StateError] = []


class Blamed(Part, frozen=True):
    """A part of a quantized model that was put back as it was."""

    name: str
    kind: str
    """`block`, `weight` (or several that share a scale), `embedding`, `head`, or `KV cache`."""
    kl: Mean
    """What it gives back in KL divergence, in nats per token."""
    error: float | None = None
    """The largest relative error of its weights, as the run reported them."""


class Blame(Conditions, frozen=True):
    """What each part of a quantized model costs, most first."""

    path: str
    kl: Mean
    """Of the model as it is."""
    parts: list[Blamed]
    warnings: list[str] = []


class Recalled(Part, frozen=True):
    """Facts at one place of texts of one length: the mean over facts."""

    length: Count
    """Tokens."""
    depth: float
    """0: the text begins with the fact; 1: it ends with it."""
    gain: float
    """How much likelier the fact's having been told makes the answer, in nats per token."""
    found: float
    """The share of answers that greedy decoding gives."""


class NeedleModel(ModelRun, frozen=True):
    """A model of a needle test: a row for every length and depth."""

    rows: list[Recalled]


class NeedleConditions(ComparedWith, frozen=True):
    """What a needle test was measured on."""

    text: str
    lengths: list[Count]
    depths: Annotated[Count, Field(gt=0)]
    facts: Count
    seed: Count
    reference: list[Recalled]


class Needle(NeedleConditions, frozen=True):
    """How well models read back facts that were planted in long texts."""

    models: list[NeedleModel]
    warnings: list[str] = []


class NeedleRecord(NeedleConditions, frozen=True):
    """One model of a needle test, for the report beside it."""

    model: NeedleModel


class Paired(Part, frozen=True):
    """The same items, put to the original and to a model."""

    name: str
    items: Count
    """Those of which an answer is right or wrong, or gets a score."""
    original: float | None
    """The share that it gets right, or its mean score; None of no items."""
    model: float | None
    difference: Mean | None
    """Of the model from the original, item by item."""
    lost: Count
    """Items that the original got right and the model does not, or that it scores less on."""
    gained: Count


class Flip(Part, frozen=True):
    """An answer that is right of one of the two alone."""

    line: Count
    """Of the suite's file."""
    prompt: str
    original: str
    model: str
    lost: bool
    """Whether it was the original that was right."""


class SuiteResult(Paired, frozen=True):
    """One model on one suite of prompts."""

    prompts: Count
    changed: Count
    """Of prompts with choices: where the two choose differently, right or wrong."""
    parts_after: list[Count | None]
    """Of each answer that was generated: after how many tokens it parts from the original's; None: it does not."""
    median_parting: float | None
    """Of those that part."""
    loops: Annotated[tuple[Count, Count], Field(strict=False)]
    """Answers that end in repeating themselves: of the original, of the model."""
    flips: list[Flip]


class AnswerConditions(ComparedWith, frozen=True):
    """Of whom and how answers were had."""

    dtype: str
    """That both computed in."""


class SuiteModel(ModelRun, frozen=True):
    """A model on all suites that were asked for."""

    suites: list[SuiteResult]


class SuiteFile(Part, frozen=True):
    """A suite: its name or file, and the digest of that."""

    name: str
    sha256: str


class SuiteConditions(AnswerConditions, frozen=True):
    """What suites were measured on."""

    files: list[SuiteFile]
    tokens: Count | None = None
    """The most that an answer had, in place of each prompt's own limit."""


class SuiteEvaluation(SuiteConditions, frozen=True):
    """What averages hide: models on suites of prompts."""

    models: list[SuiteModel]
    gates: list[Gate] = []
    warnings: list[str] = []


class SuiteRecord(SuiteConditions, frozen=True):
    """One model of these, for the report beside it."""

    model: SuiteModel


class TaskResult(Paired, frozen=True):
    """One model on one task of lm-eval, by one of its scores."""

    metric: str
    filter: str | None = None
    """How the answer was found in what was said, where the task knows several ways."""


class TaskModel(ModelRun, frozen=True):
    """A model on all tasks that were asked for."""

    tasks: list[TaskResult]


class TaskConditions(AnswerConditions, frozen=True):
    """How tasks were measured."""

    lm_eval: str
    """Its version."""
    limit: Count | None = None
    """Items of each task; None: all."""
    shots: Count | None = None
    """Examples before each item; None: as the task says."""
    as_chat: bool = False


class TaskEvaluation(TaskConditions, frozen=True):
    """Models on tasks of lm-eval."""

    models: list[TaskModel]
    gates: list[Gate] = []
    warnings: list[str] = []


class TaskRecord(TaskConditions, frozen=True):
    """One model of these, for the report beside it."""

    model: TaskModel


class Versioned(Part, frozen=True):
    """What every report.json says of itself."""

    schema_version: int = SCHEMA
    halfbyte: str
    """The version of halfbyte that wrote it."""


class Spread(Part, frozen=True):
    """What was measured several times."""

    median: float
    low: float
    high: float


class Products(Part, frozen=True):
    """Linears that are multiplied by alike."""

    way: str
    """packed: as they are, by a kernel; held: decoded to 16 bits as they were loaded; decoded: for each product;
    rounded: decoded, and what they read is rounded; unquantized."""
    grid: str | None
    linears: Count
    size_bytes: Count
    """In memory."""


class Pace(Part, frozen=True):
    """How fast an engine is with so many sequences of so many tokens."""

    batch: Count
    prompt: Count
    prefill: Spread
    """Tokens of all prompts in a second."""
    first_token: Spread
    """Seconds from the prompts to the first token of each."""
    decode: Spread
    """Further tokens of all sequences in a second."""
    prefill_share: float | None = None
    """Of the arithmetic that was measured, what prefill multiplies; its attention is not counted."""
    decode_share: float | None = None
    """Of the bandwidth that was measured, what decoding reads: weights and cache."""
    decode_arithmetic_share: float | None = None
    """Of the arithmetic, what decoding multiplies."""
    products_share: float | None = None
    """Of the time of a step of decoding, what products take; None where it was not measured."""
    prefill_ratio: float | None = None
    """To the original in the same run."""
    decode_ratio: float | None = None


class Runtime(ModelRun, frozen=True):
    """A model in an engine."""

    engine: str
    version: str
    dtype: str | None = None
    """That it computes in; None: it does not say."""
    activations: str | None = None
    """exact, or int8: how halfbyte's kernels take what packed weights are multiplied with."""
    size_bytes: Count
    """Of its tensors, as they lie in the file."""
    read_bytes: Count
    """Of weights, that a token reads."""
    head_bytes: Count
    """Of these, the head's."""
    load_seconds: float
    """The file may have been in the system's cache."""
    memory_bytes: Count | None
    """The most that its process had; None where the system does not say."""
    device_bytes: Count | None = None
    """Of a GPU's memory."""
    products: list[Products] = []
    """Of what halfbyte multiplies by."""
    paces: list[Pace]
    compared_with: str | None = None
    """The engine in which the original ran that ratios are to."""
    notes: list[str] = []
    reasons: list[str] = []
    """Why it is as fast as it is."""

    def __str__(self) -> str:
        return f"{self.path} in {self.engine}" + (f", {self.activations}" if self.activations else "")


class Machine(Part, frozen=True):
    """What can be reached at most, measured in the same run."""

    device: str
    threads: Count
    cores: Count | None
    """That the system has; None where it does not say."""
    bandwidth: Spread
    """Bytes of a large buffer that are read in a second."""
    arithmetic: dict[str, Spread]
    """Operations in a second of a product of square matrices, by their dtype."""


class SpeedConditions(Part, frozen=True):
    """How speed was measured."""

    machine: Machine
    tokens: Count
    """That were decoded."""
    repeats: Count
    in_turn: bool
    """Whether all were in memory at once, and took turns; else one after another, each with all of its repeats."""
    reference_path: str | None = None


class Speeds(SpeedConditions, Versioned, frozen=True):
    """Models in engines, in one run."""

    models: list[Runtime]
    reference: list[Runtime]
    """The original."""
    failed: dict[str, str] = {}
    """Models in engines that did not run them, and why."""
    left_out: dict[str, str] = {}
    """Engines that were not asked, and why."""
    warnings: list[str] = []


class SpeedRecord(SpeedConditions, frozen=True):
    """One model of these, for the report beside it."""

    models: list[Runtime]
    """The model in each engine."""
    reference: list[Runtime]


class Measurements(Versioned, frozen=True):
    """What lies beside a checkpoint as report.json: what was measured of it."""

    evaluations: list[EvaluationRecord] = []
    evaluation: EvaluationRecord | None = None
    """The one that the card shows: the longest against the source."""
    states: StatesRecord | None = None
    needle: NeedleRecord | None = None
    blame: Blame | None = None
    """What each part costs, against the source."""
    suites: SuiteRecord | None = None
    """What averages hide, against the source."""
    foreign_states: StatesRecord | None = None
    foreign_needle: NeedleRecord | None = None
    foreign_suites: SuiteRecord | None = None
    tasks: TaskRecord | None = None
    foreign_tasks: TaskRecord | None = None
    speed: SpeedRecord | None = None
    """How fast it was, and why, where that was asked to be put here."""


class CacheRecord(Measurements, frozen=True):
    """The report beside a checkpoint of another tool, to which a KV cache was added."""

    kv: CacheReport


class Resources(Part, frozen=True):
    """What a run takes at its worst moment; None: it is not known."""

    memory_bytes: Count | None
    """Of the process, libraries and all."""
    device_bytes: Count | None = None
    """Of a GPU's memory."""
    disk_bytes: Count
    """Of the output, and of hidden states that memory does not hold."""
    seconds: float | None = None
    """From the beginning of the run to its end; before it, an estimate."""


class PolishReport(Part, frozen=True):
    """What tuning the whole model, codes left as they are, has won on windows of text that it was not tuned to."""

    kl_before: float
    """Divergence from the original in nats per token, as blocks were left."""
    kl: float
    steps: Count
    """After which it was least."""
    windows: Count
    """Of the calibration text that it was tuned to."""
    held_out: Count
    """... and of those that judge."""
    numbers: Count
    """That may have changed: scales, offsets, norms and biases."""
    unquantized: list[str]
    """Tensors that are not quantized and have changed."""


class BudgetReport(Part, frozen=True):
    """A budget that chose the grid of each weight."""

    asked: str
    """In words."""
    limit_bytes: Count | None
    """Of the files of tensors; None where a loss was limited."""
    file_bytes: Count
    """Of the files, headers counted."""
    predicted_kl: float
    """Divergence from the original in nats per token: the sum of what single weights lose."""
    sensitivity: str = "predicted"
    """How that was found: predicted by the second derivative at the original, or measured, each weight alone."""
    grids: dict[str, Count]
    """How many weights got which."""


class Planned(Versioned, frozen=True):
    """What is known of a run before it."""

    planned: Resources | None = None
    """What it was to take."""
    recipe: Recipe
    source: Source
    output: Output
    warnings: list[str]
    engines: list[EngineReport]
    weights: Sequence[PlannedWeight]
    kept: dict[str, str]
    """Tensors that are not quantized, and why."""
    dropped: dict[str, str]
    """Tensors of the source that are not in the output, and why."""
    budget: BudgetReport | None = None
    """What chose the grids, if they were not named."""

    @field_serializer("recipe", mode="wrap")
    def _recipe(self, recipe: Recipe, _: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return recipe.model_dump(mode="json", exclude_none=True)


class Plan(Planned, frozen=True):
    """What a run would do: of `dry_run`."""

    weights: list[PlannedWeight]

    def __repr__(self) -> str:
        return f"<Plan: {headline(self)}>"


class Report(Measurements, Planned, frozen=True):
    """What became of a run: report.json. Shown in one line, and as a table in notebooks; `as_dict()` is all of it."""

    weights: list[WeightReport]
    kv: CacheReport | None = None
    calibration: CalibrationReport | None = None
    error_of: str
    """What the errors of weights are errors of."""
    folds: list[FoldReport] = []
    rotation: RotationReport | None = None
    polish: PolishReport | None = None
    environment: Environment | None = None
    device: Devices | None = None
    peak_memory_bytes: Count | None = None
    """Of the process, before the run too."""
    measured: Resources | None = None
    """What it took; of memory None where the process had had more before."""
    seconds: float

    def __repr__(self) -> str:
        return f"<Report: {headline(self)}>"

    def _repr_html_(self) -> str:
        return table(self)


class Stored(Part, frozen=True):
    """The tensors of a checkpoint that are stored alike."""

    tensors: Count
    weights: Count
    size_bytes: Count
    bits_per_weight: float


class Sizes(Part, frozen=True):
    """How large a checkpoint is, in all and by what its tensors are stored as."""

    size_bytes: Count
    parameters: Count
    bits_per_parameter: float
    grids: dict[str, Stored]


class Inspection(Sizes, frozen=True):
    """What is in a checkpoint, and what the report beside it says of its weights: those that lost most first."""

    path: str
    model_type: str
    """Transformers' name of the decoder's family, or what a GGUF calls its architecture."""
    container: str | None
    """None: it is not quantized."""
    error_of: str | None = None
    weights: list[WeightReport]
    warnings: list[str]
    evaluation: EvaluationRecord | None = None


class Compared(Part, frozen=True):
    """One of two checkpoints that are compared."""

    path: str
    container: str | None
    size_bytes: Count
    bits_per_parameter: float


class ComparedTensor(Part, frozen=True):
    """A tensor in two checkpoints; None where it is in one alone, or not known."""

    name: str
    stored_as: tuple[str | None, str | None]
    """A grid or a dtype."""
    size_bytes: tuple[Count, Count]
    error: tuple[float | None, float | None]
    """Relative errors, as the runs reported them."""
    difference: float | None = None
    """How far the second's values are from the first's, relative to these."""


class Comparison(Part, frozen=True):
    """Two checkpoints side by side."""

    a: Compared
    b: Compared
    tensors: list[ComparedTensor]
    evaluations: list[tuple[EvaluationRecord, EvaluationRecord]]
    """Measurements of both on the same tokens against the same original."""
    recipes: dict[str, tuple[Any, Any]]
    """The words of their recipes that differ."""
    warnings: list[str] = []


class ImatrixReport(CalibrationReport, frozen=True):
    """An importance matrix that was measured."""

    path: str
    matrices: Count
    device: str | None = None
    """What ran the model."""


class DemoRow(Part, frozen=True):
    """One method of the demonstration: what it costs, and what is lost."""

    method: str
    grid: str
    container: str
    bits_per_weight: float
    size_bytes: Count
    kl: float
    kl_error: float | None
    same_top: float
    perplexity: float
    seconds: float


class EngineSupport(Part, frozen=True):
    """The schemes that an engine loads from a container, of a Llama-shaped model."""

    engine: str
    container: str
    tested_here: list[str]
    """Those that a test or a benchmark of this repository runs."""
    documented_there: list[str]
    """Those that the engine's source or documentation says it loads."""
    source: str
    """Where that was read."""
    notes: list[str]


class Support(Part, frozen=True):
    """What fits where."""

    containers: dict[str, list[str]]
    """The schemes that each container holds."""
    engines: list[EngineSupport]


class Page(Part, frozen=True):
    """A page of runs that was written."""

    path: str
    runs: list[str]
    size_bytes: Count


class Upload(Part, frozen=True):
    """An output that was put on the hub."""

    path: str
    repository: str
    url: str
