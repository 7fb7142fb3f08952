"""The Pyro programs: priors, likelihoods, model and guides. The page a statistician reads."""

import warnings

if __name__ != "bayes_lora.models":
    raise ImportError("import this package as bayes_lora.models (pip install -e .)")

# Pyro warns of every parameter it finds frozen; that the backbone is frozen is the point here.
warnings.filterwarnings("ignore", message=".*not registered in the param store.*requires_grad")
