"""A calibration, and what it does to a model, to look at: pictures, clips, a page."""
