"""Accelerators: streams, events, page-locked memory and batched copies between host and device."""
