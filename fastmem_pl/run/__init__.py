"""A run over samples: the predict module, the trainer around it, and the run folder."""
