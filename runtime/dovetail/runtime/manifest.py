"""`dovetail.json`: the contract of a pair folder. Facts come from here, never from a file name.

The manifest is written last and atomically, so that an interrupted export never looks finished.
"""
