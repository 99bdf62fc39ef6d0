"""The configuration of a run: one dataclass per group of `configs/`.

Every value is checked where it is set (`__post_init__`); what needs two groups is checked in `validate.py`.
Errors name the key as it is typed on the command line. `sepllm pretrain --keys` prints the descriptions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from sepllm_train.config.keys import at_most, finite, number_or_share, one_of, positive, require, setting
from sepllm_train.config.rotary import RotaryScalingConfig

PATTERNS = ("dense", "sep", "streaming", "fixed")
PLACEMENTS = ("natural", "shuffled", "preceding", "thinned")
# More than any machine holds, and few enough to be looked through before that is known.
MOST_LAYERS = 10_000
MOST_PROCESSES = 2**20
# Three years: what waits is started with times that fit the clock.
MOST_SECONDS = 1e8
BACKENDS = ("auto", "triton", "blocked", "masked", "reference", "dense", "flex")


# Learning rate of a size that has no published one: that of models of some hundred million parameters.
ASSUMED_LR = 6e-4
OPTIMIZERS = ("adam", "muon")


@dataclass
class RecipeConfig:
    """Published settings of a model size: what `optim` takes where it sets nothing, and what the start prints."""

    rate: float | None = setting(None, "Published learning rate; None = not published for this size.")
    vocabulary: int | None = setting(None, "Rows of the published embedding, padding included.")
    micro_batch: int | None = setting(None, "Sequences that a published process computed at once; printed as a hint.")
    gpus: int | None = setting(None, "GPUs of the published run; printed as a hint.")
    tensor: int | None = setting(None, "Tensor-parallel size of the published run; printed as a hint.")

    def __post_init__(self) -> None:
        finite("model.recipe", self)
        positive("model.recipe", self, "vocabulary", "micro_batch", "gpus", "tensor")
        require(self.rate is None or self.rate > 0, f"model.recipe.rate={self.rate} must be above 0.")


@dataclass
class ModelConfig:
    """Shape and block of the transformer. Sizes are counts of features; `ffn` is the width after the gate."""

    name: str = setting("custom", "Name of the shape, for logs and results.")
    layers: int = setting(12, "Transformer layers.")
    hidden: int = setting(768, "Features of a token between layers.")
    heads: int = setting(12, "Query heads of a layer.")
    kv_heads: int | None = setting(None, "Key/value heads; None = one per query head.")
    ffn: int = setting(3072, "Features inside the feed-forward block, after the gate.")
    parallel_residual: bool = setting(True, "Attention and feed-forward block read the same input, as in GPT-NeoX.")
    norm: str = setting("layernorm", "layernorm | rmsnorm.")
    norm_epsilon: float = setting(1e-5, "Added to the variance in norms.")
    activation: str = setting("gelu", "gelu (exact) | gelu_tanh (its tanh approximation, Pythia's) | swiglu.")
    bias: bool = setting(True, "Biases in linear layers.")
    rotary_fraction: float = setting(0.25, "Share of the features of a head with rotary positions.")
    rotary_base: int = setting(10000, "Base of the rotary wavelengths.")
    rotary_scaling: RotaryScalingConfig = field(default_factory=RotaryScalingConfig)
    tied_embeddings: bool = setting(False, "Output layer and embedding share their weights.")
    vocabulary: int | None = setting(
        None,
        "Entries of the vocabulary; None takes the data's tokenizer, or model.recipe.vocabulary with a tokenizer that "
        "it fits. Padding to a multiple of 128 x TP is added to any.",
    )
    init: str = setting(
        "pythia",
        "pythia: std sqrt(2 / (5 hidden)), output projections 2 / (layers sqrt(hidden)); normal: init_std "
        "everywhere, output projections divided by sqrt(2 layers).",
    )
    init_std: float = setting(0.02, "Standard deviation of the weights with init=normal.")
    init_output_std: float | None = setting(
        None, "Standard deviation of the output projections with init=normal; None = init_std / sqrt(2 layers)."
    )
    recipe: RecipeConfig = field(default_factory=RecipeConfig)

    def __post_init__(self) -> None:
        finite("model", self)
        positive("model", self, "layers", "hidden", "heads", "kv_heads", "ffn", "vocabulary", "rotary_base")
        at_most("model", self, layers=MOST_LAYERS, hidden=2**20, ffn=2**24, vocabulary=2**31)
        one_of("model.norm", self.norm, ("layernorm", "rmsnorm"))
        one_of("model.activation", self.activation, ("gelu", "gelu_tanh", "swiglu"))
        one_of("model.init", self.init, ("pythia", "normal"))
        require(
            self.hidden % self.heads == 0,
            f"model.hidden={self.hidden} must be divisible by model.heads={self.heads}.",
        )
        require(
            self.heads % self.query_groups == 0,
            f"model.heads={self.heads} must be divisible by model.kv_heads={self.kv_heads}.",
        )
        require(
            0 <= self.rotary_fraction <= 1,
            f"model.rotary_fraction={self.rotary_fraction} must lie between 0 and 1.",
        )
        self._check_scaling()
        for key in ("init_std", "init_output_std", "norm_epsilon"):
            value = getattr(self, key)
            require(value is None or value > 0, f"model.{key}={value} must be above 0.")

    def _check_scaling(self) -> None:
        """There are frequencies that the scaling can stretch."""
        kind = self.rotary_scaling.rope_type
        require(
            kind is None or self.rotary_features > 0,
            f"model.rotary_scaling.rope_type={kind} scales rotary positions, and model.rotary_fraction="
            f"{self.rotary_fraction} has none.",
        )
        require(
            kind != "ntk" or self.rotary_features > 2,
            f"model.rotary_scaling.rope_type=ntk needs more than 2 rotary features, not {self.rotary_features}.",
        )
        require(
            kind != "yarn" or self.rotary_base > 1,
            "model.rotary_scaling.rope_type=yarn needs model.rotary_base above 1.",
        )

    def entries(self, tokenizer: int) -> int:
        """Entries of the vocabulary with a tokenizer of so many: `vocabulary`, else the published rows where the
        tokenizer is of the published size, which were padded by less than 512, else the tokenizer's own."""
        rows = self.recipe.vocabulary
        if self.vocabulary is None and rows is not None and rows - 512 < tokenizer <= rows:
            return rows
        return self.vocabulary or tokenizer

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.hidden // self.heads

    @property
    def rotary_features(self) -> int:
        """Features of a head that rotate with the position."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def rotary_theta(self) -> float:
        """Base of the rotary wavelengths, with that of `rotary_scaling.rope_type=ntk`."""
        return self.rotary_scaling.base(self.rotary_base, self.rotary_features)

    @property
    def query_groups(self) -> int:
        """Number of key/value heads."""
        return self.kv_heads or self.heads


@dataclass
class AttentionConfig:
    """Keys that are visible to a query: key j is visible to query i iff 0 <= i - j < max(window, horizon of j)."""

    pattern: str = setting(
        "sep", "dense | sep (separators) | streaming (window and initial tokens) | fixed (every interval-th token)."
    )
    initial_tokens: int = setting(3, "First tokens of a sequence, visible to all later ones.")
    window: Any = setting(64, "Neighbours, the token itself included: one number, or one per layer.")
    window_choices: list[int] | None = setting(
        None,
        "Windows that training draws from, one for each step and all layers that are not full; `window` is then "
        "that of validation, generation and export. None = every step has `window`.",
    )
    separators: Any = setting(
        "paper", "paper | all | auto | list of class names | list of {classes: [...], horizon: tokens or forever}."
    )
    density_budget: list[float] = setting(
        [0.08, 0.16], "separators=auto: [least, most] share of the tokens that the chosen classes have."
    )
    placement: str = setting(
        "natural",
        "natural, or a control: shuffled (gaps permuted), preceding (the token before each), thinned (some left out).",
    )
    keep_share: float | None = setting(None, "placement=thinned: the probability with which each separator stays one.")
    interval: int | None = setting(
        None, "pattern=fixed: every interval-th token of the sequence stands in for a separator."
    )
    full_layers: Any = setting("none", "none | first | first_last | list of layer numbers counted from 0.")
    separate_documents: bool = setting(False, "Tokens see nothing of earlier documents of their sequence.")
    restart_positions: bool = setting(
        False, "Rotary positions count from the first token of each document in the sequence, not of the sequence."
    )
    sink: str = setting("none", "none | learned: a logit per head that takes attention away from all keys.")
    qk_norm: bool = setting(False, "Normalise queries and keys of each head.")
    backend: str = setting(
        "auto", "auto | triton | blocked | masked | reference | dense | flex: implementation of attention."
    )

    def __post_init__(self) -> None:
        finite("attention", self)
        one_of("attention.pattern", self.pattern, PATTERNS)
        one_of("attention.sink", self.sink, ("none", "learned"))
        one_of("attention.backend", self.backend, BACKENDS)
        require(
            isinstance(self.separators, str | list),
            f"attention.separators={self.separators} must be paper, all, auto, or a list of class names or of tiers.",
        )
        require(self.initial_tokens >= 0, f"attention.initial_tokens={self.initial_tokens} must be 0 or more.")
        windows = self.window if isinstance(self.window, list) else [self.window]
        for window in windows:
            require(
                isinstance(window, int) and not isinstance(window, bool) and window >= 1,
                f"attention.window={self.window} must be whole numbers of at least 1: it counts the token itself.",
            )
        if self.pattern == "fixed":
            require(
                self.interval is not None and self.interval >= 1,
                f"attention.pattern=fixed needs attention.interval of at least 1, not {self.interval}.",
            )
        budget = self.density_budget
        require(
            len(budget) == 2 and 0 <= budget[0] < budget[1] <= 1,
            f"attention.density_budget={budget} must be [LEAST,MOST], two shares of the tokens from 0 to 1.",
        )
        self._check_choices()
        self._check_placement([*windows, *(self.window_choices or ())])

    def _check_choices(self) -> None:
        """A window is drawn from several, for layers that have one."""
        choices = self.window_choices
        if choices is None:
            return
        require(
            len(set(choices)) == len(choices) >= 2 and min(choices) >= 1,
            f"attention.window_choices={choices} must be at least two different whole numbers of at least 1.",
        )
        require(
            self.pattern != "dense",
            f"attention.window_choices={choices} are windows of a pattern: attention.pattern=dense has none.",
        )
        require(
            not isinstance(self.window, list),
            f"attention.window_choices={choices} draws one window for all layers: attention.window={self.window} must "
            "be one number too, the window of validation.",
        )

    def _check_placement(self, windows: list[int]) -> None:
        """Placements move separators, so there must be some, and a share is what thinning alone needs."""
        one_of("attention.placement", self.placement, PLACEMENTS)
        require(
            self.placement == "natural" or self.pattern == "sep",
            f"attention.placement={self.placement} moves separators, which attention.pattern={self.pattern} has none "
            "of: use attention.pattern=sep.",
        )
        require(
            self.placement != "preceding" or min(windows) >= 2,
            f"attention.placement=preceding needs attention.window={self.window} "
            + (f"and attention.window_choices={self.window_choices} " if self.window_choices else "")
            + "to be at least 2: only then does every separator see the token before it as one of its neighbours.",
        )
        thinned = self.placement == "thinned"
        require(
            thinned or self.keep_share is None,
            f"attention.keep_share={self.keep_share} is of attention.placement=thinned, not of {self.placement}.",
        )
        require(
            not thinned or (self.keep_share is not None and 0 < self.keep_share <= 1),
            f"attention.placement=thinned needs attention.keep_share above 0 and at most 1, not {self.keep_share}.",
        )


VALIDATION_FRACTION = 0.02


@dataclass
class DataConfig:
    """Data of a run. `source: sample` makes a small corpus from the installed Python's documentation."""

    source: str = setting("sample", "sample (a small corpus made from the installed Python) | prefixes.")
    prefixes: list[Any] = setting(
        [],
        "List of prefixes (PREFIX.bin, .idx, .sep.bin, .sep.json), each a path or {path: ..., weight: ...}.",
        text=True,
    )
    sequence_length: int = setting(2048, "Tokens of a sequence.")
    order: str = setting(
        "shuffled",
        "shuffled (documents packed into sequences, all of them shuffled by the seed) | stored (preshuffled data, a "
        "sequence and its label in each row of the .idx, read in stored order from row schedule_start x global_batch).",
    )
    validation_fraction: float = setting(
        VALIDATION_FRACTION, "Share of the tokens of each dataset that is held out for validation: its last documents."
    )
    validation_prefixes: list[Any] = setting(
        [],
        "Prefixes of datasets to validate on, all of them; then nothing is held out, validation_fraction is 0.",
        text=True,
    )
    cache: str | None = setting(None, "Folder of the sample corpus and of indices; None = the user's cache folder.")
    mask_boundary_loss: bool = setting(
        False,
        "A label that is the first token of another document does not count: in the loss of training and validation, "
        "its mean, bits per byte and gradients.",
    )
    workers: int = setting(1, "Processes that load data, for each rank.")
    sample_vocabulary: int = setting(4096, "Entries of the sample corpus's tokenizer.")
    sample_text: str = setting("docs", "docs | code | both: text of the sample corpus.")

    def __post_init__(self) -> None:
        finite("data", self)
        at_most("data", self, sequence_length=2**30, workers=1024, sample_vocabulary=2**20)
        one_of("data.source", self.source, ("sample", "prefixes"))
        one_of("data.order", self.order, ("shuffled", "stored"))
        require(
            self.order == "shuffled" or len(self.prefixes) == 1,
            f"data.order=stored reads the rows of one dataset, and data.prefixes has {len(self.prefixes)}.",
        )
        one_of("data.sample_text", self.sample_text, ("docs", "code", "both"))
        positive("data", self, "sequence_length", "sample_vocabulary")
        require(self.workers >= 0, f"data.workers={self.workers} must be 0 or more.")
        require(
            0 <= self.validation_fraction < 1,
            f"data.validation_fraction={self.validation_fraction} must be at least 0 and below 1.",
        )
        require(
            (self.source == "prefixes") == bool(self.prefixes),
            "data.source=prefixes needs data.prefixes=[PREFIX,...]; prepare one with `sepllm prepare tokenize`."
            if self.source == "prefixes"
            else f"data.prefixes={list(self.prefixes)} is set but data.source={self.source}: add data=prefixes.",
        )
        if self.validation_prefixes:
            require(
                self.validation_fraction in (0.0, VALIDATION_FRACTION),
                f"data.validation_fraction={self.validation_fraction} and data.validation_prefixes are both given: "
                "hold documents out, or name datasets to validate on.",
            )
            self.validation_fraction = 0.0


