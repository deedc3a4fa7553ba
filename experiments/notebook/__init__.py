"""What the notebooks build on.

`workspace` their folder, MLflow store and small models · `stored` normalises the outputs of executed notebooks.
"""
