"""What the notebooks compute, composed of the steps of the core; one module a question.

:mod:`~pruning_utils.studies.recipes` holds what a point is made of: a cut, a recipe and a seed.
:mod:`~pruning_utils.studies.study` cuts, trains and measures such points, and keeps tables.
All others say which points and measures belong to a question.
"""
