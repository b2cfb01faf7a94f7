from autoseg.pipeline.api import Predictor as Predictor
from autoseg.pipeline.api import Segmentation as Segmentation

__version__: str
