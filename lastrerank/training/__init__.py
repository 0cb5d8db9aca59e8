"""Training: the objective of arXiv 2509.25085 on lists of one positive and mined negatives."""
