"""What the notebooks stand on.

`place` where one works, and how much of it · `little` a model that is trained in a minute · `stored` notebooks as
files: executed, cleaned of whatever belongs to one machine, checked, and written back.
"""
