"""Inside the network: what its recurrences remember of a story, and what its attention looks at.

`readings` both kinds of layer written out as weights between tokens, held to the layers' own output · `look` one
story through the network, with all of it · `mentions` what a name costs each time that it comes · `figures` pictures.
"""
