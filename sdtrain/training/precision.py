"""The precision in which the networks compute during training: how `auto` is resolved, and the
autocast of training steps and looks.

Master weights, the optimizer's state, EMA, schedule and loss are float32 in every precision.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from time import process_time

import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdtrain.config.launch import is_started_by_launcher
from sdtrain.errors import StorageError, UserError
from sdtrain.models.unet import UNet
from sdtrain.runs.config import read_config
from sdtrain.runs.layout import RunFolder

AUTO = "auto"
"""The value of trainer.precision that is resolved when a run begins."""

DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Precision -> the dtype of autocast."""

BF16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16")
"""Instructions of a CPU that multiply in bfloat16."""

LEAST_GAIN = 1.15
"""How many times as fast as float32 bfloat16 must be on a CPU to be chosen."""

TRIAL_BATCH = 16
TRIAL_SIDE = 8
TRIAL_STEPS = 5
"""Steps of each precision that are timed, of which the fastest counts."""


@dataclass(frozen=True)
class Choice:
    """A precision, and why it was chosen: a clause that follows "because"."""

    precision: str
    reason: str

    @property
    def line(self) -> str:
        return f"trainer.precision=auto: {self.precision}, because {self.reason}."


def choose_precision(device: str, *, trains_autoencoder: bool) -> Choice:
    """Resolve trainer.precision=auto on this machine.

    The answer depends on the machine and not on the sizes of the model, so that all arms of a sweep
    and all ranks of a run have the same precision.

    device: "cuda" or "cpu".
    """
    if trains_autoencoder:
        return Choice("32-true", "autoencoders are trained in float32")
    if device == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return choose_on_gpu(torch.cuda.get_device_name(), has_bf16)
    # Older versions of torch do not tell what the CPU can do.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    has_bf16 = any(capabilities.get(name) for name in BF16_INSTRUCTIONS)
    # Ranks that a launcher has started decide separately, and must not decide by a clock.
    measure = None if is_started_by_launcher() else bf16_gain
    return choose_on_cpu(has_bf16, measure)


def saved_precision(run: RunFolder) -> str | None:
    """Return the precision of the run in a folder, or None if the folder holds none."""
    try:
        trainer = read_config(run.config).get("trainer", {})
    except StorageError:
        return None
    return trainer.get("precision")


def choose_on_gpu(name: str, has_bf16: bool) -> Choice:
    """Choose the precision on a GPU. name: of the GPU."""
    if has_bf16:
        return Choice("bf16-mixed", f"the {name} computes in bfloat16")
    return Choice("32-true", f"the {name} does not compute in bfloat16")


def choose_on_cpu(has_bf16: bool, measure: Callable[[], float] | None) -> Choice:
    """Choose the precision on a CPU.

    has_bf16: whether it has instructions for bfloat16. measure: returns how many times as fast as
    float32 bfloat16 is; None decides by the instructions alone.
    """
    if not has_bf16:
        return Choice("32-true", "this CPU has neither AMX nor AVX512-BF16")
    if measure is None:
        return Choice("bf16-mixed", "this CPU has instructions for bfloat16")
    gain = measure()
    reason = f"in a trial on this CPU bfloat16 was {gain:.2f} times as fast as float32"
    return Choice("bf16-mixed" if gain >= LEAST_GAIN else "32-true", reason)


def bf16_gain() -> float:
    """Return how many times as fast as in float32 a training step is in bfloat16.

    It is tried on a UNet like that of model=latent_diffusion, which takes two or three seconds. The
    clock is that of this process, so that others on the machine disturb it less, and the two
    precisions take turns. Torch's global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        unet = UNet(
            latent_channels=4,
            context_dim=128,
            block_channels=[64, 128],
            layers_per_block=1,
            attention=[True, True],
            head_dim=32,
            norm_groups=16,
            pooled_context=True,
        )
        x = torch.randn(TRIAL_BATCH, 4, TRIAL_SIDE, TRIAL_SIDE)
        context = torch.randn(TRIAL_BATCH, 24, 128)
    timestep = torch.full((TRIAL_BATCH,), 500.0)

    def time_step(precision: str) -> float:
        began = process_time()
        with compute_precision(precision, "cpu"):
            output = unet(x, timestep, context)
        output.float().square().mean().backward()
        unet.zero_grad()
        return process_time() - began

    seconds = {"32-true": [], "bf16-mixed": []}
    for precision in seconds:
        time_step(precision)  # the first step of each is slower
    for _ in range(TRIAL_STEPS):
        for precision, times in seconds.items():
            times.append(time_step(precision))
    return min(seconds["32-true"]) / min(seconds["bf16-mixed"])


@contextmanager
def compute_precision(precision: str, device: str) -> Iterator[None]:
    """Let networks compute in this precision within the `with` block.

    Weights may change within the block: autocast does not keep its copies of them.
    """
    dtype = DTYPES.get(precision)
    if dtype is None:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device, dtype, cache_enabled=False))
        stack.enter_context(attention_kernels(device))
        yield


def attention_kernels(device: str) -> AbstractContextManager:
    """Return the context that selects the kernels of attention under autocast.

    On a CPU the backward pass of the flash kernel is several times slower in bfloat16 than in
    float32, which takes all that the other layers gain. Separate matrix products are not.
    """
    return sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext()


class CPUMixedPrecision(MixedPrecision):
    """Lightning's bfloat16 autocast on a CPU, with attention as separate matrix products."""

    def __init__(self) -> None:
        super().__init__("bf16-mixed", "cpu")

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        with super().forward_context(), attention_kernels("cpu"):
            yield


def check_precision(precision: str, device: str) -> None:
    """Raise UserError for a precision that the device, "cuda" or "cpu", does not have."""
    if precision == "16-mixed" and device == "cpu":
        raise UserError(
            "needs a GPU: on a CPU there is no mixed precision in float16",
            key="trainer.precision",
            value=precision,
            remedy="Set trainer.precision=auto.",
        )
