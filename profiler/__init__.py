"""Measures a pipeline: interleaved timing and its statistics, layer latency, redundancy."""
