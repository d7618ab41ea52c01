"""The optimizer, its schedule, the batch and clipping."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from simpletuner.catalog.optimizers import OPTIMIZER_SPELLINGS, OPTIMIZERS, REFUSED_OPTIMIZERS
from simpletuner.catalog.schedules import SCHEDULE_SPELLINGS, SCHEDULES
from simpletuner.config.fields import Opt, Section


class OptimizerSection(Section):
    optimizer: Annotated[
        str,
        Opt(
            level="basic",
            choices=tuple(OPTIMIZERS),
            spellings=OPTIMIZER_SPELLINGS,
            foreign=tuple(REFUSED_OPTIMIZERS),
        ),
    ] = "adamw_bf16"
    """The update rule. adamw_bf16 is a good first choice; lion wants a learning rate 3 to 10 times smaller, prodigy
    one of 1. OPTIMIZERS.md compares them."""

    optimizer_config: Annotated[str | None, Opt(holds="json")] = None
    """Arguments of this optimizer alone, key=value,key=value or an object; rounding=kahan for adamw_bf16, d_coef=2
    for prodigy. OPTIMIZERS.md lists them."""

    learning_rate: Annotated[float, Gt(0), Le(1), Opt(level="basic")] = 1e-4
    """Step size at the height of the schedule."""

    lr_scheduler: Annotated[str, Opt(choices=tuple(SCHEDULES), spellings=SCHEDULE_SPELLINGS)] = "constant_with_warmup"
    """How the learning rate moves from the end of the warm-up to the end of the run."""

    lr_warmup_steps: Annotated[int, Ge(0), Opt(unit="steps")] = 0
    """Updates over which the learning rate rises linearly from 0."""

    lr_num_cycles: Annotated[int, Ge(1), Opt()] = 1
    """Number of cycles of cosine_with_restarts and sine."""

    lr_power: Annotated[float, Gt(0), Opt()] = 1.0
    """Exponent of the polynomial schedule."""

    lr_end: Annotated[float, Ge(0), Le(1), Opt()] = 0.0
    """Learning rate at the end of the polynomial, linear, cosine and sine schedules."""

    optimizer_beta1: Annotated[
        float | None, Ge(0), Lt(1), Opt(aliases=("adam_beta1",), shown_default="by optimizer")
    ] = None
    """First momentum coefficient. Give both betas or neither."""

    optimizer_beta2: Annotated[
        float | None, Ge(0), Lt(1), Opt(aliases=("adam_beta2",), shown_default="by optimizer")
    ] = None
    """Second momentum coefficient. Give both betas or neither."""

    adam_weight_decay: Annotated[float, Ge(0), Le(10), Opt(aliases=("weight_decay",))] = 0.01
    """Decoupled weight decay."""

    adam_epsilon: Annotated[float, Gt(0), Opt(level="expert")] = 1e-8
    """Keeps the division of Adam's update finite."""

    max_grad_norm: Annotated[float, Ge(0), Opt()] = 1.0
    """Gradients are clipped to this norm. Lower it if training becomes unstable; 0 turns clipping off."""

    grad_clip_method: Annotated[Literal["norm", "value"], Opt(level="expert")] = "norm"
    """norm scales all gradients together; value clamps each element to max_grad_norm."""

    optimizer_release_gradients: Annotated[bool | None, Opt(shown_default="on for model_type full, where possible")] = (
        None
    )
    """Update each weight as soon as its gradient is there, and free the gradient: the gradients of a whole model never
    lie in memory at once. Needs gradient_accumulation_steps 1, and max_grad_norm 0 or grad_clip_method value."""

    train_batch_size: Annotated[int, Ge(1), Le(1024), Opt(level="basic", unit="images")] = 1
    """Images in one forward pass. 1 suits small datasets and small cards."""

    gradient_accumulation_steps: Annotated[int, Ge(1), Opt(level="basic")] = 1
    """Forward passes per update. Raises the effective batch without more memory; time grows linearly."""

    use_ema: Annotated[bool, Opt()] = False
    """Keep a moving average of the trained weights beside them; it is steadier than the weights of the last update.
    Saved as pytorch_lora_weights_ema.safetensors."""

    ema_decay: Annotated[float, Ge(0), Lt(1), Opt()] = 0.995
    """How much of the average stays at each averaging: 0.995 looks back about 200 of them. Less at the beginning of a
    run."""

    ema_update_interval: Annotated[int, Ge(1), Opt(level="expert", unit="steps")] = 1
    """Updates from one averaging to the next."""

    ema_warmup_steps: Annotated[int, Ge(0), Opt(level="expert", unit="steps")] = 0
    """For so many updates the average is a copy of the weights."""

    ema_device: Annotated[Literal["accelerator", "cpu"], Opt(level="expert")] = "accelerator"
    """Where the average is kept: beside the weights, 4 bytes each, or in main memory, which makes each step wait for
    the copy."""

    ema_cpu_only: Annotated[bool, Opt(level="expert")] = False
    """The same as ema_device cpu, whatever that says."""

    ema_foreach_disable: Annotated[bool, Opt(level="expert")] = False
    """Average one tensor after the other in place of all at once; slower, the same result."""
