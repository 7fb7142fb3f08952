r"""Predictive distributions of examples, at one setting of the latents or at S draws of them.

    ClassProbabilities    classification   p(y_n = k)
    NormalPredictions     regression       y_n ~ Normal(mean_n, deviation_n)
    TextProbabilities     language model   log p(text_n), as a text is both input and label

Every array has the examples along an axis; a first axis, if there is one, is that of the draws.
What is averaged over draws is the distribution, so probabilities and never their logarithms:

    p(y_n) = mean_s p_s(y_n)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

FloatArray = NDArray[np.floating]
Labels = NDArray[np.number]

SMALLEST_PROBABILITY = float(np.finfo(np.float32).tiny)
"""Probabilities are clipped here before the logarithm: one mistake costs at most 87.3 nats."""


class ClassProbabilities(NamedTuple):
    """Probability of every class.

    Attributes
    ----------
    probability : ndarray
        Shape (..., examples, classes); rows sum to 1.

    Examples
    --------
    >>> two = ClassProbabilities(np.array([[[0.25, 0.75]], [[0.75, 0.25]]]))
    >>> two.averaged().probability
    array([[0.5, 0.5]])
    """

    probability: FloatArray

    def averaged(self) -> ClassProbabilities:
        """The mean of the draws' probabilities."""
        return ClassProbabilities(self.probability.mean(0))

    def log_likelihood(self, labels: Labels) -> FloatArray:
        """Log probability of class ids (examples,), nats: shape (..., examples).

        Examples
        --------
        >>> sure = ClassProbabilities(np.array([[[0.25, 0.75]]]))
        >>> sure.log_likelihood(np.array([1])).round(4).tolist()
        [[-0.2877]]
        """
        ids = np.broadcast_to(labels.astype(int), self.probability.shape[:-1])
        chosen = np.take_along_axis(self.probability, ids[..., None], -1)[..., 0]
        return np.log(np.maximum(chosen.astype(np.float64), SMALLEST_PROBABILITY))

    def draw_labels(self, generator: np.random.Generator) -> NDArray[np.integer]:
        """Draw a class id for every example at every draw."""
        u = generator.random(self.probability.shape[:-1])[..., None]
        return np.minimum((u > self.probability.cumsum(-1)).sum(-1), self.probability.shape[-1] - 1)

    def described(self, label_names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Labels, and what data and posterior leave open, of S draws.

        The entropy of the averaged probabilities p_s, nats, is what the data leave open plus what
        the posterior leaves open:

            H(mean_s p_s) = mean_s H(p_s) + I,      I >= 0 the mutual information of label and draw.

        Examples
        --------
        >>> two = ClassProbabilities(np.array([[[1.0, 0.0]], [[0.0, 1.0]]]))  # they contradict
        >>> found = two.described(["no", "yes"])
        >>> found["entropy"].round(3), found["entropy_data"].round(3)
        (array([0.693]), array([0.]))
        """
        mean = self.averaged().probability
        total = stats.entropy(mean, axis=-1)
        of_data = stats.entropy(self.probability, axis=-1).mean(0)
        return {
            "label": np.array(label_names)[mean.argmax(-1)],
            "probability": mean.max(-1), "probabilities": mean, "entropy": total,
            "entropy_data": of_data, "entropy_posterior": (total - of_data).clip(0),
        }  # fmt: skip


class NormalPredictions(NamedTuple):
    """Normal distribution of a number.

    Attributes
    ----------
    mean, deviation : ndarray
        Of the label, in its unit: shape (..., examples).

    Examples
    --------
    >>> two = NormalPredictions(np.array([[0.0], [2.0]]), np.ones((2, 1)))
    >>> mixture = two.averaged()
    >>> mixture.mean.tolist(), (mixture.deviation**2).round(6).tolist()
    ([1.0], [2.0])
    """

    mean: FloatArray
    deviation: FloatArray

    def averaged(self) -> NormalPredictions:
        """Mean and deviation of the draws' mixture: exact for moments up to the second."""
        spread = (self.deviation**2).mean(0) + self.mean.var(0)
        return NormalPredictions(self.mean.mean(0), np.sqrt(spread))

    def log_likelihood(self, labels: Labels) -> FloatArray:
        """Log density of numbers (examples,), nats: shape (..., examples)."""
        return np.asarray(stats.norm.logpdf(labels, self.mean, self.deviation))

    def draw_labels(self, generator: np.random.Generator) -> FloatArray:
        """Draw a number for every example at every draw."""
        return generator.normal(self.mean, self.deviation)

    def described(self, label_names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Mean and variance of S draws: that of the noise, and that of the draws' means."""
        noise, between = (self.deviation**2).mean(0), self.mean.var(0)
        return {
            "label": self.mean.mean(0), "variance": noise + between, "variance_data": noise,
            "variance_posterior": between,
        }  # fmt: skip


class TextProbabilities(NamedTuple):
    """Log probability of texts, whose label is the text itself.

    Attributes
    ----------
    log_probability : ndarray
        Nats a text: shape (..., examples).

    Examples
    --------
    >>> two = TextProbabilities(np.log([[0.5, 0.1], [0.3, 0.1]]))
    >>> np.exp(two.averaged().log_probability).round(6).tolist()
    [0.4, 0.1]
    """

    log_probability: FloatArray

    def of_whole_texts(self, text: Sequence[int], number: int) -> TextProbabilities:
        """Of so many texts, from S draws of pieces, which are of these; 0 of one without a piece.

        Examples
        --------
        >>> pieces = TextProbabilities(np.array([[-1.0, -2.0, -4.0]]))
        >>> pieces.of_whole_texts([0, 2, 2], number=3).log_probability.tolist()
        [[-1.0, 0.0, -6.0]]
        """
        place = np.asarray(text, int)
        return TextProbabilities(np.stack([np.bincount(place, p, number) for p in self[0]]))

    def averaged(self) -> TextProbabilities:
        """Logarithm of the mean of the draws' probabilities."""
        total = special.logsumexp(self.log_probability, axis=0)
        return TextProbabilities(total - np.log(len(self.log_probability)))

    def log_likelihood(self, labels: Labels) -> FloatArray:
        """Log probability of the texts, nats: shape (..., examples); labels are not looked at."""
        return np.asarray(self.log_probability, np.float64)

    def draw_labels(self, generator: np.random.Generator) -> None:
        """Nothing: texts are not drawn here, `model.generate` of an export writes some."""

    def described(self, label_names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Log probability under S draws, nats, and its standard deviation between them."""
        return {
            "log_probability": self.averaged().log_probability,
            "deviation_posterior": self.log_probability.std(0),
        }


Prediction = ClassProbabilities | NormalPredictions | TextProbabilities
