"""How well embeddings tell classes apart: nearest neighbours that vote, and a linear probe."""

from __future__ import annotations

import numpy as np

from anybatch.core.errors import AnybatchError

NEIGHBOURS = 20
TEMPERATURE = 0.07  # a vote weighs exp(similarity / temperature), Wu et al. 2018


def class_metrics(
    embeddings: np.ndarray, labels: np.ndarray, test_embeddings: np.ndarray, test_labels: np.ndarray
) -> dict[str, float]:
    """Accuracy of a weighted vote of the nearest neighbours (`knn`) and of logistic regression (`linear`).

    Both are means over the classes of the test rows, so that a large class counts as a small one.

    Args:
        embeddings, labels: (N, D) L2-normalised, and (N,) classes: the rows to learn from.
        test_embeddings, test_labels: (M, D) and (M,).

    Raises:
        AnybatchError: No rows, or a single class to learn from.

    Example:
        >>> points = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]])
        >>> class_metrics(points, np.array(["a", "a", "b", "b"]), points[[0, 3]], np.array(["a", "b"]))
        {'knn': 1.0, 'linear': 1.0}

    Cost: N M scores, 1,024 test rows at a time.

    Reference: Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", section 3.4.
    """
    classes, numbers = np.unique(labels, return_inverse=True)
    if len(classes) < 2 or not len(test_labels):
        raise AnybatchError(
            f"The labelled rows are of {len(classes)} class(es), and {len(test_labels)} are to be told apart; expected "
            "at least 2 classes to learn from, and 1 row to test."
        )
    predictions = {
        "knn": classes[_vote(embeddings, numbers, test_embeddings)],
        "linear": classes[_linear(embeddings, numbers, test_embeddings)],
    }
    return {name: mean_per_class(predicted == test_labels, test_labels) for name, predicted in predictions.items()}


def mean_per_class(correct: np.ndarray, labels: np.ndarray) -> float:
    """The share of correct rows (M,) of each class, and the mean of the classes."""
    _, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return float((np.bincount(numbers, weights=correct) / counts).mean())


def _vote(embeddings: np.ndarray, numbers: np.ndarray, test: np.ndarray) -> np.ndarray:
    nearest, chosen = min(NEIGHBOURS, len(embeddings)), []
    for start in range(0, len(test), 1024):
        scores = test[start : start + 1024] @ embeddings.T
        neighbours = np.argsort(-scores, axis=1, kind="stable")[:, :nearest]
        weights = np.exp((np.take_along_axis(scores, neighbours, axis=1) - 1) / TEMPERATURE)
        votes = np.zeros((len(scores), numbers.max() + 1))
        np.add.at(votes, (np.arange(len(scores))[:, None], numbers[neighbours]), weights)
        chosen.append(votes.argmax(axis=1))
    return np.concatenate(chosen)


def _linear(embeddings: np.ndarray, numbers: np.ndarray, test: np.ndarray) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression

    mean, spread = embeddings.mean(axis=0), embeddings.std(axis=0) + 1e-6
    probe = LogisticRegression(max_iter=1000, tol=1e-3).fit((embeddings - mean) / spread, numbers)
    return probe.predict((test - mean) / spread)
