"""Who can be asked for stories: an engine in this process, a service at an address, a registered version."""
