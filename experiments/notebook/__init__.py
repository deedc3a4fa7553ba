"""What the notebooks build on.

`workspace` their folder, MLflow store and small models · `stored` strips and checks the outputs of executed notebooks.
"""
