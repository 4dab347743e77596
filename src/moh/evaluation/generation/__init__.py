"""Scoring generated images: FID, sFID, KID, inception score, precision and recall, or the same on a named classifier.

    extractor = InceptionFeatures()                      # or load_classifier("my-classifier")
    scores = score_images("samples.npz", "reference-images", extractor)
    print("\\n".join(scores.lines()))

`frechet_distance(features_a, features_b)` takes features of any origin.
"""

from moh._extras import require

require("timm", extra="diffusion")
require("torch_fidelity", extra="diffusion")

from moh.evaluation.generation.classifier import ClassifierFeatures, InceptionFeatures, load_classifier
from moh.evaluation.generation.features import Extracted, FeatureExtractor, ImageFeatures, extract_features
from moh.evaluation.generation.frechet import Gaussian, frechet_distance, gaussian_frechet_distance
from moh.evaluation.generation.images import Images, open_images
from moh.evaluation.generation.scores import (
    GenerationScores,
    compare,
    inception_score,
    kernel_distance,
    precision_recall,
    score_images,
)
from moh.evaluation.generation.statistics import load_features, reference_features, save_features

__all__ = [
    "ClassifierFeatures",
    "Extracted",
    "FeatureExtractor",
    "Gaussian",
    "GenerationScores",
    "ImageFeatures",
    "Images",
    "InceptionFeatures",
    "compare",
    "extract_features",
    "frechet_distance",
    "gaussian_frechet_distance",
    "inception_score",
    "kernel_distance",
    "load_classifier",
    "load_features",
    "open_images",
    "precision_recall",
    "reference_features",
    "save_features",
    "score_images",
]
