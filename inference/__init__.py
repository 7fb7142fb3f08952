"""SVI, data, prediction, ArviZ, plots and the command line. What a practitioner runs."""

if __name__ != "bayes_lora.inference":
    raise ImportError("import this package as bayes_lora.inference (pip install -e .)")
