"""Workloads, replay, experiments, reports and plots."""
