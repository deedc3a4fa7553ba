"""Shared by all evaluations: thresholds, statistics, plotting, files."""
