"""Measurements of the parts that decoding is made of."""

CONTEXT = 256  # tokens before the steps that are measured, unless others are named
