"""Trace the native model into a graph, without weights: one decoder layer of each kind, each place marked."""