@dataclass
class ParallelConfig:
    """Sizes of the process grid; data parallelism takes what is left of the world size."""

    tensor: int = setting(1, "Processes that share each layer (tensor parallelism).")
    pipeline: int = setting(1, "Stages of layers (pipeline parallelism).")
    virtual_pipeline: int | None = setting(None, "Model chunks per pipeline stage (interleaved schedule); None = 1.")
    first_stage_layers: int | None = setting(
        None, "Layers of the first pipeline stage, which holds the embedding besides; None = as many as the others."
    )
    last_stage_layers: int | None = setting(None, "Layers of the last pipeline stage; None = as many as the others.")
    context: int = setting(1, "Processes that share each sequence, a part of its tokens each.")
    sequence: bool = setting(
        False, "Tensor-parallel processes share the tokens between layers too (sequence parallelism)."
    )
    sharded_optimizer: bool = setting(
        False, "Each data-parallel replica keeps and updates its share of Adam's state (ZeRO-1) in place of all of it."
    )
    overlap: bool = setting(
        False,
        "Communicate while computing: sum gradients over replicas, a bucket at a time, as the backward pass goes "
        "on, and let the stages of an interleaved pipeline exchange activations while they compute.",
    )
    timeout_seconds: float = setting(
        1800.0, "Seconds that a process waits for another one, at the start and in every exchange."
    )

    def __post_init__(self) -> None:
        finite("parallel", self)
        sizes = ("tensor", "pipeline", "virtual_pipeline", "first_stage_layers", "last_stage_layers", "context")
        positive("parallel", self, *sizes, "timeout_seconds")
        at_most("parallel", self, **dict.fromkeys(sizes, MOST_PROCESSES), timeout_seconds=MOST_SECONDS)
        if self.uneven:
            require(
                self.pipeline > 1 and self.virtual_pipeline in (None, 1),
                "parallel.first_stage_layers and parallel.last_stage_layers need parallel.pipeline above 1 and no "
                "parallel.virtual_pipeline.",
            )
        require(
            not self.sequence or self.tensor > 1,
            "parallel.sequence=true shards along the tensor-parallel group: it needs parallel.tensor above 1.",
        )
        require(
            self.virtual_pipeline in (None, 1) or self.pipeline > 1,
            f"parallel.virtual_pipeline={self.virtual_pipeline} needs parallel.pipeline above 1.",
        )

    @property
    def processes(self) -> int:
        """Processes of one data-parallel replica."""
        return self.tensor * self.pipeline * self.context

    @property
    def uneven(self) -> bool:
        """True when a pipeline stage has a number of layers of its own."""
        return self.first_stage_layers is not None or self.last_stage_layers is not None

    def stage_layers(self, layers: int) -> list[int]:
        """Layers of each pipeline stage of a model of `layers`; empty when they cannot be shared out so."""
        own = {0: self.first_stage_layers, self.pipeline - 1: self.last_stage_layers}
        given = {stage: count for stage, count in own.items() if count is not None}
        left, others = layers - sum(given.values()), self.pipeline - len(given)
        each = left // others if others else 0
        if left != each * others or (others and each < 1):
            return []
        return [given.get(stage, each) for stage in range(self.pipeline)]


