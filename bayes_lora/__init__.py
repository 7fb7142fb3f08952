"""Low-rank adapters whose rank and bits are random variables: the parts, without any training.

`distributions`, `gates` and `quantization` are the mathematics; `layers` applies it to one linear
layer, `network` to a whole transformers model, and `costs` counts bit operations. The Pyro
programs are in `bayes_lora.models`, what trains them in `bayes_lora.inference`.
"""

from bayes_lora.distributions import HardConcrete
from bayes_lora.errors import InputError, NumericalError
from bayes_lora.network import AdaptedNetwork, Latents

__version__ = "0.1.0"

__all__ = ["AdaptedNetwork", "HardConcrete", "InputError", "Latents", "NumericalError"]
