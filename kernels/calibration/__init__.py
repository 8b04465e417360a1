"""Calibration: reliability, binning and scaling methods, and the uncertainty of calibration errors."""
