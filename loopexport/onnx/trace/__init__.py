"""Trace the native model, without weights, into a graph in which marks show where each decoder layer is."""
