"""Does a transformer need normalisation? Characters of Shakespeare, linked MLPs."""