@dataclass
class OptimConfig:
    """Optimizer and its schedule. Step counts are optimizer steps."""

    optimizer: str = setting(
        "adam", "adam | muon (Muon for the matrices of the layers, Adam for all else), both with optim.lr."
    )
    groups: list[Any] = setting(
        [],
        "Parameters with settings of their own: a list of {match: PATTERN, lr_factor: X, weight_decay: X, optimizer: "
        "adam or muon}; the first PATTERN (with * and ?) that matches a parameter's name counts.",
    )
    lr: float | None = setting(None, "Learning rate after warm-up; None = model.recipe.rate, the model size's own.")
    min_lr: float | None = setting(None, "Learning rate at the end of the schedule; None = a tenth of optim.lr.")
    schedule: str = setting(
        "cosine",
        "cosine (from lr to min_lr) | pythia (Pythia's: a cosine to 0 over all steps, cut off at min_lr) | wsd | "
        "linear | constant.",
    )
    warmup_fraction: float = setting(0.01, "Share of training.steps, unless warmup_steps is given.")
    warmup_steps: int | None = setting(None, "Steps over which the learning rate rises; None = warmup_fraction.")
    decay_fraction: float = setting(0.1, "schedule=wsd: the share of training.steps that decays at the end.")
    schedule_steps: int | None = setting(
        None,
        "The rate of a longer run, continued: step 1 has that of step schedule_start + 1 of schedule_steps (None: "
        "training.steps). Pythia's at step 93,000: schedule_steps=143000 schedule_start=93000.",
    )
    schedule_start: int = setting(0, "Steps of schedule_steps that another run has done before this one.")
    beta1: float = setting(0.9, "Decay of Adam's mean.")
    beta2: float = setting(0.95, "Decay of Adam's mean of squares.")
    epsilon: float = setting(1e-8, "Added to Adam's denominator.")
    weight_decay: float = setting(0.1, "Decoupled weight decay.")
    clip_grad: float = setting(1.0, "Largest norm of the gradient; 0 = not clipped.")

    def __post_init__(self) -> None:
        finite("optim", self)
        one_of("optim.optimizer", self.optimizer, OPTIMIZERS)
        one_of("optim.schedule", self.schedule, ("cosine", "pythia", "wsd", "linear", "constant"))
        if self.lr is not None:
            self.take(None)
        require(
            self.schedule != "wsd" or self.warmup_fraction + self.decay_fraction <= 1,
            f"optim.warmup_fraction={self.warmup_fraction} and optim.decay_fraction={self.decay_fraction} overlap.",
        )
        for key in ("warmup_fraction", "decay_fraction"):
            value = getattr(self, key)
            require(0 <= value <= 1, f"optim.{key}={value} must lie between 0 and 1.")
        for key in ("beta1", "beta2"):
            value = getattr(self, key)
            require(0 <= value < 1, f"optim.{key}={value} must be at least 0 and below 1.")
        require(self.schedule_start >= 0, f"optim.schedule_start={self.schedule_start} must be 0 or more.")
        positive("optim", self, "schedule_steps")
        # 0 would divide a gradient of 0, such as that of a token that does not occur, by 0.
        require(self.epsilon > 0, f"optim.epsilon={self.epsilon} must be above 0.")
        require(self.clip_grad >= 0, f"optim.clip_grad={self.clip_grad} must be 0 (off) or more.")
        require(self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay} must be 0 or more.")

    def take(self, recipe: float | None) -> None:
        """Fill the rates that are not set: lr from the model's recipe, min_lr from lr (Pythia's is a tenth)."""
        if self.lr is None:
            self.lr = ASSUMED_LR if recipe is None else recipe
        if self.min_lr is None:
            # Rounded, so that a tenth of 6e-4 is 6e-5 and not 5.9999999999999995e-05.
            self.min_lr = float(f"{self.lr / 10:.12g}")
        require(
            0 <= self.min_lr <= self.lr and self.lr > 0,
            f"optim.lr={self.lr} must be above 0 and at least optim.min_lr={self.min_lr}.",
        )

    @property
    def rates(self) -> tuple[float, float]:
        """Learning rate after warm-up and at the end. They are set once the model is known: in every `Config`."""
        assert self.lr is not None and self.min_lr is not None
        return self.lr, self.min_lr


