"""Runs in a frozen application before its own code: a helper process, which is the same program, does its work here."""

from pard_onnx.models.helper_process import freeze_support

freeze_support()
