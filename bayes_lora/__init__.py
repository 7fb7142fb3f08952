"""Low-rank adapters whose rank and bits are random variables: the parts, without any training.

`distributions`, `gates` and `quantization` are the mathematics; `layers` applies it to one linear
layer, `network` to a whole transformers model, and `costs` counts bit operations. The Pyro
programs are in `bayes_lora.models`, what trains them in `bayes_lora.inference`. `bayes_lora.load`
reads back what they leave.
"""

from typing import TYPE_CHECKING, Any

from bayes_lora.distributions import HardConcrete
from bayes_lora.errors import InputError, NumericalError
from bayes_lora.network import AdaptedNetwork, Latents

if TYPE_CHECKING:
    from bayes_lora.inference.loading import load

__version__ = "0.1.0"

__all__ = ["AdaptedNetwork", "HardConcrete", "InputError", "Latents", "NumericalError", "load"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 (as Python has it)
    if name == "load":  # only when asked for: the parts need nothing of what is above them
        from bayes_lora.inference.loading import load

        return load
    raise AttributeError(f"module 'bayes_lora' has no attribute {name!r}")