# training.checkpoint_steps of the published models.
PYTHIA = "pythia"


@dataclass
class TrainingConfig:
    """Length, batch and numerics of the run. Batches are counted in sequences."""

    steps: int = setting(143000, "Optimizer steps of the run.")
    global_batch: int = setting(1024, "Sequences of a step, over all processes.")
    micro_batch: int = setting(8, "Sequences that a process computes at once.")
    precision: str = setting("bf16", "fp32 | bf16 | fp16.")
    recompute: str = setting(
        "none", "none | selective (attention) | full: activations computed again in the backward pass."
    )
    compile: bool = setting(
        False,
        "torch.compile what layers and loss compute between matrix products. The first step takes some ten "
        "seconds longer.",
    )
    loss_chunk: int = setting(
        0,
        "Tokens of a micro-batch whose logits exist at once; the output layer is then computed once more in the "
        "backward pass. 0 = all of them, once.",
    )
    curriculum: list[Any] = setting(
        [],
        "Sequence lengths to begin with, rising: a list of {length: TOKENS, steps: N}, of which both may be "
        "shares of data.sequence_length and of `steps` instead, numbers below 1. The rest of the steps have "
        "data.sequence_length.",
    )
    batch_schedule: list[Any] = setting(
        [],
        "Batches to begin with, rising: a list of {batch: SEQUENCES, samples: N} or {batch: SEQUENCES, tokens: N}, "
        "each for so many samples or tokens, rounded up to whole steps. The rest of `steps` has global_batch, and the "
        "learning rate follows the samples read.",
    )
    validation_interval: int = setting(1000, "Steps between validations; 0 = only after the last step.")
    validation_samples: int = setting(256, "Sequences per dataset in one validation; 0 = no validation.")
    checkpoint_interval: int = setting(1000, "Steps between checkpoints; 0 = only after the last step.")
    keep_checkpoints: int = setting(2, "Newest checkpoints that stay on the disk.")
    keep_every: int = setting(0, "Keep the checkpoint of every N-th step besides; 0 = none.")
    checkpoint_steps: Any = setting(
        [],
        "Steps whose checkpoints are written and kept besides, 0 for the initial weights: a list, or pythia for 0, 1, "
        "2, 4, ... 512 and every 1,000th.",
    )
    async_checkpoint: bool = setting(True, "Write checkpoints while training goes on, from a copy in host memory.")
    deterministic: bool = setting(False, "Deterministic algorithms where torch has them.")
    max_bad_steps: int = setting(
        10,
        "Steps in a row that may be skipped for a loss or gradient that is not finite, or for a spike; then the "
        "run stops. 0 = any number.",
    )
    spike_factor: float = setting(
        0.0,
        "A gradient norm above this many times the median of recent ones is a spike, and the step is skipped; 0 = "
        "never.",
    )
    hang_seconds: float = setting(
        1200.0,
        "Seconds without progress after which a process shows where it hangs and ends; 0 = never. Longer than the "
        "longest of a micro-batch, the compilation in the first one, and the writing of a checkpoint.",
    )

    def __post_init__(self) -> None:
        finite("training", self)
        positive("training", self, "steps", "global_batch", "micro_batch", "keep_checkpoints")
        at_most("training", self, global_batch=2**31, micro_batch=2**31, hang_seconds=MOST_SECONDS)
        one_of("training.precision", self.precision, ("fp32", "bf16", "fp16"))
        one_of("training.recompute", self.recompute, ("none", "selective", "full"))
        for key in (
            "loss_chunk",
            "validation_interval",
            "validation_samples",
            "checkpoint_interval",
            "keep_every",
            "max_bad_steps",
            "hang_seconds",
        ):
            value = getattr(self, key)
            require(value >= 0, f"training.{key}={value} must be 0 or more.")
        self._check_checkpoint_steps()
        require(
            self.spike_factor == 0 or self.spike_factor > 1,
            f"training.spike_factor={self.spike_factor} must be above 1, or 0 to skip no spikes.",
        )
        for entry in self.curriculum:
            require(
                isinstance(entry, dict)
                and set(entry) == {"length", "steps"}
                and all(number_or_share(value) for value in entry.values()),
                f"training.curriculum entry {entry} must be {{length: TOKENS, steps: N}}, each a whole number of at "
                "least 1 or a share between 0 and 1.",
            )
        for entry in self.batch_schedule:
            require(
                isinstance(entry, dict)
                and set(entry) in ({"batch", "samples"}, {"batch", "tokens"})
                and all(isinstance(value, int) and number_or_share(value) for value in entry.values()),
                f"training.batch_schedule entry {entry} must be {{batch: SEQUENCES, samples: N}} or "
                "{batch: SEQUENCES, tokens: N}, whole numbers of at least 1.",
            )

    def listed(self, step: int) -> bool:
        """True for the steps of checkpoint_steps."""
        if self.checkpoint_steps == PYTHIA:
            return step % 1000 == 0 or (step <= 512 and step & (step - 1) == 0)
        return step in self.checkpoint_steps

    def keeps(self, step: int) -> bool:
        """True for steps whose checkpoints stay when newer ones come."""
        return self.listed(step) or (self.keep_every > 0 and step % self.keep_every == 0)

    def kept(self) -> int:
        """Most checkpoints that stay when newer ones come, of the whole run."""
        listed = self.steps // 1000 + 11 if self.checkpoint_steps == PYTHIA else len(self.checkpoint_steps)
        interval = self.checkpoint_interval
        every = math.lcm(self.keep_every, interval) if self.keep_every and interval else 0
        return listed + (self.steps // every if every else 0)

    def _check_checkpoint_steps(self) -> None:
        steps = self.checkpoint_steps
        if steps == PYTHIA:
            return
        require(
            isinstance(steps, list)
            and all(isinstance(step, int) and not isinstance(step, bool) and step >= 0 for step in steps)
            and len(set(steps)) == len(steps),
            f"training.checkpoint_steps={steps} must be pythia or a list of different step numbers, such as [0,100].",
        )
        require(
            max(steps, default=0) <= self.steps,
            f"training.checkpoint_steps has {max(steps, default=0)}, beyond training.steps={self.steps}: the run would "
            "never come to it.",
        )


@dataclass
class LoggingConfig:
    """Output of a run while it trains."""

    interval: int = setting(10, "Steps between lines of the console and of metrics.jsonl.")
    peak_tflops: float | None = setting(
        None,
        "Dense bf16 peak of one device in TFLOP/s for MFU; None looks the device up and leaves MFU out when unknown.",
    )
    profile: list[int] | None = setting(
        None, "[first, last] step of a trace by torch's profiler, written to RUN/profile by each of profile_ranks."
    )
    profile_ranks: list[int] = setting([0], "Ranks that are profiled.")
    tracker: str = setting("none", "What mirrors metrics.jsonl: none | wandb | tensorboard.")
    project: str = setting("sepllm-train", "tracker=wandb: project of the run.")
    entity: str | None = setting(None, "tracker=wandb: user or team; None = the default of the account.")
    group: str | None = setting(None, "tracker=wandb: group of the run.")
    tags: list[str] = setting([], "tracker=wandb: tags of the run.")
    mode: str = setting("auto", "tracker=wandb: auto (online with an API key, offline without one) | online | offline.")

    def __post_init__(self) -> None:
        finite("logging", self)
        positive("logging", self, "interval")
        one_of("logging.tracker", self.tracker, ("none", "wandb", "tensorboard"))
        one_of("logging.mode", self.mode, ("auto", "online", "offline"))
        require(
            bool(self.project) and not set(self.project) & set("/\\#?%:"),
            f"logging.project={self.project!r} must be a name without / \\ # ? % and :, which W&B does not allow.",
        )
        require(
            all(0 < len(tag) <= 64 for tag in self.tags),
            f"logging.tags={self.tags} must have 1 to 64 characters each.",
        )
        require(
            self.profile is None or (len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1]),
            f"logging.profile={self.profile} must be [FIRST,LAST], two step numbers from 1 on.",
        )
        require(
            min(self.profile_ranks, default=0) >= 0,
            f"logging.profile_ranks={self.profile_ranks} must be numbers of processes, counted from 0.",
        )
        require(
            self.peak_tflops is None or self.peak_tflops > 0,
            f"logging.peak_tflops={self.peak_tflops} must be above 0.",
        )


