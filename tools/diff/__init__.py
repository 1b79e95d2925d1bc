"""Compares what a model file computes with what something else computes, stage by stage and op by op."""
