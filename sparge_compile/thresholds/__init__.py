"""Thresholds by site and head: the calibration and its file, the measured fronts, and the buffers on a model."""
