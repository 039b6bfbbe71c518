"""Calibration files among people: what differs between two, and several put together."""
