"""Calibrators: from the statistics of data, or of weights, to ranges."""

from qzoo.quant.calib import calibrator, histogram, max
from qzoo.quant.calib.histogram import HistogramCalibrator
from qzoo.quant.calib.max import MaxCalibrator
from qzoo.quant.calib.weights import calibrate_weights

__all__ = ["HistogramCalibrator", "MaxCalibrator", "calibrate_weights", "calibrator", "histogram", "max"]