@dataclass
class EvaluationConfig:
    """Tasks of `sepllm evaluate` on the model while it trains. They change nothing of what is trained."""

    tasks: list[str] = setting(
        [], "Tasks of `sepllm evaluate` that score the model every `interval` steps and after the last one; [] = none."
    )
    interval: int = setting(0, "Steps between evaluations; 0 = only after the last step.")
    data_dir: str | None = setting(None, "Folder with local files of the tasks; None = the Hugging Face hub.")
    limit: int | None = setting(None, "Only the first documents of each task, so many; None = all.")
    shots: int | None = setting(None, "Examples in a prompt; None = each task's own number.")
    truncate: bool = setting(False, "Cut prompts that do not fit the model's context on the left.")
    batch_size: int = setting(8, "Sequences of a forward pass of each process.")

    def __post_init__(self) -> None:
        positive("evaluation", self, "limit", "batch_size")
        for key in ("interval", "shots"):
            value = getattr(self, key)
            require(value is None or value >= 0, f"evaluation.{key}={value} must be 0 or more.")
        require(len(set(self.tasks)) == len(self.tasks), f"evaluation.tasks={self.tasks} names a task twice.")


@dataclass
class Config:
    """A whole run. `name` is its folder under runs/."""

    name: str = setting("run", "Name of the run: its folder is run_root/name.")
    seed: int = setting(1234, "Seed of weights and data order.")
    run_root: str = setting("runs", "Folder of the runs.")
    resume: str = setting(
        "auto",
        "auto: continue from the newest checkpoint of this run if there is one; never: refuse a folder that is in "
        "use; PATH: start from the checkpoint of that folder.",
    )
    resume_other_data: bool = setting(
        False,
        "With resume=PATH: the data may be other than the checkpoint's, as for the last steps of a run on a "
        "choice of it.",
    )
    init_from: str | None = setting(
        None,
        "Folder of a run (or of a checkpoint) whose weights this one starts from, with a step count, an optimizer "
        "and data of its own: post-training, also with another attention pattern.",
    )
    dry_run: bool = setting(False, "Check everything, print the derived numbers, train nothing.")
    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, f"seed={self.seed} must be at least 0 and below 2**32 = {2**32}.")
        require(
            bool(self.name) and self.name not in (".", "..") and "/" not in self.name,
            f"name={self.name!r} must be a plain folder name: the run is written to {self.run_root}/NAME.",
        )
        self.optim.take(self.model.recipe.rate)
        require(
            not self.resume_other_data or self.resume not in ("auto", "never"),
            f"resume_other_data=true with resume={self.resume}: it is for a run that continues another one's "
            "checkpoint, resume=PATH name=NEW.",
        )
