"""Sees and changes heads of a model."""
