"""From a checkpoint to an accepted model folder."""
